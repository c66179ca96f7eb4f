import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

from images import as_picture, captioned_grid, on_white, save_gif, save_png, to_bytes, to_float, wrapped

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
