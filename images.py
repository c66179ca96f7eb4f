"""Pictures as files and as arrays: any file read as sRGB, grids, PNG and GIF written, bytes to [-1, 1] and back.

`reading` opens a file that may be anything, and `as_rgba` makes eight bits of sRGB and alpha of what is in it.

A grid is `columns` cells wide. Each cell shows one picture, enlarged or reduced to fit `cell` pixels, and its caption
in quiet grey on at most two lines below. What is transparent shows the white below.
"""

import errno
import io
import threading
import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from files import open_regular, replacing

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LARGEST = 2**25  # pixels of a picture; a decompression bomb has more
WHOLE = 2**24  # a JPEG of more pixels is decoded at a half, a quarter or an eighth of its size
SMALL = 2**21  # of pictures with more pixels, one is read at a time, as a pixel takes up to 24 bytes
MISSING = "there is no such file"

LETTERS = 1000  # of a caption, more than two lines of a cell can hold; the rest is cut first
GREY = (110, 110, 115)  # of the captions


class PictureError(ValueError):
    """There is no picture that can be read; `what` says why without the file's name."""

    def __init__(self, what: str, path: Path | None = None):
        super().__init__(f"{path}: {what}" if path else what)
        self.what = what


_one_at_a_time = threading.Lock()


@contextmanager
def reading(path: Path, kinds: Sequence[str] = READABLE) -> Iterator[Image.Image]:
    """The picture in a file, of which only the header is read so far; raises PictureError, also within the block."""
    start = b""
    try:
        with open_regular(path, 8 * LARGEST) as file:
            if not (start := file.read(4)):
                raise PictureError("the file is empty")
            image = Image.open(file, formats=kinds)
            by = next((by for by in (1, 2, 4) if image.width * image.height <= WHOLE * by**2), 8)
            image.draft(None, (image.width // by, image.height // by))  # nothing happens but to a JPEG
            if (pixels := image.width * image.height) > LARGEST:
                raise PictureError(f"{image.width}x{image.height} is gigantic; at most {LARGEST} pixels are read")
            with _one_at_a_time if pixels > SMALL else nullcontext():
                yield image
            return
    except PictureError as error:
        what = error.what
    except FileNotFoundError:
        what = MISSING
    except Image.UnidentifiedImageError:
        known = start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*"))
        what = "a damaged picture: its header is broken" if known else f"not a picture (none of {', '.join(kinds)})"
    except MemoryError:  # not a fault of the picture, nor is the next one
        raise OSError(errno.ENOMEM, "there is no room in memory for it", str(path)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file, but without `strerror`
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise
        system, large = getattr(error, "strerror", None), "MAX_TEXT" in str(error)
        why = "a text or colour profile in it is gigantic; save it again without" if large else error
        what = f"cannot be read: {system}" if system else f"a damaged picture: {why}"
    raise PictureError(what, path)


def load_picture(path: Path) -> Image.Image:
    """The picture in a file, whole, of whatever mode; raises PictureError."""
    with reading(path) as image:
        image.load()
    return image


def as_rgba(image: Image.Image) -> Image.Image:
    """A picture the right way up, in eight bits of sRGB and alpha; PictureError where its colours cannot be told."""
    raw = next((tile[3] for tile in getattr(image, "tile", ())), "")  # how a file's pixels are stored
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits, 262 what is white, 339 kind of number
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    profile, transparent = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode in ("I", "F", "LAB", "HSV") or {*tags.get(339, ())} - {1, 4}:
        raise PictureError(f"pixels of the kind {image.mode} are not converted; save it with 8 or 16 bits and no sign")
    if raw == "RGB;16B" and transparent is not None:  # Pillow keeps eight of the bits, too few to find that colour
        raise PictureError("one of its colours of 16 bits is transparent; save it with an alpha channel")
    if raw in ("L;2", "L;4") and transparent is not None:  # Pillow scales the pixels, not the transparent grey
        image.info["transparency"] = transparent * (85 if raw == "L;2" else 17)
    if image.mode.startswith("I;16"):  # Pillow would clip it
        values, top = np.asarray(image), 2 ** tags.get(258, (16,))[0] - 1
        grey = np.rint(values.astype(np.float32) / (top / 255)).astype(np.uint8)
        alpha = np.full(grey.shape, 255, np.uint8) if transparent is None else 255 * (values != transparent)
        planes = (255 - grey if tags.get(262) == 0 else grey, alpha.astype(np.uint8))
        image = Image.merge("LA", [*map(Image.fromarray, planes)])
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if profile is None:
        return rgba
    kind = "L" if image.mode in ("1", "L", "LA") else image.mode if image.mode == "CMYK" else "RGB"
    space, transform = _to_srgb(profile, kind)
    if transform is None:
        return rgba
    plain = image if space == "CMYK" else rgba.getchannel("R") if space == "L" else rgba.convert("RGB")
    converted = ImageCms.applyTransform(plain, transform)
    converted.putalpha(rgba.getchannel("A"))
    return converted


@lru_cache(16)
def _to_srgb(profile: bytes, kind: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a colour profile is for and the way to sRGB, None where no colour changes by more than rounding."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L"}.get(found := source.profile.xcolor_space.strip(), found)
        if space != kind and (space, kind) != ("RGB", "L"):
            raise PictureError(f"its colour profile is for {found}, its pixels are {kind}; save it in sRGB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), space, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise PictureError(f"its colour profile cannot be used ({error}); save it in sRGB") from None
    if space == "CMYK":
        return space, transform
    grid = np.indices((18,) * 3, np.uint8).reshape(3, 18, -1).transpose(1, 2, 0) * 15
    sample = Image.fromarray(np.ascontiguousarray(grid)) if space == "RGB" else Image.linear_gradient("L")
    change = np.asarray(ImageCms.applyTransform(sample, transform), int) - np.asarray(sample.convert("RGB"), int)
    return space, (transform if abs(change).max() > 2 else None)


def captioned_grid(
    images: np.ndarray | Sequence[Image.Image], captions: Sequence[str], *, columns: int, cell: int
) -> Image.Image:
    """One RGB picture of all `images` (uint8 [N, H, W, C] with C of 1, 3, 4, or Pillow's own), row by row."""
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"a grid needs a caption for each picture, got {len(captions)} for {len(images)} pictures")
    if columns < 1 or cell < 8:
        raise ValueError(f"a grid needs columns >= 1 and cell >= 8 pixels, got columns={columns}, cell={cell}")
    font = ImageFont.load_default(max(9, round(cell / 8)))
    gap = max(4, round(cell / 6))
    line = round(font.size * 1.25)
    texts = [wrapped(caption, font, width=cell + gap // 2) for caption in captions]
    below = gap // 2 + line * max(map(len, texts))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = cell + gap, cell + below + gap
    grid = Image.new("RGB", (gap + columns * step_x, gap + rows * step_y), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        grid.paste(_fitted(image if isinstance(image, Image.Image) else as_picture(image), cell), (left, top))
        for row, text in enumerate(lines):
            middle = (left + cell / 2, top + cell + gap // 2 + row * line)
            draw.text(middle, text, font=font, fill=GREY, anchor="ma")
    return grid


def as_picture(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a Pillow image: C of 1 is grey, 3 is RGB, 4 is RGBA."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"a picture is uint8 [H, W, 1, 3 or 4], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def wrapped(text: str, font: ImageFont.FreeTypeFont, *, width: float, most: int = 2) -> list[str]:
    """`text` in at most `most` lines that are each at most `width` pixels long; what does not fit becomes "…"."""
    words, lines = _plain(text[:LETTERS]).split(), []
    while words and len(lines) < most:
        fitting = bisect(range(1, len(words)), width, key=lambda n: font.getlength(" ".join(words[: n + 1])))
        line, words = " ".join(words[: 1 + fitting]), words[1 + fitting :]
        if font.getlength(line) > width or (words and len(lines) == most - 1):
            letters = bisect(range(1, len(line) + 1), width, key=lambda n: font.getlength(line[:n] + "…"))
            line = line[:letters].rstrip(" ,:;-") + "…"
        lines.append(line)
    return lines


def _plain(text: str) -> str:
    """The built-in font has no accents and no emoji: "piñata" becomes "pinata", what has no plain letter goes."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c for c in letters if c.isascii() or c in "…’‘“”–—").replace("\x7f", "")


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """`image` as large as fits, in the middle of a white square of `cell` pixels."""
    scale = cell / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.convert("RGBA").resize((width, height), Image.Resampling.LANCZOS)  # premultiplied by Pillow itself
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(image, ((cell - width) // 2, (cell - height) // 2), mask=image)
    return square


def save_png(image: Image.Image | np.ndarray, path: Path, metadata: dict | None = None) -> None:
    """Write `image` with its `metadata` as PNG text, whole or not at all; makes the folder; raises OSError."""
    notes = PngInfo()
    for name, value in (metadata or {}).items():
        notes.add_text(str(name), str(value))
    _save(image if isinstance(image, Image.Image) else as_picture(image), path, format="PNG", pnginfo=notes)


def save_gif(images: Sequence[Image.Image], path: Path, *, cell: int, seconds: float = 0.12) -> None:
    """Write an endless film of `images`, enlarged to fit `cell` pixels on white, that pauses at its last picture."""
    first, *others = (_fitted(image, cell) for image in images)
    times = [round(1000 * seconds)] * len(others) + [round(8000 * seconds)]
    _save(first, path, format="GIF", save_all=True, append_images=others, duration=times, loop=0)


def _save(image: Image.Image, path: Path, **options) -> None:
    try:
        with replacing(path) as beside:
            image.save(beside, **options)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def to_float(images: UInt8[Array, "... c"]) -> Float[Array, "... c"]:
    """Bytes 0 … 255 to [-1, 1]; with transparency, colour times alpha, so that what is hidden has no colour."""
    image = images.astype(jnp.float32) / 127.5 - 1
    if images.shape[-1] != 4:
        return image
    shown = images[..., :3].astype(jnp.float32) / 255 * (images[..., 3:].astype(jnp.float32) / 255)
    return jnp.concatenate([2 * shown - 1, image[..., 3:]], axis=-1)


def to_bytes(image: Float[Array, "... c"]) -> UInt8[Array, "... c"]:
    """[-1, 1] to bytes 0 … 255, rounded; what lies outside is clipped, what is transparent becomes white."""
    whole = (jnp.clip(image, -1, 1) + 1) * 127.5
    if image.shape[-1] == 4:
        alpha = whole[..., 3:]
        colour = jnp.minimum(255 * whole[..., :3] / jnp.maximum(alpha, 1e-6), 255)
        whole = jnp.concatenate([jnp.where(alpha > 0.5, colour, 255), alpha], axis=-1)
    return jnp.round(whole).astype(jnp.uint8)


def on_white(images: UInt8[np.ndarray, "... c"]) -> UInt8[np.ndarray, "... d"]:
    """Pictures laid on white where they are transparent; without transparency, as they are."""
    if images.shape[-1] != 4:
        return images
    alpha = images[..., 3:].astype(np.float32) / 255
    return np.round(images[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
