"""A folder of pictures and a CSV of captions, as arrays.

The layout is that of the Kaggle emoji set, and of anybody's own pictures:

    <root>/full_emoji.csv              columns `#` and `name`; `keywords` and `split` if there are any; others ignored
    <root>/image/<vendor>/<#>.png      any size and mode; `#` is any file name, not only a number

Pictures keep their proportions: they are scaled to fit [height, width] and padded with white, or with transparency
where there are 4 channels. Colour is scaled premultiplied by alpha, so that what is hidden never bleeds into an edge,
and a pixel that ends up fully transparent is white. Decoded pictures are cached by content, a block of rows at a time,
and gathered in one array, which neither the split nor a CPU's training copies.

Several vendors at once, "Google+OpenMoji", give several pictures to a row; each caption then names its vendor, as in
"red heart, OpenMoji style". A row is held out for all of them or for none.

Real sets have faults, so a faulty row or picture is left out and reported; only too many of them, or nothing left,
is an error. A missing picture is reported too but is no reason to stop: few vendors draw every emoji.
"""

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from PIL import Image, ImageOps

from files import cached
from params import Params

CSV, MISSING = "full_emoji.csv", "there is no such file"
COLUMNS = ("#", "name", "keywords", "split")
LARGEST = 4096 * 4096  # pixels of a picture; a decompression bomb has more
VARIANTS = 4  # other captions of a picture, made from its keywords
BLOCK = 512  # rows decoded and cached together
PART = 32  # of them, by one thread at a stretch
FORMAT = 1  # of the cache; any change of what decoding gives needs another number
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class DatasetError(ValueError):
    """The data cannot be used: the message says what is wrong, where, and what to do."""


class Fault(NamedTuple):
    where: str  # "full_emoji.csv row 13, column name" as a spreadsheet counts, or "image/Google/13.png"
    what: str


class Pictures(NamedTuple):
    images: np.ndarray | None  # uint8 [N, H, W, C]; None where they stay on the disk
    names: list[str]  # the captions
    indexes: list[str]  # the `#` of each: the same for every vendor's picture of one row, and these stand together
    folders: list[Path]  # of each, its vendor's; not a hundred thousand whole paths
    keywords: list[str]  # "face, happy, joy", or ""
    heldout: np.ndarray  # bool [N]
    faults: list[Fault]
    fingerprint: str  # SHA-256 of all of the above but the folders; of files' names where pictures stay on the disk

    def file(self, row: SupportsIndex) -> Path:
        return self.folders[row] / f"{self.indexes[row]}.png"


class Row(NamedTuple):
    index: str
    name: str
    keywords: str
    heldout: bool
    fault: Fault | None


def load(
    root: Path,
    *,
    vendor: str,
    limit: int,
    height: int,
    width: int,
    channels: int,
    max_bad: float = 0.05,
    decode: bool = True,
) -> Pictures:
    """The captioned pictures of a vendor, or of several joined by "+", in the order of the CSV.

    `limit` > 0 keeps the first `limit` training rows that have a picture, and the held-out ones before the last of
    these. Without `decode` no more than the header of a picture is read, and `images` is None.
    Raises DatasetError where more than `max_bad` of the rows and pictures looked at are broken, or a vendor has none
    that is good.
    """
    if channels not in (1, 3, 4):
        raise ValueError(f"channels is {channels}; a picture has 1 (grey), 3 (RGB) or 4 (RGB and alpha)")
    if height < 1 or width < 1 or limit < 0:
        raise ValueError(f"height and width are at least 1 and limit at least 0, got {height}, {width} and {limit}")
    rows, wanted, shape = _rows(root), _wanted(root, vendor), (height, width, channels)
    most = min(len(rows), limit + sum(row.heldout for row in rows)) if limit else len(rows)
    try:
        images = _room(most * len(wanted), shape) if decode else None
    except MemoryError:
        size = most * len(wanted) * math.prod(shape) / 2**30
        raise DatasetError(
            f"{root}: there is no room in memory for {most * len(wanted):,} pictures of {height} × {width}, "
            f"{size:.1f} GiB; leave them on the disk with --stream, or choose a smaller --H and --W or --MAX_INDEX"
        ) from None
    kept, faults, looked_at, trained = [], [], 0, 0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        named = [row.index for row in block if not row.fault]
        found = [_read(root, one, named, shape, decode) for one in wanted]
        for row in block:
            if row.fault:
                faults.append(row.fault)
                looked_at += 1
                continue
            before = len(kept)
            for one, (image, what) in zip(wanted, map(next, found), strict=True):
                looked_at += what != MISSING
                if what:
                    faults.append(Fault(f"image/{one}/{row.index}.png", what))
                    continue
                if decode:
                    images[len(kept)] = image
                kept.append((row, one))
            trained += len(kept) > before and not row.heldout
            if 0 < limit == trained:
                break
        if 0 < limit == trained:
            break
    broken = [fault for fault in faults if fault.what != MISSING]
    if broken and len(broken) > max_bad * looked_at:
        first = "; ".join(f"{where}: {what}" for where, what in broken[:3])
        raise DatasetError(
            f"{len(broken)} of {looked_at} rows and pictures in {root} cannot be used, which is more than "
            f"--max_bad {max_bad:g} allows. The first: {first}. See all with "
            f"`python prepare_dataset.py --check --data {root}`; mend or delete them, or raise --max_bad"
        )
    for one in wanted:
        if one not in {vendor for _, vendor in kept}:
            its = [fault for fault in faults if fault.where.startswith((CSV, f"image/{one}/"))]
            first = f", the first fault: {its[0].where}: {its[0].what}" if its else ""
            raise DatasetError(
                f"{root} has no captioned picture for vendor {one} ({len(rows)} rows in {CSV}{first}). "
                f"Each row's picture is image/{one}/<#>.png"
            )
    if not trained:
        raise DatasetError(
            f"{root}: all {len(kept)} pictures are held out, none is left to train on; mend the column split of {CSV}"
        )
    names = [styled(row.name, one) if len(wanted) > 1 else row.name for row, one in kept]
    indexes, keywords = [row.index for row, _ in kept], [row.keywords for row, _ in kept]
    folder = {one: root / "image" / one for one in wanted}
    folders = [folder[one] for _, one in kept]
    heldout = np.array([row.heldout for row, _ in kept])
    images = images[: len(kept)] if decode else None
    pictures = Pictures(images, names, indexes, folders, keywords, heldout, faults, "")
    return pictures._replace(fingerprint=_fingerprint(pictures, pixels=decode))


def from_config(config: Params, root: Path | None = None, *, decode: bool = True) -> Pictures:
    """The pictures that a configuration names, those to train on first; `root` where the dataset has moved.

    Raises as `load`.
    """
    size = {"height": config.H, "width": config.W, "channels": config.CHANNELS}
    where = root or Path(config.data)
    options = {"limit": config.MAX_INDEX, "max_bad": 0.05, "decode": decode, **size}
    pictures = load(where, vendor=config.vendor, **options)
    if config.stream and decode:  # recognise what a run that streamed was trained on
        pictures = pictures._replace(fingerprint=_fingerprint(pictures, pixels=False))
    return _training_first(pictures)


def _training_first(pictures: Pictures) -> Pictures:
    """The same pictures, the held-out ones last: each side of the split is then a stretch of one array.

    They are moved within that array, for there may be no room for another.
    """
    images, train, held = pictures.images, *(np.flatnonzero(pictures.heldout == side) for side in (False, True))
    if images is not None:
        last = images[held]
        for start in range(0, len(train), BLOCK):  # only ever towards the front, so that none is lost
            rows = train[start : start + BLOCK]
            images[start : start + len(rows)] = images[rows]
        images[len(train) :] = last
    return select(pictures._replace(images=None), np.concatenate([train, held]))._replace(images=images)


def side(pictures: Pictures, *, heldout: bool) -> Pictures:
    """The pictures on one side of the split."""
    return select(pictures, np.flatnonzero(pictures.heldout == heldout))


def select(pictures: Pictures, rows) -> Pictures:
    """The pictures of these rows; the fingerprint and the faults stay those of the whole.

    Rows that stand together are not copied: `images` is then a part of the same array.
    """
    rows = np.asarray(rows, int)
    together = len(rows) > 0 and (np.diff(rows) == 1).all()
    part = slice(rows[0], rows[-1] + 1) if together else rows
    images = None if pictures.images is None else pictures.images[part]
    fields = ("names", "indexes", "folders", "keywords")
    lists = {field: [getattr(pictures, field)[row] for row in rows] for field in fields}
    return pictures._replace(images=images, heldout=pictures.heldout[rows], **lists)


def styled(name: str, vendor: str) -> str:
    """The caption of a vendor's picture where there are several vendors."""
    return f"{name}, {vendor} style"


def variants(pictures: Pictures) -> list[list[str]]:
    """Other captions of each picture, at most VARIANTS, from keywords that its name does not have.

    Of "face, joy, smile" for "cat" these are "cat, face", "joy" and "cat, smile"; with several vendors each says whose
    style it is. Raises DatasetError where no picture has a keyword.
    """
    several = len(set(pictures.folders)) > 1
    found = []
    for name, keywords, folder in zip(pictures.names, pictures.keywords, pictures.folders, strict=True):
        name = name.removesuffix(styled("", folder.name)) if several else name
        words = {word.strip().lower(): word.strip() for word in keywords.split(",")}
        words = [word for lower, word in words.items() if lower not in name.lower()]
        count = min(VARIANTS, len(words))
        spread = [words[i * len(words) // count] for i in range(count)]
        texts = [word if i % 2 else f"{name}, {word}" for i, word in enumerate(spread)]
        found.append([styled(text, folder.name) if several else text for text in texts])
    if not any(found):
        raise DatasetError(
            f"no picture to train on has a keyword beyond its name in {CSV}, and --caption_variants needs some: fill "
            'the column `keywords` (such as "face, happy, joy"), or train with --caption_variants 0'
        )
    return found


def decoded(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """The picture in a file as uint8 [*shape]; raises DatasetError, as of a file that went bad after `load`."""
    image = _fitted(file, shape)
    if isinstance(image, str):
        raise DatasetError(
            f"{file}: {image}. Put a good picture in its place and go on with --resume; "
            f"`python prepare_dataset.py --check --data {file.parents[2]}` lists every broken one"
        )
    return image


def _fingerprint(pictures: Pictures, *, pixels: bool) -> str:
    """SHA-256 of captions, `#`, keywords, split and pixels; without `pixels` of the files' names in their stead.

    The latter decodes nothing, and stays the same where a broken picture was replaced by a good one.
    """
    names = (f"{folder.name}/{index}.png" for folder, index in zip(pictures.folders, pictures.indexes, strict=True))
    of = pictures.images.shape if pixels else [*names]
    words = json.dumps([of, pictures.names, pictures.indexes, pictures.keywords, pictures.heldout.tolist()])
    digest = hashlib.sha256(words.encode())
    if pixels:
        digest.update(pictures.images.reshape(-1))
    return digest.hexdigest()


def check(root: Path) -> list[Fault]:
    """Every faulty row, every broken picture of every vendor, and every row that no vendor has a picture for."""
    rows, present = _rows(root), vendors(root)
    faults = [row.fault for row in rows if row.fault]
    if not present:
        return [*faults, Fault("image", "there is no folder of a vendor in it, such as image/Google")]
    for row in (row for row in rows if not row.fault):
        files = [root / "image" / vendor / f"{row.index}.png" for vendor in present]
        if not any(file.is_file() for file in files):
            faults.append(Fault(f"image/{present[0]}/{row.index}.png", MISSING))
    for vendor in present:
        files = _files(root, vendor, [row.index for row in rows if not row.fault])
        found = _each(lambda file: what if isinstance(what := _picture(file), str) else "", files)
        faults += [
            Fault(f"image/{vendor}/{file.name}", what)
            for file, what in zip(files, found, strict=True)
            if what not in ("", MISSING)
        ]
    return faults


def vendors(root: Path) -> list[str]:
    """Names of the folders of pictures in a dataset."""
    folder = root / "image"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _wanted(root: Path, vendor: str) -> list[str]:
    """The vendors that "Google+OpenMoji" names; a folder of exactly that name is one vendor."""
    present = vendors(root)
    wanted = [vendor] if vendor in present else vendor.split("+")
    for one in wanted:
        if one not in present:
            among = f" (of --vendor {vendor})" if len(wanted) > 1 else ""
            raise DatasetError(
                f"{root / 'image'} has no folder {one!r}{among}; it has {', '.join(present) or 'no vendor at all'}. "
                f"Choose one with --vendor, or put pictures into {root / 'image' / (one or '<vendor>')}"
            )
    if len(set(wanted)) < len(wanted):
        raise DatasetError(f"--vendor {vendor} names one vendor twice; name each once")
    return wanted


# The CSV.


def _rows(root: Path) -> list[Row]:
    """Each row that is not wholly empty, with what is wrong with it if anything is."""
    import pandas as pd  # a quarter of a second, which drawing does not need

    path = root / CSV
    if not path.is_file():
        what = f"{root} has no {CSV}" if root.is_dir() else f"there is no folder {root}"
        raise DatasetError(f"{what}; make one with `python prepare_dataset.py --data {root}`, or see its --help")
    try:
        header = [str(name).strip() for name in pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns]
        absent = [f"`{name}`" for name in ("#", "name") if name not in header]
        if absent:
            found = ", ".join(f"`{name}`" for name in header[:20])
            raise DatasetError(f"{path} lacks the column {' and '.join(absent)} in its first row; it has {found}")
        table = pd.read_csv(
            path,
            usecols=[header.index(name) for name in COLUMNS if name in header],  # never the megabytes of base64
            index_col=False,
            dtype=str,
            keep_default_na=False,  # "NA" and "null" are words
            skip_blank_lines=False,  # a spreadsheet counts them
            encoding="utf-8-sig",
        )
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except pd.errors.EmptyDataError:
        raise DatasetError(f"{path} is empty; its first row must name the columns `#` and `name`") from None
    except pd.errors.ParserError as error:
        raise DatasetError(f"{path} is not a proper CSV file: {error}; is a quotation mark or a comma amiss?") from None
    table.columns = table.columns.str.strip()
    table = table.fillna("")
    columns = [table[name] if name in table else [""] * len(table) for name in COLUMNS]
    rows, first_with = [], {}
    for number, fields in enumerate(zip(*columns, strict=True), start=2):  # the header is a spreadsheet's row 1
        index, name, keywords, split = (" ".join(field.split()) for field in fields)
        if not (index or name or keywords or split):
            continue
        index = re.sub(r"^(\d+)\.0+$", r"\1", index)  # a spreadsheet or pandas made a number of it
        name = name.removeprefix("⊛").strip()  # Unicode's mark of a new emoji
        fault = None
        if not index:
            fault = "#", "empty; it must be the name of the picture's file without .png"
        elif re.search(r"[/\\\0]", index) or index in (".", ".."):
            fault = "#", f"{index!r} is not the name of a file"
        elif index in first_with:
            fault = "#", f"{index!r} is already the # of row {first_with[index]}"
        elif not name:
            fault = "name", "empty; it must be the picture's caption"
        elif split.lower() not in ("", "train", "heldout"):
            fault = "split", f"{split!r} is neither train nor heldout"
        first_with.setdefault(index, number)
        fault = fault and Fault(f"{CSV} row {number}, column {fault[0]}", fault[1])
        rows.append(Row(index, name, keywords, split.lower() == "heldout", fault))
    return rows


# The pictures.


def _read(
    root: Path, vendor: str, indexes: list[str], shape: tuple[int, int, int], decode: bool
) -> Iterator[tuple[np.ndarray | None, str]]:
    """Each picture and what is wrong with it, or ""; without `decode` only what its header tells."""
    files = _files(root, vendor, indexes)
    if decode:
        return zip(*_decoded(files, shape), strict=True)
    found = _each(lambda file: _picture(file, whole=False), files)
    return iter([(None, what if isinstance(what, str) else "") for what in found])


def _decoded(files: list[Path], shape: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    """uint8 [n, *shape], zero where there is a fault, and what each fault is or ""; from the cache if it is there."""

    def decode() -> dict[str, np.ndarray]:
        results = _each(lambda file: _fitted(file, shape), files)
        blank = np.zeros(shape, np.uint8)
        images = [blank if isinstance(result, str) else result for result in results]
        what = [result if isinstance(result, str) else "" for result in results]
        return {"images": np.array(images, np.uint8).reshape(-1, *shape), "what": np.array(what, str)}

    arrays = cached("pictures", json.dumps([FORMAT, shape, _each(_digest, files)]), decode)
    return arrays["images"], arrays["what"].tolist()


def _files(root: Path, vendor: str, indexes: list[str]) -> list[Path]:
    folder = root / "image" / vendor
    return [folder / f"{index}.png" for index in indexes]


def _each(function: Callable[[Path], Any], files: list[Path]) -> list:
    """The function of each file, by a few threads; a task for every file would cost as much as reading it."""
    parts = [files[start : start + PART] for start in range(0, len(files), PART)]
    with _quiet(), ThreadPoolExecutor(4) as pool:
        return [result for part in pool.map(lambda part: [*map(function, part)], parts) for result in part]


def _room(n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, *shape], not yet written to, which takes no memory until it is.

    It begins at a multiple of 64 bytes: on a CPU, JAX then uses it where it lies instead of copying it.
    """
    size = n * math.prod(shape)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(n, *shape)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return type(error).__name__


def _quiet() -> warnings.catch_warnings:
    """Silence Pillow's advice about odd files, which become faults; filters are per process, so not inside a thread."""
    return warnings.catch_warnings(action="ignore")


def _picture(path: Path, *, whole: bool = True) -> Image.Image | str:
    """The decoded picture upright in RGBA, or what is wrong with it; unless `whole`, only its header is read."""
    try:
        file = io.BytesIO(path.read_bytes()) if whole else path.open("rb")
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    with file:
        return _image(file, whole)


def _image(file: io.BufferedIOBase, whole: bool) -> Image.Image | str:
    try:
        if not file.read(1):
            return "the file is empty"
        image = Image.open(file, formats=READABLE)
        if image.width * image.height > LARGEST:
            return f"{image.width}x{image.height} is gigantic; at most {LARGEST} pixels are read"
        if not whole:
            return image
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
        return image.convert("RGBA")
    except Image.UnidentifiedImageError:
        return f"not a picture (none of {', '.join(READABLE)})"
    except Image.DecompressionBombError:
        return f"gigantic; at most {LARGEST} pixels are read"
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        return f"a damaged picture: {error}"


def _fitted(path: Path, shape: tuple[int, int, int]) -> np.ndarray | str:
    picture = _picture(path)
    return picture if isinstance(picture, str) else fit(picture, *shape)


def fit(picture: Image.Image, height: int, width: int, channels: int) -> np.ndarray:
    """An RGBA picture as uint8 [height, width, channels]: scaled to fit, centred and padded."""
    planes = np.asarray(picture).transpose(2, 0, 1).astype(np.float32, order="C")
    planes[:3] *= planes[3] / 255
    scale = min(width / picture.width, height / picture.height)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if inner != picture.size:
        planes = _resized(planes, *inner)
    colour, alpha = planes[:3], planes[3]
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas = np.full((4, height, width), 255, np.float32)
    canvas[3] = 0
    within = canvas[:, top : top + inner[1], left : left + inner[0]]
    within[:3] = (colour / np.maximum(alpha, 1e-6) * 255).clip(0, 255)  # where one rings, so does the other
    within[3] = alpha.clip(0, 255)
    colour, alpha = canvas[:3], canvas[3]
    if channels == 4:
        colour[:, np.rint(alpha) == 0] = 255
        image = canvas.transpose(1, 2, 0)
    else:
        image = (colour * (alpha / 255) + (255 - alpha)).transpose(1, 2, 0)
    if channels == 1:
        image = np.ascontiguousarray(image) @ np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601 luma
    return np.rint(image).astype(np.uint8, order="C")


def _resized(planes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Float planes [4, h, w] scaled to [4, height, width]: all rows of all planes at once, then all columns."""
    n, h, w = planes.shape
    across = Image.fromarray(planes.reshape(n * h, w)).resize((width, n * h), Image.Resampling.LANCZOS)
    beside = np.asarray(across).reshape(n, h, width).swapaxes(0, 1).reshape(h, n * width)
    down = Image.fromarray(beside).resize((n * width, height), Image.Resampling.LANCZOS)
    return np.asarray(down).reshape(height, n, width).swapaxes(0, 1)
