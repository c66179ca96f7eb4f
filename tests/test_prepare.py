"""Pictures and captions of one's own, and icon sets, become datasets."""

import csv
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import tyro
from PIL import Image, features

import dataset
import files
import prepare_dataset
from sources import folders, iconify, packages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


def picture(path: Path, colour="red", size=(8, 8), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def prepared(*words) -> int:
    return prepare_dataset.main(tyro.cli(prepare_dataset.Options, args=[str(word) for word in words]))


def rows(root: Path) -> list[dict]:
    with (root / dataset.CSV).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def captions(root: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["name"]) for row in rows(root)]


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def mine(tmp_path):
    """A folder of three pictures with a caption beside each, and the place of their dataset."""
    folder = tmp_path / "photos"
    for colour in ("blue", "green", "red"):
        picture(folder / f"{colour}.png", colour)
        text(folder / f"{colour}.txt", f"a {colour} square\n")
    return folder, tmp_path / "mine"


SQUARES = [(f"{colour}.png", f"a {colour} square") for colour in ("blue", "green", "red")]


# Folders.


def test_a_caption_beside_each_picture(mine, capsys):
    folder, root = mine
    shutil.move(folder / "red.png", picture(folder / "deep" / "er" / "red.png"))
    text(folder / "deep" / "er" / "red.txt", "\ufeffa red square\r\n\n  red,\tall \n")
    assert prepared("--from", folder, "--data", root) == 0
    assert captions(root) == [
        SQUARES[0],
        ("deep/er/red.png", "a red square"),
        ("deep/er/red.png", "red, all"),
        SQUARES[1],
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"{root}: no faults; 1 further captions of rows with the same #; pictures: 3 mine",
        f"Next: python train.py cpu --data {root} --vendor mine --output models_mine",
    ]
    loaded = dataset.load(root, vendor="mine", limit=0, shape=(8, 8, 3))
    assert loaded.names == ["a blue square", "a red square", "a green square"]
    assert loaded.others == [[], ["red, all"], []]
    assert loaded.images[:, 4, 4].tolist() == [[0, 0, 255], [255, 0, 0], [0, 128, 0]]
    assert loaded.faults == dataset.check(root) == []


def write_csv(path, table):
    text(path.with_suffix(".csv"), "\ufeff" + table.to_csv(index=False))


def write_jsonl(path, table):
    lines = [json.dumps({name: value for name, value in row.items() if value}) for row in table.to_dict("records")]
    text(path.with_suffix(".jsonl"), "\n".join(lines) + "\n\n")


def write_parquet(path, table):
    pytest.importorskip("pyarrow")
    table.to_parquet(path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_an_imagefolder_of_hugging_face(tmp_path, write, capsys):
    folder, root = tmp_path / "set", tmp_path / "mine"
    picture(folder / "train" / "a.jpg")
    picture(folder / "train" / "sub" / "b.jpg", "blue")
    picture(folder / "test" / "c.webp", "green", lossless=True)
    picture(folder / "more" / "val" / "test.png", "black")
    (folder / "more" / "val" / "test.txt").write_text("D")
    names, said = ["a.jpg", "sub/b.jpg", "a.jpg", "./a.jpg"], ["A, the first", 'said "b"', "", "A again"]
    write(folder / "train" / "metadata", pd.DataFrame({"file_name": names, "text": "no", "said": said}))
    write(folder / "test" / "metadata", pd.DataFrame({"file_name": ["c.webp"], "said": ["7"]}))
    assert prepared("--from", folder, "--data", root, "--caption_column", "said") == 0
    assert captions(root) == [
        ("more/val/test.png", "D"),
        ("test/c.webp", "7"),
        ("train/a.jpg", "A, the first"),
        ("train/a.jpg", "A again"),
        ("train/sub/b.jpg", 'said "b"'),
    ]
    assert [row["split"] for row in rows(root)] == ["heldout", "heldout", "train", "train", "train"]
    assert "left out, 1 × an empty caption: train/a.jpg\n" in capsys.readouterr().out
    assert dataset.check(root) == []


def test_metadata_count_before_a_text_and_may_hold_lists_numbers_and_nothing(tmp_path):
    folder, root = tmp_path / "set", tmp_path / "mine"
    for stem in "abcd":
        picture(folder / f"{stem}.png", size=(8, 9 + ord(stem)))
        text(folder / f"{stem}.txt", "beside")
    said = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.png", "text": 3}]
    said += [{"file_name": "c.png", "text": "lone \ud800, nul \0, x\ny"}]
    text(folder / "metadata.jsonl", "\n".join(map(json.dumps, said)))
    assert prepared("--from", folder, "--data", root) == 0
    expected = [
        ("a.png", "one"),
        ("a.png", "two"),
        ("b.png", "3"),
        ("c.png", "lone ?, nul \0, x y"),
        ("d.png", "beside"),
    ]
    assert captions(root) == expected
    assert dataset.check(root) == []


def test_pictures_are_links_where_the_trainer_reads_them_and_converted_elsewhere(tmp_path):
    folder, root = tmp_path / "set", tmp_path / "mine"
    endings = ["png", "jpg", "JPEG", "webp", "gif", "bmp", "tiff", "tga", "ppm", "ico", "jp2", "pcx"]
    endings += ["avif"] if features.check("avif") else []
    for number, ending in enumerate(endings):
        picture(folder / f"{number:02}.{ending}", (200, 40, 10 * number), size=(32, 32))
        text(folder / f"{number:02}.txt", ending)
    assert prepared("--from", folder, "--data", root) == 0
    assert dataset.check(root) == []
    for row in rows(root):
        source, target = folder / row["file"], root / "image" / "mine" / f"{row['#']}.png"
        linked = row["name"] in endings[:7]
        assert os.path.samefile(source, target) == linked
        with Image.open(target) as image:
            assert linked or image.format == "PNG"
            assert image.convert("RGB").getpixel((16, 16))[0] == pytest.approx(200, abs=4)
    assert len(rows(root)) == len(endings)


@pytest.mark.parametrize("refused", [["link"], ["link", "symlink"]])
def test_where_a_hard_link_cannot_be_there_is_a_symbolic_one_or_a_copy(mine, monkeypatch, refused):
    folder, root = mine

    def refuse(*_):
        raise OSError("not on this disk")

    for way in refused:
        monkeypatch.setattr(os, way, refuse)
    assert prepared("--from", folder, "--data", root) == 0
    assert captions(root) == SQUARES
    target = root / "image" / "mine" / "1.png"
    assert (target.is_symlink(), target.stat().st_nlink) == ("symlink" not in refused, 1)
    assert target.read_bytes() == (folder / "blue.png").read_bytes()


def test_what_is_left_out_is_named_with_its_reason(mine, capsys):
    folder, root = mine
    for number in range(5):
        picture(folder / f"bare{number}.png", size=(3, 3 + number))
    text(folder / "bare4.txt", " \n\n")
    text(folder / "notes.md", "no picture")
    picture(folder / ".hidden.png")
    picture(folder / ".git" / "x.png")
    text(folder / "broken.png", "no picture \x1b[31m")
    text(folder / "broken.txt", "a caption")
    whole_picture = picture(folder / "cut.png", size=(300, 300)).read_bytes()
    (folder / "cut.png").write_bytes(whole_picture[: len(whole_picture) // 2])
    text(folder / "cut.txt", "cut")
    shutil.copy(folder / "red.png", folder / "same.png")
    text(folder / "same.txt", "red once more\na red square")
    text(folder / "red.txt", "a red square\na red  square")
    picture(folder / "latin.png", size=(3, 9))
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    outside = picture(folder.parent / "outside.png")
    table = ["file_name,text", "../outside.png,x", f"{outside},y", "gone.png,z", "blue.png,a, b", "blue.png,in a table"]
    text(folder / "metadata.csv", "\n".join(table))
    assert prepared("--from", folder, "--data", root) == 0
    assert captions(root) == [
        ("blue.png", "in a table"),
        SQUARES[1],
        SQUARES[2],
        ("red.png", "red once more"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-2] == [
        f"left out, 2 × a file outside of the folder: ../outside.png in metadata.csv; {outside} in metadata.csv",
        "left out, 1 × no such file: gone.png in metadata.csv",
        "left out, 1 × a row with a comma too many, for want of quotation marks: blue.png in metadata.csv",
        "left out, 1 × a caption that cannot be read: latin.txt: it is not UTF-8",
        "left out, 5 × a picture without a caption: bare0.png; bare1.png; bare2.png; and 2 more",
        "left out, 1 × an empty caption: bare4.png",
        "left out, 1 × a caption given twice: red.png",
        f"left out, 2 × a picture that cannot be read: broken.png: not a picture (none of {', '.join(folders.KINDS)}); "
        "cut.png: a damaged picture: image file is truncated",
        "left out, 1 × a picture there twice, the first got its captions: same.png is red.png",
    ]
    assert lines[-2].endswith("pictures: 3 mine")
    assert len(list((root / "image" / "mine").iterdir())) == 3
    assert dataset.check(root) == []


def test_the_names_of_files_reach_neither_terminal_nor_csv_as_commands(tmp_path, capsys):
    folder, root = tmp_path / "set", tmp_path / "mine"
    for number, name in enumerate(["\x1b]0;owned\x07", "\udcff", "new\nline"]):
        picture(folder / "red.png", size=(4, 4 + number)).rename(folder / f"{name}.png")
        text(folder / f"{name}.txt", "named")
        picture(folder / "red.png", size=(3, 3 + number)).rename(folder / f"bare {name}.png")
    assert prepared("--from", folder, "--data", root) == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    assert [row["file"].isprintable() for row in rows(root)] == [True] * 3
    assert dataset.check(root) == []


def test_twice_is_once_and_a_folder_that_has_grown_is_followed(mine):
    folder, root = mine
    assert prepared("--from", folder, "--data", root) == 0
    before = snapshot(root)
    assert sorted(before) == ["ABOUT.txt", "full_emoji.csv", *(f"image/mine/{number}.png" for number in "123")]
    assert prepared("--from", folder, "--data", root) == 0
    assert snapshot(root) == before
    (folder / "blue.png").unlink()
    assert prepared("--from", folder, "--data", root) == 0
    assert captions(root) == SQUARES[1:]
    assert sorted(path.name for path in (root / "image" / "mine").iterdir()) == ["1.png", "2.png"]
    assert dataset.check(root) == []


def test_a_dataset_may_be_made_within_the_folder_of_its_pictures(mine):
    folder, _ = mine
    for _ in range(2):
        assert prepared("--from", folder, "--data", folder / "set") == 0
        assert captions(folder / "set") == SQUARES


def test_a_dataset_is_not_made_of_a_dataset(mine, capsys):
    folder, root = mine
    prepared("--from", folder, "--data", root)
    assert prepared("--from", root, "--data", root.parent / "other") == 1
    assert f"so it is a dataset already: train with --data {root}" in capsys.readouterr().err
    assert not (root.parent / "other").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "ABOUT.txt").unlink(), "holds another dataset. Choose another folder with --data"),
        (lambda root: text(root / "ABOUT.txt", "Icons\n"), "holds another dataset"),
        (lambda root: text(root / dataset.CSV, "#,name\n1,my own\n"), "this dataset, with a full_emoji.csv that was"),
        (lambda root: (root / dataset.CSV).unlink(), "this dataset, with a full_emoji.csv that was changed"),
    ],
)
def test_a_dataset_of_another_making_is_left_alone(mine, change, said, capsys):
    folder, root = mine
    prepared("--from", folder, "--data", root)
    change(root)
    before = snapshot(root)
    assert prepared("--from", folder, "--data", root) == 1
    assert said in capsys.readouterr().err
    assert snapshot(root) == before


def test_an_interruption_or_a_full_disk_leaves_what_was_there(mine, monkeypatch, capsys):
    folder, root = mine
    link, calls = folders._link, []

    def failing(source, target):
        calls.append(source)
        if len(calls) % 3 == 0:
            raise error
        link(source, target)

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):  # noqa: B007  (failing raises it)
        calls.clear()
        monkeypatch.setattr(folders, "_link", failing)
        assert prepared("--from", folder, "--data", root) == 1
        assert not root.exists()
    said = capsys.readouterr().err
    assert "nothing is half written. Run the same command again" in said
    assert "No space left" in said
    monkeypatch.setattr(folders, "_link", link)
    assert prepared("--from", folder, "--data", root) == 0
    before = snapshot(root)
    calls.clear()
    monkeypatch.setattr(folders, "_link", failing)
    assert prepared("--from", folder, "--data", root) == 1
    assert snapshot(root) == before
    assert sorted(path.name for path in root.iterdir()) == ["ABOUT.txt", "full_emoji.csv", "image"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "metadata.csv",
            "file_name,caption,tags\nblue.png,x,y\n",
            "has no column text, it has file_name, caption, tags; name",
        ),
        ("metadata.csv", "image,text\nblue.png,x\n", "has no column file_name, it has image, text"),
        ("metadata.jsonl", '{"file_name": "blue.png", "text": "x"}\n[1]\n', "cannot be read: its line 2 is no object"),
        ("metadata.jsonl", "[" * 100_000, "cannot be read: its line 1 is no object"),
        ("blue.txt", " ", ""),
    ],
)
def test_metadata_that_cannot_be_used_say_why(tmp_path, name, content, said, capsys):
    picture(tmp_path / "set" / "blue.png")
    text(tmp_path / "set" / name, content)
    assert prepared("--from", tmp_path / "set", "--data", tmp_path / "mine") == 1
    assert (said or "set has no captioned picture. A caption is a row of") in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_parquet_without_its_reader_says_what_to_install(mine, monkeypatch, capsys):
    folder, root = mine

    def missing(_):
        raise ImportError("no engine")

    monkeypatch.setattr(pd, "read_parquet", missing)
    text(folder / "metadata.parquet", "PAR1")
    assert prepared("--from", folder, "--data", root) == 1
    assert "metadata.parquet, Python needs another package: pip install pyarrow" in capsys.readouterr().err


def test_parquet_is_a_table_like_the_others(mine, monkeypatch):
    folder, root = mine
    table = pd.DataFrame({"file_name": ["red.png", "blue.png"], "text": [["one", "two"], None]})
    monkeypatch.setattr(pd, "read_parquet", lambda _: table)
    text(folder / "metadata.parquet", "PAR1")
    assert prepared("--from", folder, "--data", root) == 0
    assert captions(root) == [SQUARES[1], ("red.png", "one"), ("red.png", "two")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--from a --iconify b", "--from and --iconify exclude each other"),
        ("--from a --check --data mine", "--from and --check exclude each other"),
        ("--iconify a --vendor Google --data mine", "--iconify and --vendor exclude each other"),
        ("--caption_column a", "--caption_column needs --from"),
        ("--from a", "--from needs --data with the folder to make; emojiimage-dataset is that of the emoji"),
        ("--iconify a", "--iconify needs --data"),
        ("--from gone --data mine", "there is no folder "),
        ("--from . --data .", "is only read; name another folder in --data"),
    ],
)
def test_options_that_contradict_each_other_are_named(tmp_path, monkeypatch, words, said, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepared(*words.split()) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Icons.

SQUARE = '<path fill="currentColor" d="M2 2h12v12H2z"/>'
ICONS = {
    "prefix": "tiny-set",
    "height": 16,
    "icons": {
        "red-dot": {"body": '<circle cx="8" cy="8" r="8" fill="red"/>'},
        "square": {"body": SQUARE},
        "wide": {"body": '<path d="M0 0h32v16H0z"/>', "width": 32},
        "old-square": {"body": SQUARE, "hidden": True},
        "nothing": {"body": ""},
        "torn": {"body": "<path"},
        "endless": {"body": SQUARE, "width": 1e9},
        "bodiless": {"width": 16},
        "long": {"body": SQUARE + " " * 2**18},
        "thief": {"body": '<image href="/etc/passwd" width="9" height="9"/>'},
        "../evil": {"body": SQUARE},
        "strange": 3,
    },
    "aliases": {"box": {"parent": "square"}, "tall": {"parent": "wide", "rotate": 1}, "x": {"parent": "torn"}},
}
INFO = {"name": "Tiny \x1bSet", "author": {"name": "Ada", "url": "a.example"}, "license": {"title": "MIT"}}
METADATA = {"categories": {"Shapes, flat": ["square", "wide"], "Dots": ["red-dot"]}}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An npm that packs what the test puts into this dictionary: a file's name -> its object."""
    carried = {"icons": ICONS, "info": INFO, "metadata": METADATA, "package": {"version": "1.2.3"}}
    calls = []

    def run(command, cwd, **options):
        calls.append(command[-1])
        if command[-1] != "@iconify-json/tiny-set@latest":
            return subprocess.CompletedProcess(command, 1, "", "404")
        for name, what in carried.items():
            text(cwd / "package" / f"{name}.json", json.dumps(what))
        shutil.make_archive(str(cwd / "tiny"), "gztar", cwd, "package")
        (cwd / "tiny.tar.gz").rename(cwd / "iconify-json-tiny-set-1.2.3.tgz")
        shutil.rmtree(cwd / "package")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    carried["calls"] = calls
    return carried


def test_an_icon_set_is_drawn(registry, tmp_path, capsys):
    root = tmp_path / "icons"
    assert prepared("--iconify", "tiny-set", "--data", root) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["Tiny \\x1bSet 1.2.3 by Ada, a.example", "Licence: MIT"]
    assert (root / "ABOUT.txt").read_text().splitlines()[:3] == ["Icons of @iconify-json/tiny-set (npm)", *said[:2]]
    assert said[2] == "left out, 1 × a hidden icon: old-square"
    assert said[3].startswith("left out, 8 × an icon that cannot be drawn: nothing: it shows nothing; torn: ")
    assert said[4:] == [
        f"{root}: no faults; 1 further captions of rows with the same #; pictures: 3 tiny-set",
        f"Next: python train.py cpu --data {shlex.quote(str(root))} --vendor tiny-set --output models_tiny-set",
    ]
    assert [[*row.values()] for row in rows(root)] == [
        ["red-dot", "red dot", "Dots"],
        ["square", "square", "Shapes flat"],
        ["wide", "wide", "Shapes flat"],
        ["square", "box", ""],
    ]
    shown = {}
    for stem in ("red-dot", "square", "wide"):
        with Image.open(root / "image" / "tiny-set" / f"{stem}.png") as image:
            assert (image.size, image.mode) == ((128, 128), "RGBA")
            shown[stem] = [image.getpixel(place) for place in ((64, 64), (8, 8), (8, 64))]
    clear, black, red = (0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 255)
    assert shown == {"red-dot": [red, clear, red], "square": [black, clear, clear], "wide": [black, clear, black]}
    before = snapshot(root)
    assert prepared("--iconify", "tiny-set", "--data", root) == 0
    assert snapshot(root) == before
    assert registry["calls"] == ["@iconify-json/tiny-set@latest"]


@pytest.mark.parametrize("body", ['<use href="#a"/>', '<g fill="url(#a)"/>', "<g fill=\"url('#a')\"/>", "<g>url</g>"])
def test_drawings_may_refer_to_themselves(body):
    assert not iconify.FOREIGN.search(body)


@pytest.mark.parametrize(
    "body",
    ['<IMAGE xlink:href="x"/>', "<use href = 'x.svg#a'/>", '<g fill="url(a.svg#b)"/>', "<!DOCTYPE x>", "<?xml x?>"],
)
def test_drawings_may_not_refer_to_files(body):
    assert iconify.FOREIGN.search(body)


def test_a_set_that_says_little_of_itself(registry, tmp_path):
    for name in ("info", "metadata", "package"):
        registry[name] = []
    assert prepared("--iconify", "tiny-set", "--data", tmp_path / "icons") == 0
    about = (tmp_path / "icons" / "ABOUT.txt").read_text().splitlines()
    assert about[1:3] == ["A set None by unnamed authors", "Licence: not named, so ask before use"]


@pytest.mark.parametrize(
    ("icons", "said"),
    [
        ({**ICONS, "prefix": "../up"}, "has no prefix, no icons, or more than"),
        ({**ICONS, "icons": {}}, "has no prefix, no icons, or more than"),
        ({**ICONS, "icons": {"torn": {"body": "<"}}}, "has no icon that can be drawn"),
        ([], "has no prefix, no icons"),
    ],
)
def test_a_set_that_cannot_be_used_says_why(registry, tmp_path, icons, said, capsys):
    registry["icons"] = icons
    assert prepared("--iconify", "tiny-set", "--data", tmp_path / "icons") == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "icons").exists()


@pytest.mark.parametrize("name", ["no-such-set", "../tiny-set", "Tiny", "-g", "a" * 101, "@a/b", "tiny-set\n"])
def test_a_name_of_no_set_says_where_to_find_one(registry, tmp_path, name, capsys):
    options = prepare_dataset.Options(iconify=name, data=tmp_path / "icons")
    assert prepare_dataset.main(options) == 1
    assert "https://icon-sets.iconify.design lists all sets" in capsys.readouterr().err
    assert registry["calls"] == (["@iconify-json/no-such-set@latest"] if name == "no-such-set" else [])
    assert not (tmp_path / "icons").exists()
