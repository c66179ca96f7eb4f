"""A set of SVG icons from npm, drawn as pictures with the icons' names as captions.

Iconify packs some two hundred icon sets as `@iconify-json/<name>`: icons.json has the drawings, info.json the set's
authors and licence, metadata.json its categories, which become keywords. Another name of the same icon is a further
caption. Icons that a set has hidden are left out, and so are names that turn or mirror another icon.
"""

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dataset import DatasetError
from files import open_regular, parsed, printable
from images import save_png
from sources.packages import PackageError, fetch, npm
from sources.whole import making, report

NAME = re.compile(r"(?=.{1,100}\Z)[a-z0-9]+(-[a-z0-9]+)*")  # of sets and icons
WHERE = "https://icon-sets.iconify.design lists all sets; a set's name is the last part of its address"
SIZE = 128  # pixels
BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of an icon, where neither it nor its set says otherwise
LARGEST, MOST, LONGEST = 2**28, 100_000, 2**18  # bytes of a file, icons, letters of a drawing
FOREIGN = re.compile(r"<!|<\?|<image|href\s*=\s*[\"'](?!#)|url\(\s*[\"']?(?!#|[\"'])", re.IGNORECASE)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
    'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)


def prepare(root: Path, name: str) -> str:
    """Make a dataset of an icon set; returns its vendor. Raises DatasetError, and PackageError if it cannot be had."""
    if not NAME.fullmatch(name):
        raise DatasetError(f"{name!r} is not the name of an icon set, such as game-icons. {WHERE}")
    package = npm(f"@iconify-json/{name}", "latest", "")
    try:
        folder = fetch(package)
    except PackageError as error:
        raise PackageError(f"{error}. {WHERE}") from None
    whole, info, metadata, release = (_read(folder / f"{one}.json") for one in ("icons", "info", "metadata", "package"))
    prefix, icons = str(whole.get("prefix")), _dict(whole, "icons")
    if not NAME.fullmatch(prefix) or not 0 < len(icons) <= MOST:
        raise PackageError(f"{package}: its icons.json has no prefix, no icons, or more than {MOST:,} of them")
    about = [f"Icons of {package.name} (npm)", *_about(info or _dict(whole, "info"), str(release.get("version")))]
    print("\n".join(about[1:]))
    keywords, left_out, drawn = _keywords(metadata or whole), defaultdict(list), set()
    with making(root, prefix, about) as (place, rows):
        for icon, what in tqdm(icons.items(), desc=prefix, unit=" pictures", disable=None):
            try:
                if _dict(icons, icon).get("hidden"):
                    left_out["a hidden icon"].append(icon)
                    continue
                save_png(_drawn(icon, whole | what), place / f"{icon}.png", {"source": about[0]})
            except (ValueError, TypeError) as error:
                left_out["an icon that cannot be drawn"].append(f"{icon[:50]}: {error}")
            else:
                drawn.add(icon)
                rows.append({"#": icon, "name": icon.replace("-", " "), "keywords": ", ".join(keywords[icon])})
        aliases = _dict(whole, "aliases")
        for alias in filter(NAME.fullmatch, aliases):
            same = _dict(aliases, alias)
            if same.keys() == {"parent"} and str(same["parent"]) in drawn:
                rows.append({"#": same["parent"], "name": alias.replace("-", " "), "keywords": ""})
        report(left_out)
        if not rows:
            raise PackageError(f"{package} has no icon that can be drawn")
    return prefix


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file; raises PackageError."""
    if not file.exists():
        return {}
    try:
        with open_regular(file, LARGEST) as stream:
            found = parsed(stream.read())
    except ValueError as error:
        raise PackageError(f"{file} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _dict(whole: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within an object, empty where there is none."""
    return found if isinstance(found := whole.get(name), dict) else {}


def _about(info: dict[str, Any], version: str) -> list[str]:
    """The set's title, author and licence, in two lines."""
    author, licence = _dict(info, "author"), _dict(info, "license")
    lines = [
        f"{info.get('name', 'A set')} {version} by {author.get('name', 'unnamed authors')}, {author.get('url', '')}",
        f"Licence: {licence.get('title', 'not named, so ask before use')}, {licence.get('url', '')}",
    ]
    return [printable(line.removesuffix(", ")) for line in lines]


def _keywords(metadata: dict[str, Any]) -> defaultdict[str, list[str]]:
    """Icon -> the categories that it is in."""
    found = defaultdict(list)
    for category, icons in _dict(metadata, "categories").items():
        for icon in icons if isinstance(icons, list) else ():
            found[str(icon)].append(" ".join(category.replace(",", " ").split()))
    return found


def _drawn(name: str, icon: dict[str, Any]) -> Image.Image:
    """The icon on a transparent square; raises ValueError or TypeError."""
    import resvg_py  # only this and OpenMoji need it

    left, top, width, height = (float(icon.get(side, usual)) for side, usual in BOX.items())
    body = icon.get("body")
    if not NAME.fullmatch(name):
        raise ValueError("its name has other letters than a-z, 0-9 and -")
    if not isinstance(body, str) or len(body) > LONGEST or FOREIGN.search(body):
        raise ValueError(f"it has no drawing, or one of more than {LONGEST:,} letters, or one that needs other files")
    if not (max(abs(left), abs(top)) <= 1e6 and 0 < min(width, height) <= max(width, height) <= 1e6):
        raise ValueError(f"its box is {left:g}, {top:g}, {width:g}, {height:g}")
    svg = SVG.format(size=SIZE, left=left, top=top, width=width, height=height, body=body)
    picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")
    if picture.getbbox() is None:
        raise ValueError("it shows nothing")
    return picture
