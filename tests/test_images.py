import io
import struct
import threading
import time
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFont

import images
from images import (
    READABLE,
    PictureError,
    as_picture,
    as_rgba,
    captioned_grid,
    load_picture,
    on_white,
    reading,
    save_gif,
    save_png,
    to_bytes,
    to_float,
    wrapped,
)

FONT = ImageFont.load_default(12)


def flat(colour, n=1, size=8):
    return np.broadcast_to(np.array(colour, np.uint8), (n, size, size, len(colour)))


@pytest.mark.parametrize("colour", [(200,), (250, 10, 10), (250, 10, 10, 255)])
def test_each_picture_is_whole_in_its_cell_and_the_rest_is_white_and_grey(colour):
    grid = np.asarray(captioned_grid(flat(colour, n=5), ["a cat"] * 5, columns=3, cell=24))
    rgb = colour[:3] if len(colour) > 1 else colour * 3
    assert (grid == rgb).all(-1).sum() == 5 * 24 * 24
    rest = grid[(grid != rgb).any(-1)].astype(int)
    assert (np.ptp(rest, axis=-1) <= 5).all()  # nothing coloured
    assert (grid[0] == 255).all()
    assert (grid[:, 0] == 255).all()
    assert (grid[:, -1] == 255).all()


def test_margins_are_even_on_all_sides_and_between():
    filled = (np.asarray(captioned_grid(flat((250, 0, 0), n=6), [""] * 6, columns=3, cell=30)) == (250, 0, 0)).all(-1)
    edges = np.flatnonzero(np.diff(np.pad(filled.any(0), 1).astype(int)))
    starts, ends = edges[::2], edges[1::2]
    gaps = [starts[0], *(starts[1:] - ends[:-1]), filled.shape[1] - ends[-1]]
    assert len(set(gaps)) == 1


def test_transparency_shows_white():
    assert (np.asarray(captioned_grid(flat((250, 0, 0, 0)), [""], columns=1, cell=32)) == 255).all()
    half = np.asarray(captioned_grid(flat((255, 0, 0, 128)), [""], columns=1, cell=32))
    assert ((half == 255) | (half == (255, 127, 127))).all()


def test_pictures_of_any_shape_and_mode_keep_their_proportions():
    pictures = [Image.new(mode, (20, 10)) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK")]
    pictures[4].paste((0, 0, 255), (0, 0, 20, 10))
    grid = np.asarray(captioned_grid(pictures, ["x"] * 7, columns=7, cell=40))
    assert (grid == (0, 0, 255)).all(-1).sum() == 40 * 20


def test_the_second_row_repeats_the_first():
    grid = np.asarray(captioned_grid(flat((9, 99, 9), n=4), ["a", "b", "a", "b"], columns=2, cell=20))
    gap = (grid.shape[1] - 40) // 3
    step = (grid.shape[0] - gap) // 2
    np.testing.assert_array_equal(grid[:step], grid[step : 2 * step])


@pytest.mark.parametrize("width", [1, 20, 60, 90, 500])
@pytest.mark.parametrize(
    "text", ["", "eye", "woman in manual wheelchair facing right", "x" * 300, "flag: Åland Islands"]
)
def test_captions_take_two_lines_at_most_and_never_more_than_the_width(text, width):
    lines = wrapped(text, FONT, width=width)
    assert len(lines) <= 2
    assert all(FONT.getlength(line) <= max(width, FONT.getlength("…")) for line in lines)
    if width == 500 and len(text) < 50:
        assert " ".join(lines) == text.replace("Å", "A")


def test_what_does_not_fit_is_elided_and_what_fits_is_not():
    assert wrapped("a very long caption indeed it is", FONT, width=80)[-1].endswith("…")
    assert wrapped("two short\nlines", FONT, width=60) == ["two short", "lines"]


@pytest.mark.parametrize("text", ["x" * 1_000_000, "x " * 500_000, "é" * 1_000_000, " " * 1_000_000])
def test_of_a_caption_without_end_only_the_beginning_is_measured(text, monkeypatch):
    """A million letters take as long as a thousand, and a word is not shortened letter by letter."""
    measured, measure = [], ImageFont.FreeTypeFont.getlength
    monkeypatch.setattr(
        FONT.__class__, "getlength", lambda self, text: measured.append(len(text)) or measure(self, text)
    )
    lines = wrapped(text, FONT, width=90)
    assert sum(measured) < 30_000
    assert all(measure(FONT, line) <= 90 for line in lines)
    assert not text.strip() or lines[-1].endswith("…")
    captioned_grid(flat((9, 9, 9)), [text], columns=1, cell=64)


@pytest.mark.parametrize(
    ("n", "captions", "columns", "cell", "message"),
    [
        (2, ["a"], 1, 16, "a caption for each picture, got 1 for 2 pictures"),
        (0, [], 1, 16, "got 0 for 0 pictures"),
        (1, ["a"], 0, 16, "columns=0"),
        (1, ["a"], 1, 2, "cell=2"),
    ],
)
def test_a_grid_that_cannot_be_says_why(n, captions, columns, cell, message):
    with pytest.raises(ValueError, match=message):
        captioned_grid(flat((0, 0, 0), n=n), captions, columns=columns, cell=cell)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_an_array_that_is_no_picture_says_why(bad):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 1, 3 or 4\], got"):
        as_picture(bad)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_saved_picture_comes_back_with_its_notes(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(image, path, {"prompt": "a piñata 🪅", "seed": 3})
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved).reshape(image.shape), image)
        assert saved.info["prompt"] == "a piñata 🪅"
        assert saved.info["seed"] == "3"
    save_png(Image.new("L", (1, 1)), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_an_impossible_path_says_which_and_leaves_what_is_there(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"cannot write .*file.a\.png: .*; choose another folder"):
        save_png(Image.new("L", (1, 1)), tmp_path / "file" / "a.png")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interrupted_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(Image.new("L", (1, 1), 7), path)

    def interrupted(self, file, **_):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(Image.new("L", (1, 1), 9), path)
    with Image.open(path) as kept:
        assert kept.getpixel((0, 0)) == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_film_plays_every_picture_and_rests_at_the_last(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    save_gif([Image.new("RGB", (4, 6), colour) for colour in colours], tmp_path / "new" / "film.gif", cell=12)
    with Image.open(tmp_path / "new" / "film.gif") as film:
        assert (film.size, film.n_frames, film.info["loop"]) == ((12, 12), 3, 0)
        times = []
        for number, colour in enumerate(colours):
            film.seek(number)
            times.append(film.info["duration"])
            pixels = film.convert("RGB")
            np.testing.assert_allclose(pixels.getpixel((6, 6)), colour, atol=8)
            assert pixels.getpixel((0, 6)) == (255, 255, 255)
    assert times[0] == times[1] < times[2]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*film\.gif"):
        save_gif([Image.new("RGB", (4, 4))], tmp_path / "file" / "film.gif", cell=12)


def test_bytes_survive_the_way_to_floats_and_back():
    every_byte = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = np.asarray(jax.jit(to_float)(every_byte))
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_array_equal(jax.jit(to_bytes)(floats), every_byte)
    np.testing.assert_array_equal(jax.jit(to_bytes)(jnp.array([[[[-3.0], [3.0]]]])).ravel(), [0, 255])


def test_transparent_bytes_survive_the_way_to_floats_and_back():
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, 255 - colour, colour // 2, alpha], axis=-1).astype(np.uint8)
    floats = np.asarray(jax.jit(to_float)(rgba))
    assert (floats[0] == -1).all()  # what is transparent has no colour
    assert (floats[..., :3] <= floats[..., 3:] + 1e-6).all()
    back = np.asarray(jax.jit(to_bytes)(floats))
    np.testing.assert_array_equal(back[1:], rgba[1:])
    assert (back[0] == [255, 255, 255, 0]).all()


def test_transparent_pictures_are_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    np.testing.assert_array_equal(on_white(rgba), [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]])


# Files of other people.


def chunk(kind: bytes, data: bytes, crc=None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(pixels: np.ndarray, *more: bytes, depth=8, kind=0) -> bytes:
    """A PNG of big-endian or packed rows, with more chunks before its pixels; kind 0 is grey, 2 RGB."""
    height, width = len(pixels), pixels.shape[1] * (8 // depth if depth < 8 else 1) // (1, 1, 3)[kind]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image, kind="PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decoded(tmp_path, data: bytes) -> np.ndarray:
    (tmp_path / "a.png").write_bytes(data)
    with reading(tmp_path / "a.png") as image:
        return np.asarray(as_rgba(image))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "LA", "P", "1", "CMYK"])
def test_eight_bits_without_a_profile_are_what_pillow_makes_of_them(tmp_path, mode):
    image = Image.effect_noise((9, 5), 90).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(decoded(tmp_path, data), np.asarray(image.convert("RGBA")))


def test_sixteen_bits_of_grey_are_rounded_and_its_transparent_one_is_found(tmp_path):
    values = np.array([[0, 1, 128, 129, 257, 300, 40_000, 40_001, 65_535]], ">u2")
    found = decoded(tmp_path, png(values, chunk(b"tRNS", struct.pack(">H", 40_000)), depth=16))
    np.testing.assert_array_equal(found[0, :, 0], [0, 0, 0, 1, 1, 1, 156, 156, 255])
    np.testing.assert_array_equal(found[0, :, 3], 255 * (values[0] != 40_000))
    assert (decoded(tmp_path, png(values, depth=16))[..., 3] == 255).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [0, 1])
def test_the_transparent_grey_is_found_at_every_depth(tmp_path, depth, transparent):
    values = np.arange(8) % 2**depth
    packed = np.packbits((values[:, None] >> np.arange(depth)[::-1]) & 1)[None]
    found = decoded(tmp_path, png(packed, chunk(b"tRNS", struct.pack(">H", transparent)), depth=depth))
    np.testing.assert_array_equal(found[0, :, 0], values * 255 // (2**depth - 1))
    np.testing.assert_array_equal(found[0, :, 3], 255 * (values != transparent))


def test_a_tiff_says_what_is_white(tmp_path):
    values = np.array([[0, 257, 40_000, 65_535]], np.uint16)
    for white, expected in ((1, [0, 1, 156, 255]), (0, [255, 254, 99, 0])):
        data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: white})
        np.testing.assert_array_equal(decoded(tmp_path, data)[0, :, 0], expected)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "pixels of the kind F are not converted"),
        (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "pixels of the kind I are not converted"),
        (encoded(Image.new("L", (4, 4), 200), "TIFF", tiffinfo={339: 2}), "pixels of the kind L are not converted"),
        (encoded(Image.new("LAB", (4, 4)), "TIFF"), "pixels of the kind LAB are not converted"),
        (png(np.zeros((2, 6), ">u2"), chunk(b"tRNS", bytes(6)), depth=16, kind=2), "of 16 bits is transparent"),
    ],
)
def test_what_cannot_be_converted_says_so(tmp_path, data, what):
    with pytest.raises(PictureError, match=f"a.png: .*{what}") as caught:
        decoded(tmp_path, data)
    assert not str(caught.value.what).startswith(str(tmp_path))


# Columns are the XYZ of red, green and blue under D50; exponents as in the standards.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def icc(matrix: np.ndarray | None, gamma: float) -> bytes:
    """A profile of three primaries, or of grey, with one exponent; just what ICC.1:2001 asks for."""
    fixed = lambda *values: b"".join(struct.pack(">i", round(value * 65536)) for value in values)  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {
        b"desc": text,
        b"cprt": b"text" + bytes(4) + b"none",
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
    }
    if matrix is None:
        tags |= {b"kTRC": curve}
    else:
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
        tags |= {
            name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column)
            for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True)
        }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if matrix is None else b"RGB "
    header = struct.pack(">I", offset + len(body)) + bytes(4) + bytes.fromhex("02400000") + b"mntr" + space + b"XYZ "
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """Light to the bytes of sRGB (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("matrix", "gamma"), [(P3, 2.2), (ADOBE, 2.19921875), (SRGB, 1.0)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_of_another_profile_become_srgb(tmp_path, matrix, gamma, kind):
    colours = np.array([[200, 60, 60], [40, 170, 90], [30, 60, 220], [128, 128, 128], [255, 255, 255], [0, 0, 0]])
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    expected = in_srgb((colours / 255) ** gamma @ matrix.T @ np.linalg.inv(SRGB).T)
    for colour, right in zip(colours, expected, strict=True):
        image = Image.new("RGB", (8, 8), tuple(colour.tolist()))
        found = decoded(tmp_path, encoded(image, kind, icc_profile=icc(matrix, gamma), **options))
        assert abs(found[4, 4, :3] - right).max() < (3 if kind == "JPEG" else 2), colour
        assert (found[..., 3] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_a_profile_leaves_transparency_alone_and_fits_every_mode(tmp_path, mode):
    image = Image.merge("RGBA", [Image.linear_gradient("L")] * 3 + [Image.radial_gradient("L")]).convert(mode)
    expected = np.asarray(image.convert("RGBA"))
    found = decoded(tmp_path, encoded(image, icc_profile=icc(ADOBE, 2.19921875)))
    np.testing.assert_array_equal(found[..., 3], expected[..., 3])
    right = in_srgb((expected[..., :3] / 255) ** 2.19921875)  # greys stay grey
    assert abs(found[..., :3] - right).max() < 2


def test_a_profile_of_grey_is_for_grey_alone(tmp_path):
    grey = Image.linear_gradient("L")
    found = decoded(tmp_path, encoded(grey, icc_profile=icc(None, 1.8)))
    assert abs(found[..., 0] - in_srgb((np.asarray(grey) / 255) ** 1.8)).max() < 2
    with pytest.raises(PictureError, match="its colour profile is for GRAY, its pixels are RGB; save it in sRGB"):
        decoded(tmp_path, encoded(grey.convert("RGB"), icc_profile=icc(None, 1.0)))


def test_a_profile_that_is_srgb_changes_no_byte(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 4)).astype(np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(decoded(tmp_path, encoded(image, icc_profile=profile)), np.asarray(image))


@pytest.mark.parametrize("profile", [b"x", bytes(200), icc(P3, 2.2)[:200], icc(P3, 2.2).replace(b"RGB ", b"Lab ")])
def test_a_damaged_profile_says_so(tmp_path, profile):
    with pytest.raises(PictureError, match=r"its colour profile .*; save it in sRGB"):
        decoded(tmp_path, encoded(Image.new("RGB", (4, 4)), icc_profile=profile))


ONE = np.full((1, 3), 7, np.uint8)
LARGE = zlib.compress(bytes(2**21), 9)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (png(ONE, chunk(b"tEXt", b"a\0b", crc=1), kind=2), "a damaged picture: its header is broken"),
        (
            png(ONE, chunk(b"zTXt", b"a\0\0" + LARGE), kind=2),
            "a damaged picture: a text or colour profile in it is gigantic; save it again",
        ),
        (
            png(ONE, chunk(b"iCCP", b"a\0\0" + LARGE), kind=2),
            "a damaged picture: a text or colour profile in it is gigantic; save it again",
        ),
        (png(ONE, kind=2)[:45], "a damaged picture: "),
        (png(ONE, kind=2)[:20], "a damaged picture: Truncated"),
        (png(ONE, kind=2)[:9], "a damaged picture: "),
        (b"", "the file is empty"),
        (b"hello", "not a picture (none of PNG, JPEG"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(tmp_path, data, what):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "a.png")
    assert str(caught.value).startswith(f"{tmp_path / 'a.png'}: {what}")


def test_a_bomb_is_refused_by_its_header(tmp_path):
    data = png(ONE, kind=2)
    for side, what in (
        (8_000, "8000x8000 is gigantic; at most 33554432 pixels are read"),
        (2**16, "a damaged picture: Image"),
    ):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(data[:8] + header + data[33:])
        with pytest.raises(PictureError, match=what):
            load_picture(tmp_path / "a.png")


@pytest.mark.parametrize(("limit", "size"), [(100 * 60, (100, 60)), (5999, (50, 30)), (400, (25, 15)), (10, (13, 8))])
def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch, limit, size):
    monkeypatch.setattr(images, "WHOLE", limit)
    image = Image.new("RGB", (100, 60), (200, 30, 90))
    (tmp_path / "a.png").write_bytes(encoded(image, "JPEG", quality=95))
    found = load_picture(tmp_path / "a.png")
    assert found.size == size
    assert abs(np.asarray(found, int) - (200, 30, 90)).max() <= 3
    (tmp_path / "a.png").write_bytes(encoded(image))
    assert load_picture(tmp_path / "a.png").size == (100, 60)  # only a JPEG's decoder can


def test_of_large_pictures_one_is_open_at_a_time_and_small_ones_are_not_kept_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SMALL", 50)
    Image.new("RGB", (8, 8)).save(tmp_path / "large.png")
    Image.new("RGB", (7, 7)).save(tmp_path / "small.png")
    held, most, both = [], [], threading.Barrier(2, timeout=30)

    def hold(name):
        with reading(tmp_path / name):
            if name == "small.png":
                both.wait()  # two are open together, or this fails
            held.append(name)
            most.append(held.count("large.png"))
            time.sleep(0.01)
            held.remove(name)

    threads = [threading.Thread(target=hold, args=(name,)) for name in ["large.png"] * 4 + ["small.png"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (6, 1)


@pytest.mark.parametrize("kind", READABLE)
def test_a_file_that_was_damaged_anywhere_gives_a_picture_or_says_so(tmp_path, kind):
    image = Image.effect_noise((9, 7), 90).convert("RGB")
    whole, draw = (
        encoded(image, kind, **({} if kind in ("GIF", "BMP") else {"icc_profile": icc(P3, 2.2)})),
        np.random.default_rng(0),
    )
    refused = 0
    with warnings.catch_warnings(action="ignore"):  # Pillow's own
        for _ in range(60):
            data = bytearray(whole)
            start, length = draw.integers(len(data)), draw.integers(1, 9)
            data[start : start + length] = draw.integers(0, 256, draw.integers(0, 9)).astype(np.uint8).tobytes()
            try:
                found = decoded(tmp_path, bytes(data))
                assert (found.dtype, found.shape[2]) == (np.uint8, 4)
            except PictureError:
                refused += 1
    assert refused > 3
