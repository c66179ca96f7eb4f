"""A folder of pictures and a CSV of captions, as arrays.

    <root>/full_emoji.csv              columns `#` and `name`; `keywords` and `split` if there are any; others ignored
    <root>/image/<vendor>/<#>.png      any size and mode; `#` is any file name, not only a number

Another row with the same `#` is a further caption of that picture.

This is the layout of the Kaggle emoji set, and of pictures of one's own. `read_rows` reads the CSV, `read_pictures`
the pictures of its rows, `collect` keeps the good ones; `load`, below, puts the three together.

With several vendors, "Google+OpenMoji", a row has several pictures, and each caption names its vendor: "red heart,
OpenMoji style". A row is held out for all of them or for none.

A faulty row or picture is left out and reported. Only too many of them, or nothing left, is an error. A missing picture
is reported but never counted, for few vendors draw every emoji.
"""

import csv
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex
from unicodedata import normalize

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from files import cached, open_regular, printable
from images import LARGEST, MISSING, PictureError, as_rgba, reading
from params import Params

CSV, COLUMNS, SIDES = "full_emoji.csv", ("#", "name", "keywords", "split"), ("", "train", "heldout")
MAX_BAD = 0.05  # refuse a dataset with a larger share of broken rows and pictures
BLOCK, PART = 512, 32  # pictures decoded and cached together; those of them that a thread takes at a time
FORMAT = 2  # of the cache; any change of what decoding gives needs another number
VARIANTS = 4  # other captions of a picture, made from its keywords
NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f/\\]|^\.\.?$")  # in a file name: slashes, control characters


class DatasetError(ValueError):
    """The data cannot be used: the message says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Fault(NamedTuple):
    where: str  # "full_emoji.csv row 13, column name" as a spreadsheet counts, or "image/Google/13.png"
    what: str


class Row(NamedTuple):
    index: str
    name: str
    keywords: str
    heldout: bool
    fault: Fault | None
    number: int  # as a spreadsheet counts
    others: list[str]  # further captions, of later rows with the same index


# Each row, its good pictures by vendor (uint8 [h, w, c], or None where they stay on the disk), and all of its faults
Found = Iterator[tuple[Row, dict[str, np.ndarray | None], list[Fault]]]


class Pictures(NamedTuple):
    images: UInt8[np.ndarray, "n h w c"] | None  # None where they stay on the disk
    names: list[str]  # the captions
    indexes: list[str]  # the `#` of each: the same for every vendor's picture of one row, and these stand together
    folders: list[Path]  # the vendor's folder of each
    keywords: list[str]  # "face, happy, joy", or ""
    heldout: Bool[np.ndarray, "n"]
    faults: list[Fault]
    fingerprint: str  # SHA-256 of pictures, captions and split; of file names instead of pictures that stay on the disk
    others: list[list[str]]  # further captions of each

    def file(self, row: SupportsIndex) -> Path:
        return self.folders[row] / f"{self.indexes[row]}.png"


def from_config(config: Params, root: Path | None = None, *, decode: bool = True) -> Pictures:
    """The pictures of a configuration, those to train on first; `root` where they have moved to; raises as `load`."""
    root, shape = root or Path(config.data), (config.H, config.W, config.CHANNELS)
    pictures = load(root, vendor=config.vendor, limit=config.MAX_INDEX, shape=shape, decode=decode)
    if config.stream and decode:  # recognise what a run that streamed was trained on
        pictures = pictures._replace(fingerprint=_fingerprint(pictures, pixels=False))
    return _training_first(pictures)


def load(root: Path, *, vendor: str, limit: int, shape: tuple[int, int, int], decode: bool = True) -> Pictures:
    """The captioned pictures of a vendor, or of several joined by "+", in the order of the CSV; raises DatasetError.

    `limit` > 0 keeps the first `limit` training rows that have a picture, and the held-out ones before the last of
    these. Without `decode` only the header of each picture is read, and `images` is None.
    """
    rows, chosen = read_rows(root), _chosen(root, vendor)
    most = min(len(rows), limit + sum(row.heldout for row in rows)) if limit else len(rows)
    images = _allocate(root, most * len(chosen), shape) if decode else None
    kept, faults = collect(read_pictures(root, rows, chosen, shape if decode else None), images, limit)
    _refuse(root, rows, chosen, kept, faults)
    folders = {one: root / "image" / one for one in chosen}
    pictures = Pictures(
        images=images[: len(kept)] if decode else None,
        names=[styled(row.name, one) if len(chosen) > 1 else row.name for row, one in kept],
        indexes=[row.index for row, _ in kept],
        folders=[folders[one] for _, one in kept],
        keywords=[row.keywords for row, _ in kept],
        heldout=np.array([row.heldout for row, _ in kept]),
        faults=faults,
        fingerprint="",
        others=[row.others for row, _ in kept],
    )
    return pictures._replace(fingerprint=_fingerprint(pictures, pixels=decode))


def read_rows(root: Path) -> list[Row]:
    """Each row of the CSV that is not empty, with its fault if it has one; raises DatasetError."""
    path = root / CSV
    if not path.is_file():
        what = f"{root} has no {CSV}" if root.is_dir() else f"there is no folder {root}"
        make = f"`python prepare_dataset.py --data {root}` makes one"
        raise DatasetError(f"{what}: name the folder of the pictures with --data; {make}, see its --help")
    csv.field_size_limit(2**31 - 1)  # the Kaggle file holds pictures in base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [*_parse(path, csv.reader(file))]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None


def _parse(path: Path, lines) -> Iterator[Row]:
    """The rows below the header, of the csv.reader of a file."""
    header = [name.strip() for name in next(lines, [])]
    if lines.line_num > 1:
        raise DatasetError(f"{path}: a line break inside its first row: is a quotation mark missing there?")
    absent = [f"`{name}`" for name in ("#", "name") if name not in header]
    if absent:
        found = f"it has {', '.join(f'`{name}`' for name in header[:20])}" if header else "it is empty"
        raise DatasetError(f"{path} lacks the column {' and '.join(absent)} in its first row; {found}")
    places = [header.index(name) if name in header else len(header) for name in COLUMNS]
    folders = [path.parent / "image" / vendor for vendor in vendors(path.parent)]
    n, firsts, end = len(header), {}, lines.line_num
    for number, fields in enumerate(lines, start=2):  # the header is a spreadsheet's row 1
        start, end = end, lines.line_num
        padded = fields[:n] + [""] * (n + 1)  # a short row, or a column that is absent
        index, name, keywords, split = (" ".join(padded[place].split()) for place in places)
        if not (index or name or keywords or split):
            continue
        index = _index(padded[places[0]], folders)
        name = name.removeprefix("⊛").strip()  # Unicode's mark of a new emoji
        too_many = f"{len(fields)} fields, the header {n}: put the caption in quotation marks"
        heldout, first = split.lower() == "heldout", firsts.get(index)
        other_side = first and f"{split!r}, but row {first.number} with the same # is on the other side"
        faults = (  # the first that is true is reported
            (end > start + 1, "", "a line break inside a field: is a quotation mark missing at the end of one?"),
            (any(map(str.strip, fields[n:])), "", too_many),
            (not index, ", column #", "empty; it must be the name of the picture's file without .png"),
            (NO_NAME.search(index), ", column #", f"{index!r} is not the name of a file"),
            (not name, ", column name", "empty; it must be the picture's caption"),
            (split.lower() not in SIDES, ", column split", f"{split!r} is neither train nor heldout"),
            (first and split and heldout != first.heldout, ", column split", other_side),
        )
        fault = next((Fault(f"{CSV} row {number}{column}", what) for wrong, column, what in faults if wrong), None)
        row = Row(index, name, keywords, heldout, fault, number, [])
        if fault or not first:
            yield row
        elif name not in (first.name, *first.others):
            first.others.append(name)
        if not fault:
            firsts.setdefault(index, row)


def _index(written: str, folders: list[Path]) -> str:
    """The name of a row's pictures without .png: as it is written if a vendor has such a file, else tidied."""
    words = " ".join(written.split())
    tidy = re.sub(r"^(\d+)\.0+$", r"\1", words)  # a spreadsheet made a number of it
    names = (written, written.strip(), words, tidy)
    names = dict.fromkeys([*names, *(normalize(form, name) for name in names for form in ("NFC", "NFD"))])
    if len(names) == 1:  # nearly always, and nothing is looked for on the disk
        return tidy
    return next((name for name in names for folder in folders if os.path.exists(folder / f"{name}.png")), tidy)


def vendors(root: Path) -> list[str]:
    """Names of the folders of pictures in a dataset; hidden ones, as Jupyter and macOS leave there, are none."""
    folder = root / "image"
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _chosen(root: Path, vendor: str) -> list[str]:
    """The vendors that "Google+OpenMoji" names; a folder of exactly that name is one vendor."""
    present = vendors(root)
    chosen = [vendor] if vendor in present else [*dict.fromkeys(vendor.split("+"))]
    for one in chosen:
        if one not in present:
            among = f" (of --vendor {vendor})" if len(chosen) > 1 else ""
            raise DatasetError(
                f"{root / 'image'} has no folder {one!r}{among}; it has {', '.join(present) or 'no vendor at all'}. "
                f"Choose one with --vendor, or put pictures into {root / 'image' / (one or '<vendor>')}"
            )
    return chosen


def read_pictures(root: Path, rows: list[Row], chosen: list[str], shape: tuple[int, int, int] | None) -> Found:
    """The pictures of each row, a block of rows at a time: from the cache, or decoded and cached by their content.

    A faulty row has none. Without `shape` only headers are read, and each picture is None.
    """
    for start in range(0, len(rows), BLOCK):
        block, found = rows[start : start + BLOCK], {}
        for vendor in chosen:
            files = [root / "image" / vendor / f"{row.index}.png" for row in block if not row.fault]
            found[vendor] = _read_cached(files, shape) if shape else iter(_each(lambda file: _read(file, None), files))
        for row in block:
            read = {} if row.fault else {vendor: next(pictures) for vendor, pictures in found.items()}
            faults = [Fault(f"image/{vendor}/{row.index}.png", what) for vendor, (_, what) in read.items() if what]
            good = {vendor: image for vendor, (image, what) in read.items() if not what}
            yield row, good, [row.fault] if row.fault else faults


def _read_cached(files: list[Path], shape: tuple[int, int, int]) -> Iterator[tuple[np.ndarray, str]]:
    """Each picture, zero where there is a fault, and its fault or ""; from the cache if they are there."""

    def decode() -> dict[str, np.ndarray]:
        found = _each(lambda file: _read(file, shape), files)
        images = [np.zeros(shape, np.uint8) if image is None else image for image, _ in found]
        what = np.array([what for _, what in found], str)
        return {"images": np.array(images, np.uint8).reshape(-1, *shape), "what": what}

    def digest(file: Path) -> str:
        try:
            with open_regular(file, 8 * LARGEST) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return type(error).__name__

    arrays = cached("pictures", json.dumps([FORMAT, shape, _each(digest, files)]), decode)
    return zip(arrays["images"], arrays["what"].tolist(), strict=True)


def _each(function: Callable[[Path], Any], files: list[Path]) -> list:
    """The function of each file, by four threads; PART at a time, as a task for each file would cost as much again."""
    parts = [files[start : start + PART] for start in range(0, len(files), PART)]
    # Pillow's advice about odd files is silenced here: warning filters are those of the process, not of a thread.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(4) as pool:
        return [result for part in pool.map(lambda part: [*map(function, part)], parts) for result in part]


def decoded(file: Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """The picture in a file as uint8 [*shape]; raises DatasetError, as of a file that went bad after `load`."""
    image, what = _read(file, shape)
    if what:
        raise DatasetError(
            f"{file}: {what}. Put a good picture in its place and go on with --resume; "
            f"`python prepare_dataset.py --check --data {file.parents[2]}` lists every broken one"
        )
    return image


def _read(path: Path, shape: tuple[int, int, int] | None) -> tuple[np.ndarray | None, str]:
    """The picture as uint8 [*shape] and "", or None and what is wrong; without `shape` only its header is read."""
    try:
        with reading(path) as image:
            return fit(as_rgba(image), *shape) if shape else None, ""
    except PictureError as error:
        return None, error.what


def fit(picture: Image.Image, height: int, width: int, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """An RGBA picture as uint8 [height, width, channels]: scaled to fit, centred, and padded.

    The padding is white, transparent where there are 4 channels. Colour is scaled premultiplied by alpha, so that what
    is hidden never bleeds into an edge, and a pixel that ends up fully transparent is white.
    """
    scale = min(width / picture.width, height / picture.height)
    w, h = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))

    share, planes = 1, []
    for name in "ARGB":  # one at a time and in place, as those of a large picture are large
        plane = np.array(picture.getchannel(name), np.float32)
        plane *= share
        planes.append(np.asarray(Image.fromarray(plane).resize((w, h), Image.Resampling.LANCZOS)))
        if name == "A":
            share = np.divide(plane, 255, out=plane)
    planes = np.stack(planes[1:] + planes[:1])
    left, top = (width - w) // 2, (height - h) // 2
    canvas = np.full((4, height, width), 255, np.float32)
    canvas[3] = 0
    inner = canvas[:, top : top + h, left : left + w]
    inner[:3] = (planes[:3] / np.maximum(planes[3], 1e-6) * 255).clip(0, 255)  # Lanczos overshoots in both alike
    inner[3] = planes[3].clip(0, 255)
    colour, alpha = canvas[:3], canvas[3]
    if channels == 4:
        colour[:, np.rint(alpha) == 0] = 255
        image = canvas.transpose(1, 2, 0)
    else:
        image = (colour * (alpha / 255) + (255 - alpha)).transpose(1, 2, 0)  # on white
    if channels == 1:
        image = np.ascontiguousarray(image) @ np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601 luma
    return np.rint(image).astype(np.uint8, order="C")


def collect(found: Found, images: np.ndarray | None, limit: int) -> tuple[list[tuple[Row, str]], list[Fault]]:
    """Write good pictures into `images`, until `limit` training rows have one; return the row and vendor of each."""
    kept, faults, trained = [], [], 0
    for row, pictures, more in found:
        faults += more
        for vendor, image in pictures.items():
            if images is not None:
                images[len(kept)] = image
            kept.append((row, vendor))
        trained += bool(pictures) and not row.heldout
        if 0 < limit == trained:
            break
    return kept, faults


def _allocate(root: Path, n: int, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """Room for n pictures, at a multiple of 64 bytes: on a CPU, JAX then uses it where it lies and copies nothing."""
    size = n * math.prod(shape)
    try:
        memory = np.empty(size + 63, np.uint8)
    except MemoryError:
        raise DatasetError(
            f"{root}: there is no room in memory for {n:,} pictures of {shape[0]} × {shape[1]}, {size / 2**30:.1f} "
            "GiB; leave them on the disk with --stream, or choose a smaller --H and --W or --MAX_INDEX"
        ) from None
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(n, *shape)


def _refuse(root: Path, rows: list[Row], chosen: list[str], kept: list[tuple[Row, str]], faults: list[Fault]) -> None:
    """Raise DatasetError where too much is broken, a vendor has no picture, or none is left to train on."""
    broken = [f"{where}: {what}" for where, what in faults if what != MISSING]
    n = len(kept) + len(broken)
    if len(broken) > MAX_BAD * n:
        raise DatasetError(
            f"{len(broken)} of {n} rows and pictures in {root} cannot be used; at most {MAX_BAD:.0%} may be faulty. "
            f"The first: {'; '.join(broken[:3])}. Mend or delete them; "
            f"`python prepare_dataset.py --check --data {root}` lists them all"
        )
    for vendor in [one for one in chosen if one not in {has for _, has in kept}]:
        its = [fault for fault in faults if fault.where.startswith((CSV, f"image/{vendor}/"))]
        first = f", the first fault: {its[0].where}: {its[0].what}" if its else ""
        raise DatasetError(
            f"{root} has no captioned picture for vendor {vendor} ({len(rows)} rows in {CSV}{first}). "
            f"Each row's picture is image/{vendor}/<#>.png"
        )
    if all(row.heldout for row, _ in kept):
        raise DatasetError(
            f"{root}: all {len(kept)} pictures are held out, none is left to train on; mend the column split of {CSV}"
        )


def _fingerprint(pictures: Pictures, *, pixels: bool) -> str:
    """SHA-256 of captions, `#`, keywords, split, and pixels; or of file names, so that a picture may be mended."""
    files = (f"{folder.name}/{index}.png" for folder, index in zip(pictures.folders, pictures.indexes, strict=True))
    what = pictures.images.shape if pixels else [*files]
    words = [what, pictures.names, pictures.indexes, pictures.keywords, pictures.heldout.tolist()]
    words += [pictures.others] if any(pictures.others) else []  # which sets of earlier checkpoints had not
    digest = hashlib.sha256(json.dumps(words).encode())
    if pixels:
        digest.update(pictures.images.reshape(-1))
    return digest.hexdigest()


def _training_first(pictures: Pictures) -> Pictures:
    """The same pictures, the held-out ones last: each side of the split is then a stretch of one array."""
    images, order = pictures.images, np.argsort(pictures.heldout, kind="stable")
    if images is not None:  # moved within their array, for there may be no room for another
        last = images[pictures.heldout]
        for place, row in enumerate(order[: len(order) - len(last)]):
            images[place] = images[row]
        images[len(order) - len(last) :] = last
    return select(pictures._replace(images=None), order)._replace(images=images)


def side(pictures: Pictures, *, heldout: bool) -> Pictures:
    """The pictures on one side of the split."""
    return select(pictures, np.flatnonzero(pictures.heldout == heldout))


def select(pictures: Pictures, rows) -> Pictures:
    """The pictures of these rows, not copied where they stand together; fingerprint and faults are those of all."""
    rows = np.asarray(rows, int)
    consecutive = len(rows) > 0 and (np.diff(rows) == 1).all()
    part = slice(rows[0], rows[-1] + 1) if consecutive else rows
    images = None if pictures.images is None else pictures.images[part]
    fields = ("names", "indexes", "folders", "keywords", "others")
    lists = {field: [getattr(pictures, field)[row] for row in rows] for field in fields}
    return pictures._replace(images=images, heldout=pictures.heldout[rows], **lists)


def check(root: Path) -> list[Fault]:
    """Every faulty row, then vendor by vendor every broken picture, and the first of each row that has none at all."""
    rows, present = read_rows(root), vendors(root)
    if not present:
        rows_faults = [row.fault for row in rows if row.fault]
        return [*rows_faults, Fault("image", "there is no folder of a vendor in it, such as image/Google")]
    faults = []
    for _, _, more in read_pictures(root, rows, present, (64, 64, 4)):
        absent = [fault for fault in more if fault.what == MISSING]
        faults += [fault for fault in more if fault.what != MISSING]
        faults += absent[:1] if len(absent) == len(present) else []
    return sorted(faults, key=lambda fault: fault.where.rpartition("/")[0])  # a row's has no folder, so comes first


def styled(name: str, vendor: str) -> str:
    """The caption of a vendor's picture where there are several vendors."""
    return f"{name}, {vendor} style"


def variants(pictures: Pictures) -> list[list[str]]:
    """Further captions of each picture, then at most VARIANTS from keywords that its name lacks; raises DatasetError.

    Of "face, joy, smile" for "cat" these are "cat, face", "joy" and "cat, smile", with the style of several vendors.
    """
    several = len(set(pictures.folders)) > 1
    found = []
    fields = (pictures.names, pictures.keywords, pictures.others, pictures.folders)
    for name, keywords, others, folder in zip(*fields, strict=True):
        name = name.removesuffix(styled("", folder.name)) if several else name
        words = {word.strip().lower(): word.strip() for word in keywords.split(",")}
        words = [word for lower, word in words.items() if lower not in name.lower()]
        count = min(VARIANTS, len(words))
        spread = [words[i * len(words) // count] for i in range(count)]
        texts = [*others, *(word if i % 2 else f"{name}, {word}" for i, word in enumerate(spread))]
        found.append([styled(text, folder.name) if several else text for text in texts])
    if not any(found):
        raise DatasetError(
            f"no picture to train on has a keyword beyond its name in {CSV}, and --caption_variants needs some: fill "
            'the column `keywords` (such as "face, happy, joy"), add rows with the same # and another caption, or '
            "train with --caption_variants 0"
        )
    return found
