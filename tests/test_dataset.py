import base64
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

import dataset
import files
from dataset import DatasetError, check, fit, load

SMALL = {"shape": (8, 8, 3)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


def png(colour=(255, 0, 0, 255), size=(8, 8)) -> bytes:
    return encoded(Image.new("RGBA", size, colour))


def encoded(image, kind="PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write(root, rows, pictures, vendor="Google"):
    """A dataset of `rows` (header first) and {stem: bytes}."""
    folder = root / "image" / vendor
    folder.mkdir(parents=True, exist_ok=True)
    with (root / "full_emoji.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    for stem, data in pictures.items():
        (folder / f"{stem}.png").write_bytes(data)
    return root


@pytest.fixture
def lenient(monkeypatch):
    """Any share of faults is let pass."""
    monkeypatch.setattr(dataset, "MAX_BAD", 1.0)


@pytest.fixture
def three(tmp_path):
    rows = [["#", "name"], ["1", "red"], ["2", "green"], ["3", "blue"]]
    return write(tmp_path / "set", rows, {"1": png(), "2": png((0, 255, 0, 255)), "3": png((0, 0, 255, 255))})


# Rows and captions.


def test_two_columns_are_enough(three):
    pictures = load(three, vendor="Google", limit=0, **SMALL)
    assert pictures.names == ["red", "green", "blue"]
    assert pictures.indexes == ["1", "2", "3"]
    assert pictures.keywords == [""] * 3
    assert pictures.heldout.tolist() == [False] * 3
    assert pictures.faults == check(three) == []
    expected = np.eye(3, dtype=np.uint8)[:, None, None, :] * 255
    np.testing.assert_array_equal(pictures.images, np.broadcast_to(expected, (3, 8, 8, 3)))


def test_pictures_that_no_memory_holds_say_what_to_do(three):
    with pytest.raises(DatasetError, match=r"3 pictures of 10000000 × 10000000, 838190.3 GiB; .*--stream"):
        load(three, vendor="Google", limit=0, shape=(10**7, 10**7, 3))


def test_a_dataset_like_that_of_kaggle(tmp_path):
    picture = "data:image/png;base64," + base64.b64encode(bytes(150_000)).decode()
    rows = [["#", "emoji", "unicode", "name", "Apple", "Google"]]
    rows += [[i, "😀", "U+1F600", f"⊛ face {i} " if i % 2 else f"face {i}", picture, picture] for i in range(1, 21)]
    root = write(tmp_path, rows, {str(i): png(size=(72, 72)) for i in range(1, 21) if i > 15})
    pictures = load(root, vendor="Google", limit=0, **SMALL)
    assert pictures.names == [f"face {i}" for i in range(16, 21)]
    assert [fault.where for fault in pictures.faults] == [f"image/Google/{i}.png" for i in range(1, 16)]
    assert {fault.what for fault in pictures.faults} == {dataset.MISSING}


def test_fields_are_tidied_but_never_guessed_at(tmp_path):
    rows = [["\ufeff# ", " split", "name", "keywords"]]
    rows += [[" 12.0 ", " Heldout", "  a  b ", "x,  y"], ["007", "", "NA", "null"], ["a b", "train", "12.0", ""]]
    root = write(tmp_path, rows, {"12": png(), "007": png(), "a b": png()})
    pictures = load(root, vendor="Google", limit=0, **SMALL)
    assert pictures.indexes == ["12", "007", "a b"]
    assert pictures.names == ["a b", "NA", "12.0"]
    assert pictures.keywords == ["x, y", "null", ""]
    assert pictures.heldout.tolist() == [True, False, False]


def test_a_faulty_row_is_named_as_a_spreadsheet_counts(tmp_path, lenient):
    rows = [["#", "name", "split"], ["1", " two  words", ""], [], ["", "no number", ""], ["\x1b[31m4", "x", ""]]
    rows += [["2", "⊛ ", ""], ["3", "x", "test"], ["../1", "x", ""], ["..", "x", ""], ["4", "good", ""]]
    root = write(tmp_path, rows, {"1": png(), "2": png(), "3": png(), "4": png()})
    pictures = load(root, vendor="Google", limit=0, **SMALL)
    assert pictures.names == ["two words", "good"]
    assert [tuple(fault) for fault in pictures.faults] == [
        ("full_emoji.csv row 4, column #", "empty; it must be the name of the picture's file without .png"),
        ("full_emoji.csv row 5, column #", r"'\x1b[31m4' is not the name of a file"),
        ("full_emoji.csv row 6, column name", "empty; it must be the picture's caption"),
        ("full_emoji.csv row 7, column split", "'test' is neither train nor heldout"),
        ("full_emoji.csv row 8, column #", "'../1' is not the name of a file"),
        ("full_emoji.csv row 9, column #", "'..' is not the name of a file"),
    ]
    assert check(root) == pictures.faults


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no full_emoji\.csv: name the folder .*; `python prepare_dataset\.py"),
        (b"", "lacks the column `#` and `name` in its first row; it is empty"),
        (b"index,title\n1,a\n", "lacks the column `#` and `name` in its first row; it has `index`, `title`"),
        (b"#;name\n1;a\n", "lacks the column .*it has `#;name`"),
        (b"#,name\n1,caf\xe9\n", "is not UTF-8 .*; save it as UTF-8"),
        (b'#,name\n1,"a\n2,b\n', r"1 of 1 rows .*first: full_emoji\.csv row 2: a line break inside a field"),
        (b"#,name\n", r"no captioned picture for vendor Google \(0 rows"),
        (b'#,name,"other\n1,a,b\n2,c",d\n3,e,f\n', "a line break inside its first row: is a quotation mark missing"),
        (b"#,\x1b[31mtitle\n1,a\n", r"it has `#`, `\\x1b\[31mtitle`"),
    ],
)
def test_a_csv_that_cannot_be_used_says_why(three, content, message):
    (three / "full_emoji.csv").unlink()
    if content is not None:
        (three / "full_emoji.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load(three, vendor="Google", limit=0, **SMALL)


def test_a_comma_at_the_end_of_each_row_is_harmless(three):
    (three / "full_emoji.csv").write_text("#,name\n1,red,\n2,green,\n")
    assert load(three, vendor="Google", limit=0, **SMALL).names == ["red", "green"]


def test_a_comma_that_is_not_within_quotation_marks_is_a_fault_of_its_row(three, lenient):
    (three / "full_emoji.csv").write_text('#,name\n1,a red, shiny boat\n2,"a green, shiny boat"\n3,a b c,,d\n')
    pictures = load(three, vendor="Google", limit=0, **SMALL)
    assert pictures.names == ["a green, shiny boat"]
    assert pictures.faults == [
        ("full_emoji.csv row 2", "3 fields, the header 2: put the caption in quotation marks"),
        ("full_emoji.csv row 4", "4 fields, the header 2: put the caption in quotation marks"),
    ]


@pytest.mark.parametrize("column", ["name", "other"])
def test_a_quotation_mark_that_is_never_closed_is_a_fault_of_its_row(three, lenient, column):
    broken, whole = ('1,"red,x', '"green",x') if column == "name" else ('1,red,"x', 'green,"x"')
    (three / "full_emoji.csv").write_text(f"#,name,other\n3,blue,x\n{broken}\n2,{whole}\n\n1,red,x\n")
    pictures = load(three, vendor="Google", limit=0, **SMALL)
    assert pictures.names == ["blue", "red"]
    assert [fault.where for fault in pictures.faults] == ["full_emoji.csv row 3"]
    assert pictures.faults[0].what.startswith("a line break inside a field: is a quotation mark missing")
    (three / "full_emoji.csv").write_text(f"#,name,other\r\n3,blue,x\r\n{broken}\r\n2,green,x\r\n")
    assert [fault.where for fault in load(three, vendor="Google", limit=0, **SMALL).faults] == ["full_emoji.csv row 3"]


@pytest.mark.parametrize("seed", range(8))
def test_captions_of_any_letters_come_back_whole_or_are_a_fault_of_their_row(tmp_path, seed):
    draw, letters = np.random.default_rng(seed), list("ab,;\"' \té🐶#")
    captions = ["x" + "".join(draw.choice(letters, draw.integers(1, 12))) + "y" for _ in range(40)]
    rows = [[str(i), caption, "face, joy"] for i, caption in enumerate(captions)]
    root = write(tmp_path, [["#", "name", "keywords"], *rows], {})
    assert [row.name for row in dataset.read_rows(root)] == [" ".join(caption.split()) for caption in captions]

    lines = [f"{i},{caption},joy".replace('"', "") for i, caption in enumerate(captions)]
    (root / "full_emoji.csv").write_text("\n".join(["#,name,keywords", *lines]), encoding="utf-8")
    for number, (line, row) in enumerate(zip(lines, dataset.read_rows(root), strict=True), start=2):
        what = f"{line.count(',') + 1} fields, the header 3: put the caption in quotation marks"
        assert row.fault == (None if line.count(",") == 2 else (f"full_emoji.csv row {number}", what))


def test_a_csv_that_was_damaged_anywhere_gives_rows_or_says_so(three, lenient):
    lines = ["#,name,keywords,split", '1,red,"a, b",train', '2,"green, or so",,heldout', "3,blue,c,", "3,navy,,"]
    whole, draw = "\r\n".join(lines).encode(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        start, length = draw.integers(len(data)), draw.integers(1, 9)
        data[start : start + length] = (
            draw.choice([*b',"\r\n#;a1\xff\0\x1b\xef'], draw.integers(0, 9)).astype(np.uint8).tobytes()
        )
        (three / "full_emoji.csv").write_bytes(data)
        try:
            pictures = load(three, vendor="Google", limit=0, **SMALL, decode=False)
            assert len(pictures.names) == len(pictures.others) <= 3
            said = [*pictures.indexes, *(fault.where for fault in pictures.faults)]
        except DatasetError as error:
            said = [str(error)]
        assert all(map(str.isprintable, said))


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(DatasetError, match="there is no folder"):
        load(tmp_path / "nowhere", vendor="Google", limit=0, **SMALL)


@pytest.mark.parametrize("vendor", ["google", "", "..", "Apple"])
def test_another_vendor_lists_those_that_are_there(three, vendor):
    (three / "image" / "Twitter").mkdir()
    with pytest.raises(DatasetError, match=f"no folder '{vendor}'; it has Google, Twitter. Choose one with --vendor"):
        load(three, vendor=vendor, limit=0, **SMALL)


def test_nothing_found_at_all_is_an_error(three):
    (three / "image" / "Twitter").mkdir()
    with pytest.raises(DatasetError, match=r"no captioned picture .*first fault: image/Twitter/1\.png: there is"):
        load(three, vendor="Twitter", limit=0, **SMALL)


# Rows with the same `#`, and the names of files.


def test_rows_with_the_same_number_are_further_captions(three, tiny):
    rows = ["1,red,s,", "2,green,,heldout", "1,a red square,t,train", "3,blue,,", "2,grass,,", "1,red,,", "1.0,last,,"]
    (three / "full_emoji.csv").write_text("\n".join(["#,name,keywords,split", *rows]))
    pictures = load(three, vendor="Google", limit=0, **SMALL)
    assert pictures.names == ["red", "green", "blue"]
    assert pictures.others == [["a red square", "last"], ["grass"], []]
    assert (pictures.keywords, pictures.faults) == (["s", "", ""], [])
    assert load(three, vendor="Google", limit=0, **SMALL, decode=False).others == pictures.others
    first = dataset.from_config(dataclasses.replace(tiny, data=str(three), vendor="Google", H=8, W=8))
    assert first.others == [["a red square", "last"], [], ["grass"]]
    (three / "full_emoji.csv").write_text("\n".join(["#,name,keywords,split", *rows[:-1]]))
    assert load(three, vendor="Google", limit=0, **SMALL).fingerprint != pictures.fingerprint


def test_a_further_caption_is_on_the_side_of_the_first_and_good(three, lenient):
    rows = ["1,,", "1,red,", "1,scarlet,heldout", "2,green,heldout", "2,grass,train", "2,,", "3,blue,"]
    (three / "full_emoji.csv").write_text("\n".join(["#,name,split", *rows]))
    pictures = load(three, vendor="Google", limit=0, **SMALL)
    assert (pictures.names, pictures.others) == (["red", "green", "blue"], [[], [], []])
    places = ((2, "name"), (4, "split"), (6, "split"), (7, "name"))
    assert [fault.where for fault in pictures.faults] == [f"full_emoji.csv row {n}, column {c}" for n, c in places]
    assert pictures.faults[1].what == "'heldout', but row 3 with the same # is on the other side"


def forms_differ(folder):
    """Whether a name in NFC and the same in NFD are two files; on macOS they are one."""
    (folder / "e\u0301").touch()
    return not (folder / "\u00e9").exists()


NAMES = {  # as the CSV has it, as the disk has it
    "no-break space": ("a\u00a0b", "a\u00a0b"),
    "narrow space": ("a\u202fb", "a\u202fb"),
    "two spaces": ("a  b", "a  b"),
    "space at the end": ("a ", "a "),
    "spaces around": ("  a ", "a"),
    "number of a spreadsheet": ("1.0", "1"),
    "name like a number": ("1.0", "1.0"),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "decomposed": ("cafe\u0301", "caf\u00e9"),
    "spaces and accents": (" cafe\u0301  noir", "caf\u00e9 noir"),
    "long": ("x" * 251, "x" * 251),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_is_found_under_the_name_as_written_or_tidied(tmp_path, kind):
    written, stem = NAMES[kind]
    if kind in ("composed", "decomposed", "spaces and accents") and not forms_differ(tmp_path):
        stem = " ".join(written.split())
    root = write(tmp_path, [["#", "name"], [written, "x"]], {stem: png()})
    pictures = load(root, vendor="Google", limit=0, **SMALL)
    assert (pictures.indexes, pictures.faults) == ([stem], [])
    assert pictures.file(0).is_file()


def test_names_that_only_tidying_makes_equal_are_two_pictures(tmp_path):
    stems = ["1", "1.0", "a b", "a  b", *(["\u00e9", "e\u0301"] if forms_differ(tmp_path) else [])]
    rows = [["#", "name"], *([stem, f"n{i}"] for i, stem in enumerate(stems))]
    root = write(tmp_path, rows, {stem: png((i, 0, 0, 255)) for i, stem in enumerate(stems)})
    pictures = load(root, vendor="Google", limit=0, **SMALL)
    assert (pictures.indexes, pictures.others) == (stems, [[]] * len(stems))
    assert pictures.images[:, 0, 0, 0].tolist() == [*range(len(stems))]


@pytest.mark.parametrize("length", [252, 300, 5000])
def test_a_name_that_no_disk_can_hold_is_one_fault_among_others(tmp_path, length):
    rows = [["#", "name"], ["1", "x"], ["é" * length, "long"], ["2", "y"], ["", "z"]]
    root = write(tmp_path, rows, {"1": png()})
    where, what = zip(*check(root), strict=True)
    assert where == ("full_emoji.csv row 5, column #", f"image/Google/{'é' * length}.png", "image/Google/2.png")
    assert what[1:] == ("cannot be read: File name too long", dataset.MISSING)


def test_what_jupyter_and_macos_leave_behind_is_no_vendor(three):
    (three / "image" / ".ipynb_checkpoints").mkdir()
    (three / "image" / "Google" / "._1.png").write_bytes(b"resource fork")
    assert dataset.vendors(three) == ["Google"]
    assert check(three) == []


# Pictures at fault.


def truncated() -> bytes:
    return encoded(Image.effect_noise((64, 64), 50))[:900]


def gigantic(side=60_000) -> bytes:
    chunks = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0")
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


FAULTS = {
    "empty": (b"", "the file is empty"),
    "truncated": (truncated(), "a damaged picture: "),
    "text": (b"hello", "not a picture"),
    "large": (gigantic(8_000), "8000x8000 is gigantic"),
    "huge": (gigantic(60_000), "a damaged picture: Image size .* exceeds"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_broken_picture_is_left_out_and_reported(three, kind, lenient):
    data, what = FAULTS[kind]
    (three / "image" / "Google" / "2.png").write_bytes(data)
    for _ in range(2):  # the second time from the cache
        pictures = load(three, vendor="Google", limit=0, **SMALL)
        assert pictures.names == ["red", "blue"]
        assert (pictures.images[:, 0, 0] == [[255, 0, 0], [0, 0, 255]]).all()
        assert [fault.where for fault in pictures.faults] == ["image/Google/2.png"]
        assert re.match(what, pictures.faults[0].what)
    assert check(three) == pictures.faults


def test_a_folder_in_the_place_of_a_picture_is_reported(three, lenient):
    (three / "image" / "Google" / "1.png").unlink()
    (three / "image" / "Google" / "1.png").mkdir()
    assert load(three, vendor="Google", limit=0, **SMALL).faults[0].what.startswith("cannot be read")


ENDLESS = {
    "pipe": (os.mkfifo, "it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "sparse": (lambda path: [path.touch(), os.truncate(path, 20 * 2**30)], r"it has 20\.0 GiB, more than 0\.25"),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("decode", [True, False])
def test_a_file_without_end_is_not_opened(three, kind, decode, lenient):
    make, what = ENDLESS[kind]
    (three / "image" / "Google" / "2.png").unlink()
    make(three / "image" / "Google" / "2.png")
    ((where, found),) = load(three, vendor="Google", limit=0, **SMALL, decode=decode).faults
    assert where == "image/Google/2.png"
    assert re.fullmatch(f"cannot be read: {what}", found)


def test_too_many_faults_name_the_first_and_the_way_out(three, monkeypatch):
    (three / "image" / "Google" / "2.png").write_bytes(b"")
    expected = (
        r"1 of 3 rows and pictures .* at most 5% may be faulty\. The first: image/Google/2\.png: the file is empty\. "
        r"Mend or delete them; `python prepare_dataset\.py --check --data .*` lists them all"
    )
    with pytest.raises(DatasetError, match=expected):
        load(three, vendor="Google", limit=0, **SMALL)
    monkeypatch.setattr(dataset, "MAX_BAD", 1 / 3)
    assert len(load(three, vendor="Google", limit=0, **SMALL).names) == 2


def test_missing_pictures_are_no_reason_to_stop_but_do_not_hide_broken_ones(three, monkeypatch):
    (three / "image" / "Google" / "1.png").unlink()
    assert len(load(three, vendor="Google", limit=0, **SMALL).names) == 2
    (three / "image" / "Google" / "2.png").write_bytes(b"")
    monkeypatch.setattr(dataset, "MAX_BAD", 0.4)
    with pytest.raises(DatasetError, match="1 of 2 rows and pictures"):
        load(three, vendor="Google", limit=0, **SMALL)


def test_check_looks_at_every_vendor_and_at_rows_that_none_has(three):
    write(three, [["#", "name"], *([i, "x"] for i in range(1, 5))], {"1": b"no", "2": png()}, vendor="Twitter")
    expected = [("image/Google/4.png", "there"), ("image/Twitter/1.png", "not a")]
    assert [(fault.where, fault.what[:5]) for fault in check(three)] == expected


def test_check_without_any_vendor(three):
    (three / "image").rename(three / "pictures")
    assert [fault.where for fault in check(three)] == ["image"]


@pytest.mark.parametrize("seed", range(4))
def test_limit_keeps_the_first_good_training_pictures(tmp_path, seed, monkeypatch, lenient):
    monkeypatch.setattr(dataset, "BLOCK", 5)
    draw = np.random.default_rng(seed)
    heldout, bad = draw.random(23) < 0.3, draw.random(23) < 0.2
    rows = [["#", "name", "split"], *([i, f"n{i}", "heldout" if heldout[i] else ""] for i in range(23))]
    root = write(tmp_path, rows, {str(i): b"" if bad[i] else png() for i in range(23)})
    for limit in (0, 1, 2, 5, 9, 10_000):
        training = [i for i in range(23) if not bad[i] and not heldout[i]]
        end = training[limit - 1] + 1 if 0 < limit <= len(training) else 23
        pictures = load(root, vendor="Google", limit=limit, **SMALL)
        assert pictures.indexes == [str(i) for i in range(end) if not bad[i]]
        assert pictures.heldout.tolist() == [bool(heldout[i]) for i in range(end) if not bad[i]]
        assert [fault.where for fault in pictures.faults] == [f"image/Google/{i}.png" for i in range(end) if bad[i]]


# Decoding.


def one(root, data, height=8, width=8, channels=3):
    write(root, [["#", "name"], ["1", "x"]], {"1": data})
    return load(root, vendor="Google", limit=0, shape=(height, width, channels)).images[0]


def lanczos(source, size):
    """The [size, source] matrix of a Lanczos-3 resize, widened by the scale where it shrinks; Pillow is not asked."""
    scale = source / size
    wide = max(scale, 1)
    x = (np.arange(source) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / wide
    weights = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("source", "target"), [((40, 40), (16, 16)), ((13, 13), (31, 31)), ((72, 48), (42, 28))])
def test_rgba_is_resized_premultiplied(tmp_path, source, target):
    draw = np.random.default_rng(0)
    rgba = draw.integers(0, 256, (*source, 4)).astype(np.uint8)
    rgba[: source[0] // 2, :, 3] = 0
    got = one(tmp_path, encoded(Image.fromarray(rgba)), height=target[0], width=target[1], channels=4)
    alpha = rgba[..., 3:] / 255
    premultiplied = np.concatenate([rgba[..., :3] * alpha, rgba[..., 3:]], -1)
    down, across = lanczos(source[0], target[0]), lanczos(source[1], target[1])
    resized = np.einsum("ab,bcd,ec->aed", down, premultiplied, across)
    alpha = resized[..., 3:].clip(0, 255)
    colour = (resized[..., :3] * 255 / np.where(alpha > 0, resized[..., 3:], np.inf)).clip(0, 255)
    seen = np.where(np.rint(alpha) > 0, colour, 255)
    assert abs(got - np.concatenate([seen, alpha], -1)).max() < 0.51  # rounding, and nothing else
    on_white = one(tmp_path, encoded(Image.fromarray(rgba)), height=target[0], width=target[1])
    assert abs(on_white - (colour * alpha / 255 + 255 - alpha)).max() < 0.51


def test_colour_under_transparency_never_shows():
    rgba = np.zeros((30, 30, 4), np.uint8)
    rgba[8:20, 8:20] = (200, 30, 90, 255)
    hidden = np.where(rgba[..., 3:] == 0, [0, 255, 0, 0], rgba).astype(np.uint8)
    for channels in (1, 3, 4):
        shapes = [fit(Image.fromarray(image), 16, 16, channels) for image in (rgba, hidden)]
        np.testing.assert_array_equal(*shapes)
    seen = fit(Image.fromarray(hidden), 16, 16, 4).astype(int)
    solid = seen[seen[..., 3] > 8]
    assert abs(solid[:, :3] - (200, 30, 90)).max() <= 1  # edges keep their colour
    assert (seen[seen[..., 3] == 0][:, :3] == 255).all()


def test_a_picture_of_the_right_size_passes_through_untouched(tmp_path):
    rgba = np.random.default_rng(1).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    rgba[..., 3] = rgba[..., 3].clip(1)
    np.testing.assert_array_equal(one(tmp_path, encoded(Image.fromarray(rgba)), channels=4), rgba)


def test_proportions_are_kept_by_padding(tmp_path):
    data = png((10, 20, 30, 255), size=(136, 68))
    image = one(tmp_path, data, height=16, width=16)
    assert (image[4:12] == (10, 20, 30)).all()
    assert (image[:4] == 255).all()
    assert (image[12:] == 255).all()
    image = one(tmp_path, data, height=7, width=4, channels=4)
    assert image[..., 3].any(1).tolist() == [False, False, True, True, False, False, False]
    assert (image[~image[..., 3].astype(bool)][:, :3] == 255).all()
    assert (one(tmp_path, png((0, 0, 0, 255), size=(300, 1)), height=8, width=8) == 0).all(-1).sum() == 8


@pytest.mark.parametrize("channels", [1, 3])
def test_half_transparent_is_half_white(tmp_path, channels):
    image = one(tmp_path, png((255, 0, 0, 128)), channels=channels)
    expected = {3: [255, 127, 127], 1: [round(0.299 * 255 + 0.701 * 127)]}[channels]
    np.testing.assert_array_equal(image, np.broadcast_to(np.array(expected, np.uint8), image.shape))


def test_every_mode_of_a_file_is_read(tmp_path):
    grey16 = Image.fromarray(np.full((8, 8), 0x8040, np.uint16))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    cases = {
        encoded(grey16): (128, 128, 128),
        encoded(grey16, "TIFF"): (128, 128, 128),
        encoded(palette): (10, 200, 30),
        encoded(palette, transparency=1): (255, 255, 255),
        encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"): (255, 0, 0),
        encoded(Image.new("L", (8, 8), 7)): (7, 7, 7),
        encoded(Image.new("LA", (8, 8), (0, 0))): (255, 255, 255),
        encoded(Image.new("1", (8, 8), 1)): (255, 255, 255),
        encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "WEBP", lossless=True): (1, 2, 3),
    }
    for data, colour in cases.items():
        assert (one(tmp_path, data) == colour).all(), colour


def test_a_turned_photograph_is_upright(tmp_path):
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned clockwise by a quarter
    seen = one(tmp_path, encoded(image, exif=exif))
    assert (seen[:, 4:] == 255).all()
    assert (seen[:, :4] == 0).all()


# The cache and the fingerprint.


def test_the_cache_gives_the_same_and_is_keyed_by_content(three, monkeypatch):
    first = load(three, vendor="Google", limit=0, **SMALL)
    monkeypatch.setattr(dataset, "fit", lambda *_: pytest.fail("decoded again"))
    again = load(three, vendor="Google", limit=0, **SMALL)
    np.testing.assert_array_equal(first.images, again.images)
    assert first.fingerprint == again.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr(files, "CACHE", three / "cache")
    load(three, vendor="Google", limit=0, **SMALL)
    (three / "image" / "Google" / "1.png").write_bytes(png((9, 9, 9, 255)))
    changed = load(three, vendor="Google", limit=0, **SMALL)
    assert (changed.images[0] == 9).all()
    assert changed.fingerprint != first.fingerprint
    assert load(three, vendor="Google", limit=0, shape=(4, 8, 1)).images.shape == (3, 4, 8, 1)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[: len(d) // 2], lambda d: b"x" * len(d)])
def test_a_damaged_cache_is_made_again(three, damage):
    first = load(three, vendor="Google", limit=0, **SMALL)
    (cached,) = (files.CACHE / "pictures").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    np.testing.assert_array_equal(load(three, vendor="Google", limit=0, **SMALL).images, first.images)
    assert len(cached.read_bytes()) == len(whole)


def test_a_bit_that_flipped_in_the_cache_is_noticed(three):
    first = load(three, vendor="Google", limit=0, **SMALL)
    (cached,) = (files.CACHE / "pictures").iterdir()
    data = bytearray(cached.read_bytes())
    data[300] ^= 1  # within the pictures
    cached.write_bytes(data)
    np.testing.assert_array_equal(load(three, vendor="Google", limit=0, **SMALL).images, first.images)


def test_a_cache_that_cannot_be_written_is_no_error(three, monkeypatch):
    (three / "file").write_text("")
    monkeypatch.setattr(files, "CACHE", three / "file")
    assert len(load(three, vendor="Google", limit=0, **SMALL).names) == 3


def test_the_fingerprint_is_what_earlier_checkpoints_carry(several):
    pictures = load(several, vendor="One+Two", limit=0, **SMALL)
    rows = [pictures.names, pictures.indexes, pictures.keywords, pictures.heldout.tolist()]
    words = json.dumps([pictures.images.shape, *rows]).encode()
    assert pictures.fingerprint == hashlib.sha256(words + pictures.images.tobytes()).hexdigest()


def test_the_fingerprint_sees_captions_too(three):
    before = load(three, vendor="Google", limit=0, **SMALL).fingerprint
    (three / "full_emoji.csv").write_text("#,name\n1,red\n2,green\n3,navy\n")
    assert load(three, vendor="Google", limit=0, **SMALL).fingerprint != before


# Several vendors.


@pytest.fixture
def several(tmp_path):
    """Rows 1 and 6 are drawn by both vendors, 2 by Two, 3 by One, 4 by both, 5 by none; 3 and 4 are held out."""
    rows = [["#", "name", "split"], *([i, f"thing {i}", "heldout" if i in (3, 4) else ""] for i in range(1, 7))]
    root = tmp_path / "set"
    write(root, rows, {i: png((10 * int(i), 1, 0, 255)) for i in "1346"}, vendor="One")
    return write(root, rows, {i: png((10 * int(i), 2, 0, 255)) for i in "1246"}, vendor="Two")


def test_captions_of_several_vendors_name_them_and_stand_together(several):
    pictures = load(several, vendor="One+Two", limit=0, **SMALL)
    expected = [("1", 1), ("1", 2), ("2", 2), ("3", 1), ("4", 1), ("4", 2), ("6", 1), ("6", 2)]
    assert pictures.indexes == [index for index, _ in expected]
    assert pictures.names == [f"thing {index}, {('One', 'Two')[v - 1]} style" for index, v in expected]
    assert pictures.images[:, 0, 0].tolist() == [[10 * int(index), v, 0] for index, v in expected]
    files = [several / "image" / ("One", "Two")[v - 1] / f"{index}.png" for index, v in expected]
    assert [*map(pictures.file, range(8))] == files
    assert pictures.heldout.tolist() == [index in "34" for index, _ in expected]
    assert [fault.where for fault in pictures.faults] == [
        f"image/{missing}.png" for missing in ("One/2", "Two/3", "One/5", "Two/5")
    ]
    assert pictures.fingerprint != load(several, vendor="Two+One", limit=0, **SMALL).fingerprint
    assert load(several, vendor="One+Two+One", limit=0, **SMALL).names == pictures.names


def test_one_of_several_vendors_alone_is_as_ever(several):
    alone = load(several, vendor="Two", limit=0, **SMALL)
    assert alone.names == [f"thing {i}" for i in "1246"]
    assert alone.indexes == list("1246")


def test_no_row_is_on_both_sides_of_the_split(several):
    pictures = load(several, vendor="One+Two", limit=0, **SMALL)
    training, heldout = (dataset.side(pictures, heldout=which) for which in (False, True))
    assert (set(training.indexes), set(heldout.indexes)) == ({"1", "2", "6"}, {"3", "4"})
    assert len(training.names) == len(training.folders) == len(training.images) == 5
    assert (training.images[:, 0, 0, 0] == [10, 10, 20, 60, 60]).all()
    assert (len(heldout.keywords), heldout.heldout.tolist()) == (3, [True] * 3)


@pytest.mark.parametrize(("limit", "kept"), [(1, "11"), (2, "112"), (3, "11234466"), (9, "11234466")])
def test_limit_counts_rows_whoever_drew_them(several, limit, kept):
    assert load(several, vendor="Two+One", limit=limit, **SMALL).indexes == list(kept)


@pytest.mark.parametrize(
    ("vendor", "message"),
    [
        ("One+Tow", r"no folder 'Tow' \(of --vendor One\+Tow\); it has One, Two"),
        ("One+", r"no folder '' \(of --vendor One\+\)"),
        ("One+Empty", r"no captioned picture for vendor Empty .*first fault: image/Empty/1\.png"),
    ],
)
def test_errors_of_several_vendors_name_the_one(several, vendor, message):
    if "Empty" in vendor:
        (several / "image" / "Empty").mkdir()
    with pytest.raises(DatasetError, match=message):
        load(several, vendor=vendor, limit=0, **SMALL)


def test_a_folder_with_a_plus_in_its_name_is_one_vendor(several):
    (several / "image" / "One").rename(several / "image" / "a+b")
    assert load(several, vendor="a+b", limit=0, **SMALL).names[0] == "thing 1"


def test_a_broken_picture_of_one_vendor_leaves_the_others(several, monkeypatch):
    (several / "image" / "One" / "1.png").write_bytes(b"")
    monkeypatch.setattr(dataset, "MAX_BAD", 0.13)
    assert load(several, vendor="One+Two", limit=0, **SMALL).names[0] == "thing 1, Two style"
    monkeypatch.setattr(dataset, "MAX_BAD", 0.12)
    with pytest.raises(DatasetError, match="1 of 8 rows and pictures"):
        load(several, vendor="One+Two", limit=0, **SMALL)


# Memory.


def test_pictures_are_held_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 8)
    rows = [["#", "name"], *([i, "x"] for i in range(200))]
    root = write(tmp_path, rows, {str(i): png((i, 0, 0, 255)) for i in range(200)})
    size = {"shape": (64, 96, 3)}
    load(root, vendor="Google", limit=1, **size)  # what is imported on the way counts elsewhere
    for _ in range(2):  # the second time from the cache
        tracemalloc.start()
        pictures = load(root, vendor="Google", limit=0, **size)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert pictures.images.nbytes == 200 * 64 * 96 * 3
        assert peak < 1.25 * pictures.images.nbytes


def test_each_side_of_a_split_is_a_stretch_of_one_array(several, tiny, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 2)
    config = dataclasses.replace(tiny, data=str(several), vendor="One+Two", H=8, W=8)
    whole, sorted_ = load(several, vendor="One+Two", limit=0, **SMALL), dataset.from_config(config)
    assert sorted_.fingerprint == whole.fingerprint
    for which in (False, True):
        here, there = dataset.side(sorted_, heldout=which), dataset.side(whole, heldout=which)
        assert np.shares_memory(here.images, sorted_.images)
        np.testing.assert_array_equal(here.images, there.images)
        np.testing.assert_array_equal(here.heldout, there.heldout)
        assert here[1:5] == there[1:5]


def test_no_rows_are_no_pictures(three):
    assert dataset.select(load(three, vendor="Google", limit=0, **SMALL), []).images.shape == (0, 8, 8, 3)


# Pictures that stay on the disk.


def test_without_decoding_everything_but_the_pictures_is_the_same(several, monkeypatch):
    whole = load(several, vendor="One+Two", limit=0, **SMALL)
    monkeypatch.setattr(dataset, "fit", lambda *_: pytest.fail("decoded"))
    listed = load(several, vendor="One+Two", limit=0, **SMALL, decode=False)
    assert listed.images is None
    assert listed.fingerprint != whole.fingerprint
    assert listed[1:5] == whole[1:5]
    assert listed.faults == whole.faults
    assert dataset.side(listed, heldout=True).images is None


@pytest.mark.parametrize("kind", FAULTS)
def test_a_header_tells_most_faults_and_decoding_the_rest(three, kind, lenient):
    data, what = FAULTS[kind]
    file = three / "image" / "Google" / "2.png"
    file.write_bytes(data)
    listed = load(three, vendor="Google", limit=0, **SMALL, decode=False)
    if kind != "truncated":
        assert [fault.where for fault in listed.faults] == ["image/Google/2.png"]
        assert re.match(what, listed.faults[0].what)
    with pytest.raises(
        DatasetError, match=rf"Google/2\.png: {what}.*Put a good picture in its place.* --check --data "
    ):
        dataset.decoded(file, (8, 8, 3))
    np.testing.assert_array_equal(dataset.decoded(three / "image/Google/1.png", (8, 8, 3))[0, 0], [255, 0, 0])


def test_the_fingerprint_of_a_run_that_streams_is_known_again_with_the_pictures_decoded(three, tiny):
    config = dataclasses.replace(tiny, data=str(three), vendor="Google", H=8, W=8)
    streams = dataclasses.replace(config, stream=True)
    listed, whole = dataset.from_config(streams, decode=False), dataset.from_config(streams)
    assert (listed.images, len(whole.images)) == (None, 3)
    assert listed.fingerprint == whole.fingerprint != dataset.from_config(config).fingerprint
    (three / "image/Google/1.png").write_bytes(png(size=(16, 16)))
    assert dataset.from_config(streams, decode=False).fingerprint == listed.fingerprint  # mended: the run may go on
    (three / "image/Google/1.png").unlink()
    assert dataset.from_config(streams, decode=False).fingerprint != listed.fingerprint
