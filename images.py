"""Pictures for people: a captioned grid on white, PNG and GIF files, and bytes from and to the network's range.

A grid is `columns` cells wide. Each cell shows one picture, enlarged or reduced to fit `cell` pixels, and its caption
in quiet grey on at most two lines below. What is transparent shows the white below.
"""

import unicodedata
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from files import replacing

LETTERS = 1000  # of a caption, the rest is not looked at: no two lines of a cell hold as many
GREY = (110, 110, 115)  # of the captions


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
