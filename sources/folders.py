"""Pictures with captions in the two layouts that other trainers read, as a dataset in ours.

    photos/metadata.csv           Hugging Face's imagefolder: the columns `file_name` and `text`; also .jsonl, .parquet
    photos/cat.png, photos/cat.txt      a caption beside each picture; each further line is a further caption

Both may lie in any folder below, and both may occur: a text counts where no metadata name its picture. What is below
`test` or `validation` is held out. The dataset holds links to the pictures. Only a kind that the trainer does not read,
such as AVIF, is converted.
"""

import csv
import io
import os
import shutil
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from dataset import CSV, DatasetError
from files import open_regular, parsed, printable, sha256
from images import READABLE, PictureError, as_rgba, reading, save_png
from sources.whole import making, report

VENDOR = "mine"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
HELDOUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}  # folders, as imagefolder's
LARGEST_TABLE, LARGEST_TEXT = 2**30, 2**20  # bytes

CONVERTED = ("AVIF", "ICO", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI", "TGA")  # EPS would start another program
LINKED = (*READABLE, "MPO")  # MPO: a JPEG with a second picture behind the first
ENDINGS = {end for end, kind in Image.registered_extensions().items() if kind in READABLE + CONVERTED}
KINDS = READABLE + tuple(kind for kind in CONVERTED if kind in Image.OPEN)  # a Pillow may lack some

LeftOut = defaultdict[str, list[str]]  # reason -> names
Captions = dict[str, list[str]]  # a picture's path below the folder -> its captions


def prepare(root: Path, folder: Path, column: str) -> str:
    """Make a dataset of the captioned pictures below `folder`; returns its vendor. Raises DatasetError."""
    root, folder = root.resolve(), folder.resolve()
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}")
    if root == folder:
        raise DatasetError(f"{folder} is only read; name another folder in --data")
    if (folder / CSV).exists():
        raise DatasetError(f"{folder} has a {CSV}, so it is a dataset already: train with --data {folder}")
    left_out = defaultdict(list)
    with making(root, VENDOR, [f"Pictures and captions of {printable(str(folder))}"]) as (place, rows):
        captions = _tidy(_captions(folder, _names(folder, root, left_out), column, left_out), left_out)
        rows += _placed(folder, captions, place, left_out)
        report(left_out)
        if not rows:
            raise DatasetError(
                f"{folder} has no captioned picture. A caption is a row of metadata.csv with columns file_name and "
                f"{column}, or the text of cat.txt beside cat.png"
            )
    return VENDOR


def _names(folder: Path, root: Path, left_out: LeftOut) -> list[str]:
    """The path of every file below `folder`, sorted; but hidden ones, and those of a dataset that is made in there."""
    found = []
    for place, folders, names in os.walk(folder, onerror=lambda e: left_out["a closed folder"].append(e.filename)):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(place, name) != root]
        found += [os.path.relpath(Path(place, name), folder) for name in names if not name.startswith(".")]
    return sorted(found)


def _captions(folder: Path, names: list[str], column: str, left_out: LeftOut) -> Captions:
    """The captions of every picture as they are written: in metadata, or else in a text beside it."""
    captions = {name: [] for name in names if Path(name).suffix.lower() in ENDINGS}
    for table in (name for name in names if Path(name).name in METADATA):
        for row in _rows(folder / table, column):
            where = f"{row.get('file_name')} in {table}"
            path = PurePosixPath(table).parent / str(row.get("file_name"))
            if None in row:
                left_out["a row with a comma too many, for want of quotation marks"].append(where)
            elif path.is_absolute() or ".." in path.parts:
                left_out["a file outside of the folder"].append(where)
            elif str(path) in captions or os.path.isfile(folder / path):
                captions.setdefault(str(path), []).extend(_texts(row.get(column)))
            else:
                left_out["no such file"].append(where)
    present = set(names)
    for name, texts in captions.items():
        if not texts and (beside := str(Path(name).with_suffix(".txt"))) in present:
            try:
                with open_regular(folder / beside, LARGEST_TEXT) as stream:
                    lines = stream.read().decode("utf-8-sig").splitlines()
                texts += [line for line in lines if line.strip()] or [""]
            except (OSError, UnicodeDecodeError) as error:
                what = getattr(error, "strerror", None) or "it is not UTF-8"
                left_out["a caption that cannot be read"].append(f"{beside}: {what}")
    return captions


def _rows(table: Path, column: str) -> list[dict[str | None, Any]]:
    """The rows of a metadata file, those of a CSV with further fields under None; raises DatasetError."""
    try:
        with open_regular(table, LARGEST_TABLE) as stream:
            if table.suffix == ".parquet":
                rows = pd.read_parquet(stream).to_dict("records")
            elif table.suffix == ".csv":
                text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
                rows = [*csv.DictReader(text, skipinitialspace=True)]
            else:
                rows = [_object(line, number) for number, line in enumerate(stream, 1) if line.strip()]
    except ImportError:
        raise DatasetError(f"to read {table}, Python needs another package: pip install pyarrow") from None
    except (ValueError, csv.Error) as error:
        raise DatasetError(f"{table} cannot be read: {error}") from None
    columns = dict.fromkeys(name for row in rows for name in row if name)
    for needed in ("file_name", column) if rows else ():
        if needed not in columns:
            hint = "" if needed == "file_name" else "; name that of the captions with --caption_column"
            raise DatasetError(f"{table} has no column {needed}, it has {', '.join([*columns][:12])}{hint}")
    return rows


def _object(line: bytes, number: int) -> dict[str, Any]:
    """What a line of JSON says; ValueError if that is no object."""
    try:
        if isinstance(found := parsed(line), dict):
            return found
    except ValueError:
        pass
    raise ValueError(f'its line {number} is no object such as {{"file_name": "cat.png", "text": "a cat"}}')


def _texts(value: Any) -> list[str]:
    """What a cell holds: one caption or a list of them; "" for none."""
    several = value if isinstance(value, list | tuple | np.ndarray) else [value]
    return ["" if one is None or one != one else str(one) for one in several]  # NaN alone differs from itself


def _tidy(captions: Captions, left_out: LeftOut) -> Captions:
    """The pictures that have a caption, sorted, with each of their captions once and on one line."""
    kept = {}
    for name, texts in sorted(captions.items()):
        tidy = [" ".join(text.encode(errors="replace").decode().split()) for text in texts]
        good = [text for text in tidy if text]
        kept[name] = [*dict.fromkeys(good)]
        if not tidy:
            left_out["a picture without a caption"].append(name)
        if len(good) < len(tidy):
            left_out["an empty caption"].append(name)
        if len(kept[name]) < len(good):
            left_out["a caption given twice"].append(name)
    return {name: texts for name, texts in kept.items() if texts}


def _placed(folder: Path, captions: Captions, place: Path, left_out: LeftOut) -> list[dict[str, str]]:
    """Put each picture into `place`, the first of equal ones only; returns the rows of the CSV."""
    targets = [place / f"{number}.png" for number in range(1, len(captions) + 1)]
    pool, kept = ThreadPoolExecutor(4), {}
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's advice about odd files
            found = pool.map(_put, [folder / name for name in captions], targets)
            found = [*tqdm(found, total=len(captions), desc=folder.name, unit=" pictures", disable=None)]
    finally:
        pool.shutdown(cancel_futures=True)
    for (name, texts), target, (digest, what) in zip(captions.items(), targets, found, strict=True):
        if what:
            left_out["a picture that cannot be read"].append(f"{name}: {what}")
        elif digest in kept:
            first, its, _ = kept[digest]
            its += [text for text in texts if text not in its]
            left_out["a picture there twice, the first got its captions"].append(f"{name} is {first}")
            target.unlink()
        else:
            kept[digest] = name, texts, target.stem
    rows = []
    for name, texts, number in kept.values():
        split = "train" if HELDOUT.isdisjoint(name.split("/")[:-1]) else "heldout"
        rows += [{"#": number, "name": text, "split": split, "file": printable(name)} for text in texts]
    return rows


def _put(source: Path, target: Path) -> tuple[str, str]:
    """Put the picture of `source` where the trainer reads it; its SHA-256 and "", or "" and what is wrong with it."""
    try:
        with reading(source, KINDS) as image:
            linked, rgba = image.format in LINKED, as_rgba(image)
    except PictureError as error:
        return "", error.what
    if linked:
        _link(source.resolve(), target)
    else:
        save_png(rgba, target)
    return sha256(source), ""


def _link(source: Path, target: Path) -> None:
    """A hard link, or where that cannot be, as on another disk, a symbolic one, or a copy."""
    for link in (os.link, os.symlink):
        with suppress(OSError):
            return link(source, target)
    shutil.copyfile(source, target)
