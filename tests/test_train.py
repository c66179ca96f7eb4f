"""The scripts as a user runs them, on a small dataset of one's own and the real text encoder."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ablation import flags as flags_of
from damage import UNREADABLE, damaged
from PIL import Image
from tqdm import tqdm

import checkpoint
import dataloader
import dataset
import ema
import evaluate
import files
import parallel
import params
import run
import test as sampling_script
import train
import training
from images import save_png
from params import PRESETS, Params, Sampling
from pipeline import DiffusionPipeline
from run import Due, Run
from sharing import portable
from text_encoder import TextEncoder

ROOT = Path(__file__).parent.parent


flags = partial(flags_of, preset="quick")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a script's main() in a folder of its own; gives what it printed, and its message if it exits with one."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        code = ""
        try:
            script.main()
        except SystemExit as stop:
            code = str(stop.code)
        return "".join(capsys.readouterr()) + code

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def linear(linear_network):
    """Where a test is about the loop around the network."""
    with linear_network():
        yield


def metrics(folder="models_vA0"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(path, tiny):
    state = training.init_state(tiny, 384, jax.random.key(1))
    return checkpoint.restore(Path(path), training.to_checkpoint(state))


def test_a_checkpoint_knows_which_of_its_prompts_training_has_held_out(call, tiny, linear, tmp_path):
    data = shutil.copytree(tiny.data, tmp_path / "data")
    header, *rows = (data / "full_emoji.csv").read_text().splitlines()
    sides = [f"{row},{'heldout' if 'red' in row else 'train'}" for row in rows]
    (data / "full_emoji.csv").write_text("\n".join([f"{header},split", *sides]))
    assert "1 held out" in call(train, *flags(dataclasses.replace(tiny, data=str(data), epochs=1)))
    about = checkpoint.about(Path("models_vA0/final"))
    assert about["unseen"] == about["prompts"][-1:] == ["red disc"]


def test_from_nothing_to_pictures_and_on(call, tiny):
    said = call(train, *flags(tiny))
    assert "8 pictures of Mine to train on, 0 held out" in said
    assert "models_vA0/final and validation_images/models_vA0/final.png written. Next: python test.py" in said
    assert [line["step"] for line in metrics()] == [2, 3, 4, 6]
    assert all(np.isfinite(line["loss"]) and line["images_per_second"] > 0 for line in metrics())
    assert (Path("models_vA0/epoch1/about")).is_dir()
    about = checkpoint.about(Path("models_vA0/final"))
    assert Params.from_json(about["config"]) == tiny
    assert (about["schedule"], about["step"]) == ({"name": "cosine", "T": 50}, 6)
    assert about["prompts"][:2] == ["red disc", "green box"]

    assert "already holds final: go on with --resume" in call(train, *flags(tiny))
    longer = dataclasses.replace(tiny, epochs=4)
    assert "resumed from models_vA0/final, step 6" in call(train, *flags(longer), "--resume")
    assert [line["step"] for line in metrics()] == [2, 3, 4, 6, 8, 10, 11]
    call(train, *flags(longer), "--output", "undisturbed")
    for a, b in zip(
        jax.tree.leaves(weights("models_vA0/final", tiny)),
        jax.tree.leaves(weights("undisturbed/final", tiny)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)

    said = call(train, *flags(dataclasses.replace(longer, BASE_DIM=16)), "--resume")
    assert "BASE_DIM was 8, now 16. Leave these out" in said
    assert "epochs" in said.split("may change")[0].split("only")[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "VERSION", training.VERSION + 1)
        assert "trained by another version of this program" in call(train, *flags(longer), "--resume")

    said = call(sampling_script, "--prompts", "red disc", "a box, drawn", "--steps", "2")
    assert "validation_images/test/grid.png and 2 pictures beside it written" in said
    with Image.open("validation_images/test/02_a_box_drawn.png") as picture:
        assert picture.size == (12, 8)
    source = Path("validation_images/test/01_red_disc.png")
    first, again = source.read_bytes(), source.with_suffix("") / source.name
    said = call(sampling_script, "--like", str(source))
    assert f"{again.parent / 'grid.png'} and 1 pictures beside it" in said
    assert "sampled with other weights" not in said
    assert again.read_bytes() == first
    call(sampling_script, "--like", str(source), "--seed", "1")
    assert again.read_bytes() != first == source.read_bytes()
    assert "was sampled with other weights" in call(sampling_script, "--like", str(source), "--ema", "long")
    said = call(sampling_script, "--prompts", "red disc", "--to", "green box", "--steps", "2", "--frames", "3")
    strip = Path("validation_images/test/red_disc_0_to_green_box_0.png")
    assert f"{strip} and red_disc_0_to_green_box_0.gif written: 3 pictures" in said
    assert "red_disc_0_to_green_box_0.gif written: 3 pictures" in call(sampling_script, "--like", str(strip))
    assert (strip.with_suffix("") / strip.name).read_bytes() == strip.read_bytes()
    assert "--to and --image ask for different things" in call(sampling_script, "--to", "x", "--image", "y.png")
    assert "lead from one prompt, not 2" in call(sampling_script, "--to", "x", "--prompts", "a", "b")
    assert "--frames is about a way" in call(sampling_script, "--frames", "4")
    assert "steps = 5000: allowed are" in call(sampling_script, "--steps", "5000")
    words = ("--animate", "--steps", "2", "--image", str(again), "--output", "edited")
    said = call(sampling_script, "--prompts", "red disc", *words)
    assert "1 pictures beside it with a GIF each written" in said
    assert "name it with --image" in call(sampling_script, "--strength", "0.5")
    said = call(sampling_script, "--like", "edited/01_red_disc.png")
    assert "name the one that edited/01_red_disc.png was changed from with --image" in said
    assert "/proc/none cannot be written" in call(sampling_script, "--output", "/proc/none")
    assert "c = nan: allowed are" in call(sampling_script, "--c", "nan")
    assert "no checkpoint at" in call(sampling_script, "--checkpoint", "elsewhere")
    assert "prompt is empty" in call(sampling_script, "--prompts", "")

    said = call(evaluate, "--steps", "2")
    assert "8 captions of 8 training pictures, guidance 7" in said
    assert "chance                    12.5%    62.5%            4" in said


@pytest.fixture
def exported(tiny):
    """A function that writes an exported network of random weights and gives its folder and its weights."""

    def write(config=tiny, folder="pretrained"):
        state, random = training.init_state(config, 384, jax.random.key(1)), np.random.default_rng(0)
        given = jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), state.weights)
        about = {
            "config": config.to_json(), "encoder": TextEncoder(config.encoder).identity, "step": 5, "seconds": 1.0,
            "schedule": {"name": "cosine", "T": config.T}, "dataset": {"fingerprint": "0"}, "prompts": ["red disc"],
            "ema": "long", "sampling": {},
        }  # fmt: skip
        Path(folder).mkdir()
        portable.write(Path(folder), given, json.loads(json.dumps(about)), dtype="float32")
        return folder, given

    return write


def near(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), a, b)


def test_a_run_that_learns_nothing_ends_with_the_averages_that_it_started_from(call, tiny, linear, exported):
    folder, given = exported()
    still = dataclasses.replace(tiny, learning_rate=0.0)
    said = call(train, *flags(still), "--start_from", folder)
    drawer = DiffusionPipeline(folder)
    assert f"starting with the averaged weights of pretrained, {drawer.hash[:12]}…" in said
    found = weights("models_vA0/final", tiny)
    jax.tree.map(np.testing.assert_array_equal, found["train"]["weights"], given)
    near(found["ema_short"], given)
    near(found["ema_long"], given)
    assert checkpoint.about(Path("models_vA0/final"))["started_from"] == drawer.hash
    call(train, *flags(still), "--start_from", "models_vA0/final", "--output", "again")
    near(weights("again/final", tiny)["ema_short"], given)


def test_averages_hold_nothing_of_random_weights_from_the_first_step_on(call, tiny, linear, exported):
    folder, given = exported()
    config = dataclasses.replace(tiny, epochs=1, B=8, learning_rate=1e-4, warmup=0)  # a single step
    call(train, *flags(config), "--start_from", folder)
    for average in ("ema_short", "ema_long"):
        leaves = zip(*map(jax.tree.leaves, (weights("models_vA0/final", config)[average], given)), strict=True)
        moved = [np.abs(np.asarray(a) - b).max() for a, b in leaves]
        assert 0 < max(moved) < 1.1e-4  # Adam's first step is at most the learning rate, and the decay of weights less


def test_a_run_that_was_started_from_a_network_goes_on_without_it_to_the_same_end(call, tiny, linear, exported):
    folder, _ = exported()
    longer = dataclasses.replace(tiny, epochs=4)
    call(train, *flags(longer), "--start_from", folder, "--output", "undisturbed")
    call(train, *flags(tiny), "--start_from", folder)
    shutil.rmtree(folder)
    for more in (), ("--start_from", folder):  # the command that is printed still has it
        assert "resumed from models_vA0/final" in call(train, *flags(longer), *more, "--resume")
        assert "started_from" in checkpoint.about(Path("models_vA0/final"))
    resumed, undisturbed = (weights(f"{name}/final", tiny) for name in ("models_vA0", "undisturbed"))
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)


def test_the_network_comes_from_where_a_run_starts_and_the_recipe_from_the_command_line(
    call, tiny, linear, exported, tmp_path
):
    other = dataclasses.replace(tiny, TEXT_LEN=9, T=40, prediction="v", B=2, learning_rate=0.5)
    folder, _ = exported(other)
    words = ["quick", "--data", tiny.data, "--vendor", "Mine", "--epochs", "1", "--start_from", folder]
    call(train, *words, "--T", "40")
    found = Params.from_json(checkpoint.about(Path("models_vA0/final"))["config"])
    network = {name: vars(other)[name] for name in train.NETWORK}
    recipe = {"data": tiny.data, "vendor": "Mine", "epochs": 1, "encoder": tiny.encoder}
    assert found == dataclasses.replace(PRESETS["quick"], **network, **recipe)

    words += ["--output", "another"]
    refused = "--start_from: in the network of pretrained, H is 8, not 64; PATCH is 1, not 4. Leave these out"
    assert refused in call(train, *words, "--PATCH", "4", "--H=64")
    assert "the network of zero does not go with the other fields: zero_terminal_snr" in call(
        train, *words[:-3], exported(dataclasses.replace(other, zero_terminal_snr=True), "zero")[0],
        "--loss_weight", "min_snr", "--output", "another",
    )  # fmt: skip
    assert "no checkpoint at" in call(train, *words[:-3], "nowhere", "--output", "another")
    encoder = shutil.copytree(TextEncoder(tiny.encoder).folder, tmp_path / "encoder")
    assert "another/final and" in call(train, *words, "--encoder", encoder)
    (encoder / "config.json").write_text((encoder / "config.json").read_text() + "\n")
    words[-1] = "third"
    assert "pretrained was trained with the files" in call(train, *words, "--encoder", encoder)
    said = call(train, *words, "--dry_run")
    assert "prediction         v\n" in said
    assert not Path("third/final").exists()


def test_every_field_that_shapes_the_network_is_one_that_a_run_takes_over():
    shaping = set(re.findall(r"config\.(\w+)", (ROOT / "model.py").read_text())) - {"dropout", "compute"}
    assert shaping <= train.NETWORK <= {field.name for field in dataclasses.fields(Params)}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("text of a million letters")])
def test_a_grid_that_cannot_be_drawn_is_said_once_and_the_run_goes_on(call, tiny, linear, monkeypatch, error):
    def fails(*_):
        raise type(error)(*error.args)  # a new one each time

    monkeypatch.setattr(run, "save_png", fails)
    said = call(train, *flags(dataclasses.replace(tiny, epochs=3)))
    assert said.count("validation_images/models_vA0 cannot be ") == said.count("; going on without it") == 1
    assert str(error.args[-1]) in said
    assert "models_vA0/final written. Next: python test.py" in said
    assert checkpoint.about(Path("models_vA0/final"))["step"] == 8


@pytest.mark.parametrize("error", [RuntimeError("of any kind"), MemoryError(), OSError(5, "Input/output error")])
def test_whatever_ends_a_run_it_is_saved_first_and_goes_on_to_the_same_end(call, tiny, linear, monkeypatch, error):
    config = dataclasses.replace(tiny, epochs=4, save_every=9, sample_every=9)
    call(train, *flags(config), "--output", "undisturbed")

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Run, "due", lambda self, step: fails() if step == 7 else Due(0, False, False, step % 2 == 0))
        with pytest.raises(type(error)) if not isinstance(error, OSError) else nullcontext():
            assert "Input/output error" in call(train, *flags(config))
    assert checkpoint.about(Path("models_vA0/stopped"))["step"] == 7
    assert "resumed from models_vA0/stopped, step 7" in call(train, *flags(config), "--resume")
    resumed, undisturbed = (
        weights(f"{name}/final", tiny)["train"]["weights"] for name in ("models_vA0", "undisturbed")
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)


def test_a_second_trainer_in_the_folder_of_another_is_refused_and_changes_nothing(call, tiny, linear):
    Path("models_vA0/.unfinished/epoch1").mkdir(parents=True)
    with files.locked(Path("models_vA0")):
        for more in (), ("--resume",):
            assert "models_vA0 is in use by process" in call(train, *flags(tiny), *more)
        assert sorted(os.listdir("models_vA0")) == [".lock", ".unfinished"]
    assert "models_vA0/final and" in call(train, *flags(tiny))
    assert ".lock" not in os.listdir("models_vA0")


def test_the_commands_that_are_printed_can_be_pasted(call, tiny, linear, monkeypatch):
    output = "a folder; 'mine'"
    said = call(train, *flags(tiny), "--output", output)
    python, script, *words = shlex.split(said.split("Next: ")[1].splitlines()[0])
    assert (python, script) == ("python", "test.py")
    assert "pictures beside it written" in call(sampling_script, *words, "--steps", "1")
    monkeypatch.setattr(sys, "argv", ["/where it/is/train.py", "quick", "--resume", "--output", output])
    words = ["python", "/where it/is/train.py", "quick", "--output", output, "--resume"]
    assert shlex.split(train.command_to_resume()) == words


def test_grids_go_into_the_output_folder_where_their_own_cannot_be_written(call, tiny, linear):
    Path("validation_images").touch()
    said = call(train, *flags(tiny))
    assert "models_vA0/final and models_vA0/grids/final.png written" in said
    assert sorted(os.listdir("models_vA0/grids")) == ["epoch1.png", "final.png"]


def test_a_checkpoint_whose_configuration_is_of_another_kind_is_not_resumed(call, tiny, linear, monkeypatch):
    call(train, *flags(tiny))
    about = checkpoint.about(Path("models_vA0/final"))
    about["config"] |= {"B": 10**400}
    monkeypatch.setattr(checkpoint, "about", lambda path: about)
    assert "train.py: models_vA0/final: B = 1000" in call(train, *flags(tiny), "--resume")


def test_a_png_whose_text_is_of_another_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "a.png"
    whole = {"prompt": "red disc", "seed": "3", "sampling": json.dumps(Sampling().to_json())}
    for sampling in (*map(json.dumps, damaged(Sampling().to_json())), *UNREADABLE):
        save_png(Image.new("L", (1, 1)), path, whole | {"sampling": sampling})
        with suppress(ValueError):
            assert sampling_script.remembered(path).prompts == ("red disc",)
    for name in "seed", "strength", "to_seed", "frames":
        for odd in ("", "x", "[]", "1" * 5000)[: 3 if name == "strength" else 4]:  # that one is infinite
            save_png(Image.new("L", (1, 1)), path, whole | {name: odd})
            with pytest.raises(ValueError, match=r"a\.png was sampled by another version of this program"):
                sampling_script.remembered(path)


def test_ctrl_c_in_drawing_is_a_sentence(call, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling_script, "defaults", interrupted)
    assert call(sampling_script) == "\ninterrupted: nothing but whole pictures was written"


def test_an_error_before_the_first_step_leaves_no_checkpoint(call, tiny, linear, monkeypatch):
    def fails(*_):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(Run, "compile", fails)
    with pytest.raises(RuntimeError, match="does not compile"):
        call(train, *flags(tiny))
    assert checkpoint.newest(Path("models_vA0")) is None


def test_a_terminal_that_is_closed_stops_a_run_as_ctrl_c_does(call):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        received = train.catch_signals()
        os.kill(os.getpid(), number)
        assert received == [number]
    os.kill(os.getpid(), signal.SIGHUP)  # the shell's and the system's
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    train.catch_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.slow
def test_ctrl_c_saves_and_a_resumed_run_equals_an_undisturbed_one(tmp_path, tiny):
    config = dataclasses.replace(tiny, epochs=400, log_every=1, sample_every=1000, save_every=1000)
    words = [sys.executable, str(ROOT / "train.py"), *flags(config)]
    quiet = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = subprocess.Popen(words, cwd=tmp_path, env=quiet, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "models_vA0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    step = checkpoint.about(tmp_path / "models_vA0" / "stopped")["step"]
    assert 3 < step < 1000, said
    ends = [*words, "--epochs", str(step * 3 // 8 + 5)]
    for more in ("--resume",), ("--output", "undisturbed"):
        subprocess.run([*ends, *more], cwd=tmp_path, env=quiet, check=True, stdout=subprocess.DEVNULL)
    resumed, undisturbed = (weights(tmp_path / name / "final", tiny) for name in ("models_vA0", "undisturbed"))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def run_of(config, concepts, step=0):
    return Run(config, Path(), Path(), None, concepts, {}, None, None, step, None)


def calls(run, steps_per_call):
    """How many steps each program takes from here to the end."""
    while run.step < run.last_step:
        n = run.steps_in_call(steps_per_call)
        yield n
        run.step += n


@pytest.mark.parametrize(
    ("B", "concepts", "every", "most"),
    [(64, 1824, (50, 10, 15), 10), (8, 64, (50, 6, 9), 10), (3, 8, (4, 3, 4), 4), (7, 5, (3, 1, 2), 5)],
    ids=str,
)
def test_a_program_of_several_steps_never_passes_over_one_after_which_something_is_due(B, concepts, every, most):
    log_every, sample_every, save_every = every
    config = Params(B=B, epochs=30, log_every=log_every, sample_every=sample_every, save_every=save_every)
    run = run_of(config, concepts)
    steps, lengths = run.last_step, list(calls(run, most))
    reached = np.cumsum(lengths).tolist()
    assert (steps - 1) * B < 30 * concepts <= steps * B
    assert reached[-1] == steps
    assert {step for step in range(1, steps + 1) if run.due(step).logging} <= set(reached)
    assert set(lengths) == ({1, most} if log_every >= most else {1})
    assert list(calls(run_of(config, concepts, reached[2]), most)) == lengths[3:]
    assert set(calls(run_of(config, concepts), 1)) == {1}


def test_the_preset_for_a_gpu_needs_no_program_of_single_steps():
    assert set(calls(run_of(PRESETS["emoji64"], 1824), ema.EVERY)) == {ema.EVERY}


def test_a_run_of_a_million_epochs_begins_at_once(call, tiny, linear):
    config = dataclasses.replace(tiny, epochs=1_000_000, minutes=0.02, sample_every=10**6, save_every=10**6)
    assert "models_vA0/final and" in call(train, *flags(config))
    about = checkpoint.about(Path("models_vA0/final"))
    assert 1.2 <= about["seconds"] < 30
    assert about["step"] == metrics()[-1]["step"] > 1


def test_one_epoch_draws_what_it_learned_and_a_resumed_run_keeps_its_configuration(call, tiny, linear, monkeypatch):
    config = dataclasses.replace(tiny, epochs=1, B=8)  # a single step
    call(train, *flags(config))
    saved = weights("models_vA0/final", config)
    for name in ("ema_short", "ema_long"):
        for a, b in zip(jax.tree.leaves(saved[name]), jax.tree.leaves(saved["train"]["weights"]), strict=True):
            np.testing.assert_array_equal(a, b)
    preset = dataclasses.replace(PRESETS["quick"], B=16, dropout=0.1)  # as of a later version of the program
    monkeypatch.setitem(params.PRESETS, "quick", preset)
    said = call(train, "quick", "--epochs", "2", "--resume")
    assert "resumed from models_vA0/final, step 1" in said
    saved = checkpoint.about(Path("models_vA0/final"))["config"]
    assert Params.from_json(saved) == dataclasses.replace(config, epochs=2)
    assert "dropout was 0.0, now 0.2" in call(train, "quick", "--dropout", "0.2", "--resume")


def test_an_accelerator_takes_steps_together_and_the_run_is_the_same(call, tiny, linear, monkeypatch):
    config = dataclasses.replace(tiny, log_every=4, epochs=6, sample_every=1000, save_every=4)
    call(train, *flags(config), "--output", "by_itself")
    monkeypatch.setattr(parallel, "on_accelerator", lambda: True)
    monkeypatch.setattr(ema, "EVERY", 4)
    taken, steps_in_call = [], Run.steps_in_call
    monkeypatch.setattr(Run, "steps_in_call", lambda run, most: taken.append(steps_in_call(run, most)) or taken[-1])
    call(train, *flags(config), "--output", "undisturbed")
    assert taken == [4, 4, 1, 1, 1, 1, 4]  # epoch 4 ends with step 11
    apart, at_once = metrics("by_itself"), metrics("undisturbed")
    assert [line["step"] for line in apart] == [line["step"] for line in at_once] == [4, 8, 11, 12, 16]
    for field in ("loss", "grad_norm", "learning_rate", "epoch"):
        np.testing.assert_allclose([line[field] for line in apart], [line[field] for line in at_once], rtol=1e-3)

    Path("undisturbed").rename("resumed")
    Path("resumed/final").rename("undisturbed")
    assert "resumed from resumed/epoch4, step 11" in call(train, *flags(config), "--output", "resumed", "--resume")
    assert taken[7:] == [1, 4]
    resumed, undisturbed = (weights(path, tiny) for path in ("resumed/final", "undisturbed"))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_seal_lets_nothing_through_but_what_says_that_it_is_a_transfer(sealed):
    double, x = jax.jit(lambda x: 2 * x), jnp.ones(())
    with sealed():
        for read in (float, int, bool, repr, "{:.2f}".format, lambda x: x.item(), lambda x: x.tolist()):
            with pytest.raises(AssertionError, match="device_get"):
                read(x)
        for write in (double, jnp.asarray, jnp.float32, lambda one: x + one):
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
                write(1.0)
        assert jax.device_get(double(jax.device_put(np.float32(3)))) == 6


@pytest.mark.parametrize("steps_per_call", [4, 1])
def test_the_training_loop_makes_no_transfer_that_it_does_not_name(
    call, tiny, linear, sealed, monkeypatch, steps_per_call
):
    class Bar(tqdm):
        """The bar around the loop."""

        def __enter__(self):
            self.seal = sealed()
            self.seal.__enter__()
            return super().__enter__()

        def __exit__(self, *error):
            self.seal.__exit__(*error)
            return super().__exit__(*error)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(parallel, "on_accelerator", lambda: steps_per_call > 1)
    monkeypatch.setattr(ema, "EVERY", 4)
    config = dataclasses.replace(tiny, log_every=4, epochs=6, sample_every=1000, save_every=4)
    assert "models_vA0/final and" in call(train, *flags(config))
    assert [line["step"] for line in metrics()] == [4, 8, 11, 12, 16]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_weights_of_an_undisturbed_one(tmp_path, tiny):
    config = dataclasses.replace(tiny, epochs=100_000, log_every=1, sample_every=100_000, save_every=1, keep=2)
    words = [sys.executable, str(ROOT / "train.py"), *flags(config), "--resume"]
    quiet = {**os.environ, "JAX_PLATFORMS": "cpu"}
    log = tmp_path / "models_vA0" / "metrics.jsonl"
    random = np.random.default_rng(0)

    def lines():
        return log.read_text().count("\n") if log.exists() and log.stat().st_mtime > started else None

    for _ in range(20):
        started = time.time()
        with (tmp_path / "said.txt").open("a") as said:
            running = subprocess.Popen(words, cwd=tmp_path, env=quiet, stdout=said, stderr=said)
        while running.poll() is None and (begun := lines()) is None:
            time.sleep(0.02)  # until the log of this start is there, with the lines that it keeps
        while running.poll() is None and lines() == begun:
            time.sleep(0.02)  # until it trains
        time.sleep(random.uniform(0, 3))
        assert running.poll() is None, (tmp_path / "said.txt").read_text()
        running.kill()
        running.wait()
    step = checkpoint.about(checkpoint.newest(tmp_path / "models_vA0"))["step"]
    ends = [*words, "--epochs", str(step * 3 // 8 + 5)]
    for more in (), ("--output", "undisturbed"):
        subprocess.run([*ends, *more], cwd=tmp_path, env=quiet, check=True, stdout=subprocess.DEVNULL)
    resumed, undisturbed = (weights(tmp_path / name / "final", tiny) for name in ("models_vA0", "undisturbed"))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(undisturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_state(call, tiny, linear, monkeypatch):
    memory = dataloader.Memory

    def poisoned(*args):
        source = memory(*args)
        source.data = source.data._replace(text_emb=jnp.full_like(source.data.text_emb, jnp.nan))
        return source

    monkeypatch.setattr(dataloader, "Memory", poisoned)
    said = call(train, *flags(dataclasses.replace(tiny, log_every=4, epochs=8, sample_every=9, save_every=9)))
    assert "up to step 4, 4 steps in a row were not finite, their loss already, and changed no weight" in said
    assert "; models_vA0/stopped written. Go on: python train.py quick" in said
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights("models_vA0/stopped", tiny)))


def test_a_run_that_streams_its_pictures_learns_the_same(call, tiny, linear):
    losses = []
    for config in tiny, dataclasses.replace(tiny, stream=True):
        assert "models_vA0/final and" in call(train, *flags(config))
        losses.append([line["loss"] for line in metrics()])
        Path("models_vA0").rename(f"{len(losses)}")
    np.testing.assert_allclose(*losses, rtol=1e-4)  # the batches are equal, two programs round differently


def test_a_picture_that_breaks_while_it_streams_ends_the_run_with_a_checkpoint(call, tiny, linear, monkeypatch):
    decoded, seen = dataset.decoded, []

    def breaks(file, shape):
        seen.append(file)
        return decoded(file if len(seen) < 60 else Path("gone.png").absolute(), shape)

    monkeypatch.setattr(dataset, "decoded", breaks)
    said = call(train, *flags(dataclasses.replace(tiny, stream=True, epochs=100, sample_every=100)))
    assert "gone.png: there is no such file. Put a good picture in its place and go on with --resume" in said
    assert 0 < checkpoint.about(Path("models_vA0/stopped"))["step"] < 60 // tiny.B


def test_transparent_pictures_from_training_to_drawing(call, tiny, linear):
    config = dataclasses.replace(tiny, CHANNELS=4, epochs=1)
    assert "models_vA0/final and" in call(train, *flags(config))
    call(sampling_script, "--prompts", "red disc", "--steps", "3")
    with Image.open("validation_images/test/01_red_disc.png") as clear:
        assert clear.mode == "RGBA"


def test_a_dry_run_prints_the_cost_and_leaves_nothing(call, tiny, linear, tmp_path):
    said = call(train, *flags(dataclasses.replace(tiny, decay="cosine")), "--dry_run")
    assert "BASE_DIM           8\n" in said
    for cost in ("parameters ", "FLOPs per step ", "memory per step "):
        assert cost in said
    assert "--resume and --dry_run ask for different things" in call(train, "quick", "--dry_run", "--resume")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quikc"], "no preset 'quikc'; did you mean 'quick'"),
        (["quick", "--data", "nowhere"], "no folder nowhere"),
        (["quick", "--output", "/proc/none"], "/proc/none cannot be written"),
    ],
)
def test_what_cannot_be_run_is_refused(call, words, message):
    assert message in call(train, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--B", "0"], "B = 0: allowed are whole numbers from 1 to"), (["--MAX_INDX", "3"], "--MAX_INDEX")],
)
def test_wrong_fields_are_named(call, words, message):
    assert message in " ".join(call(train, "quick", *words).replace("│", "").split())


@pytest.mark.parametrize("script", ["train", "test", "evaluate", "export", "prepare_dataset", "app"])
def test_help_needs_neither_jax_nor_pandas(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
    code += f"try: runpy.run_module('{script}', run_name='__main__', alter_sys=True)\n"
    heavy = {"jax", "pandas", "flax", "transformers", "matplotlib", "gradio"}
    code += f"except SystemExit: print({heavy} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.endswith("set()\n")
