"""From a checkpoint to pictures, with the real text encoder and a network too small to draw anything."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import checkpoint
import pipeline as pipelines
import schedule as schedules
import training
from pipeline import DiffusionPipeline
from samplers import ddim, guide, threshold, trailing
from text_encoder import TextEncoder


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A checkpoint whose weights are random, so that words and seeds both matter."""
    encoder = TextEncoder(tiny.encoder)
    state = training.init(tiny, encoder.dim, jax.random.key(0))
    random = np.random.default_rng(0)

    def noise(weights):
        return jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), weights)

    path = tmp_path_factory.mktemp("models") / "final"
    about = {"config": tiny.to_json(), "encoder": encoder.identity, "step": 1, "prompts": ["red disc", "blue disc"]}
    about["schedule"] = {"name": "cosine", "T": tiny.T}
    items = {"ema_short": noise(state.ema.short), "ema_long": noise(state.ema.long), "train": {"step": state.step}}
    checkpoint.save(path, items, about=json.loads(json.dumps(about)))
    return path


@pytest.fixture(scope="session")
def drawer(trained):
    return DiffusionPipeline(trained)


def test_a_picture_is_returned_and_written_with_its_origin(drawer, tmp_path):
    path = tmp_path / "new folder" / "disc.png"
    image = drawer.generate_image("red disc", path, cfg=True, c=7, steps=3)
    assert (image.size, image.mode) == ((12, 8), "RGB")
    with Image.open(path) as written:
        np.testing.assert_array_equal(written, image)
        assert (written.text["prompt"], written.text["c"]) == ("red disc", "7")
    assert drawer.generate_image("red disc", steps=3, size=30).size == (30, 20)


def test_a_picture_depends_on_its_prompt_and_seed_alone(drawer, trained):
    prompts = ["red disc", "blue box", "a green box", "red disc", "yellow disc"]
    seeds = [3, 1, 4, 1, 5]
    together = drawer.generate_arrays(prompts, steps=4, seeds=seeds)
    backwards = drawer.generate_arrays(prompts[::-1], steps=4, seeds=seeds[::-1])[::-1]
    np.testing.assert_array_equal(together, backwards)
    another = DiffusionPipeline(trained)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        np.testing.assert_array_equal(another.generate_image(prompt, steps=4, seed=seed), together[i])
    assert (together[0] != together[3]).any()  # another seed
    assert (drawer.generate_arrays(["blue box"], steps=4, seeds=[3])[0] != together[0]).any()  # another prompt


def test_guidance_of_one_is_no_guidance_and_needs_no_second_evaluation(drawer):
    plain = drawer.generate_arrays(["red disc"], cfg=False, steps=4)
    np.testing.assert_array_equal(drawer.generate_arrays(["red disc"], c=1, steps=4), plain)
    np.testing.assert_allclose(
        drawer.generate_arrays(["red disc"], c=1.00001, steps=4).astype(int), plain.astype(int), atol=1
    )
    assert (drawer.generate_arrays(["red disc"], c=7, steps=4) != plain).any()


def test_another_guidance_seed_or_prompt_compiles_nothing(drawer):
    drawer.generate_arrays(["red disc"], c=7, steps=2)
    compiled = drawer._draw._cache_size()
    for c in (0, 2, 3.5, 100):
        drawer.generate_arrays(["blue box"] * 5, c=c, steps=2, seeds=[1, 2, 3, 4, int(c)])
    assert drawer._draw._cache_size() == compiled


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_drawing_is_ddim_over_guided_and_thresholded_estimates(drawer, tiny, prediction):
    """The drawing function against its parts, put together by hand for one picture."""
    text, mask = map(jnp.asarray, drawer.encoder(["red disc", ""], tiny.TEXT_LEN))
    graphdef = training.structure(tiny, drawer.encoder.dim)
    model = pipelines.nnx.merge(graphdef, pipelines.nnx.State(drawer.weights))
    schedule = schedules.cosine(tiny.T)
    convert = {"eps": schedules.denoised_from_eps, "v": schedules.denoised_from_v, "x0": lambda s, x, out, t: out}

    @jax.jit
    def by_hand(noise):
        def denoise(noisy, t):
            both = [model(noisy, t, text[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
            return threshold(convert[prediction](schedule, noisy, guide(*both, jnp.float32(3)), t))

        return ddim(denoise, schedule, noise, trailing(tiny.T, 5))

    expected = by_hand(jax.random.normal(jax.random.key(9), (1, tiny.H, tiny.W, 3)))
    draw = pipelines.build_draw(dataclasses.replace(tiny, prediction=prediction), graphdef)
    null, seed = (text[1], mask[1]), np.array([9], np.int32)
    drawn = draw(drawer.weights, seed, text[:1], mask[:1], null, 3.0, steps=5, guided=True)
    np.testing.assert_allclose(drawn.astype(float) / 127.5 - 1, expected, atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": ["disc", "  "]}, "prompt is empty"),
        ({"prompts": "disc"}, "list of prompts"),
        ({"steps": 0}, "steps = 0.*1 to the 50"),
        ({"steps": 51}, "steps = 51.*1 to the 50"),
        ({"c": float("nan")}, "c = nan"),
        ({"c": -1}, "c = -1"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": -1}, "seed = .*-1"),
        ({"size": 0}, "size = 0"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(drawer, wrong, message):
    with pytest.raises(ValueError, match=message):
        drawer.generate_images(**{"prompts": ["disc"], "steps": 1, **wrong})


# Orbax reads in parallel: where one read fails, the others complain to a loop that is closed.
failing_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def copy(trained, tmp_path, **changes):
    about = {**checkpoint.about(trained), **changes}
    like = jax.tree.map(np.asarray, DiffusionPipeline(trained).weights)
    items = {"ema_short": like, "ema_long": like, "train": {"step": np.int32(1)}}
    checkpoint.save(tmp_path / "copy", items, about=about)
    return tmp_path / "copy"


def test_no_checkpoint_says_what_there_is(trained, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint at .*nowhere; train one: python train.py"):
        DiffusionPipeline(tmp_path / "nowhere")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint at .*epoch9; there are .*final"):
        DiffusionPipeline(trained.parent / "epoch9")


@failing_reads
def test_a_half_written_checkpoint_is_refused(trained, tmp_path):
    half = copy(trained, tmp_path)
    for file in sorted(half.rglob("*"), reverse=True):
        if "ema_short" in file.parts and file.is_file():
            file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="copy: ema_short cannot be read"):
        DiffusionPipeline(half)
    (half / "about").rename(half / "gone")
    with pytest.raises(checkpoint.CheckpointError, match="lacks about"):
        DiffusionPipeline(half)


@failing_reads
def test_a_checkpoint_of_another_encoder_or_configuration_is_refused(trained, tiny, tmp_path):
    other = copy(trained, tmp_path, encoder={"name": tiny.encoder, "sha256": "0" * 64})
    with pytest.raises(checkpoint.CheckpointError, match="trained with the files 000000000000"):
        DiffusionPipeline(other)
    wider = dataclasses.replace(tiny, BASE_DIM=16).to_json()
    with pytest.raises(checkpoint.CheckpointError, match="copy: ema_short cannot be read"):
        DiffusionPipeline(copy(trained, tmp_path, config=wider))
    with pytest.raises(checkpoint.CheckpointError, match=r"schedule .*linear.*only 'cosine' is known"):
        DiffusionPipeline(copy(trained, tmp_path, schedule={"name": "linear", "T": 50}))
    with pytest.raises(checkpoint.CheckpointError, match="unknown fields"):
        DiffusionPipeline(copy(trained, tmp_path, config={**tiny.to_json(), "colour": 1}))


def test_weights_that_are_not_finite_draw_nothing(trained, tmp_path):
    path = copy(trained, tmp_path)
    broken = DiffusionPipeline(path)
    nan = jax.tree.map(lambda w: np.full(w.shape, np.nan, np.float32), broken.weights)
    checkpoint.save(path, {"ema_short": nan, "ema_long": nan, "train": {"step": np.int32(1)}}, about=broken.about)
    with pytest.raises(checkpoint.CheckpointError, match="non-finite"):
        DiffusionPipeline(path)


def test_a_checkpoint_is_replaced_only_by_a_whole_one(trained, tmp_path, monkeypatch):
    path = copy(trained, tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {}, about={})
    monkeypatch.undo()
    assert DiffusionPipeline(path).config == DiffusionPipeline(trained).config


def small(path, step):
    items = {"ema_short": {"w": np.ones(1)}, "ema_long": {"w": np.ones(1)}, "train": {"step": np.int32(step)}}
    checkpoint.save(path, items, about={"step": step})


def test_the_newest_checkpoint_is_the_readable_one_that_has_trained_longest(tmp_path, capsys):
    assert checkpoint.newest(tmp_path) is None
    for name, step in (("epoch9", 90), ("epoch10", 100), ("stopped", 95), ("epoch11.copy", 110), ("epoch12", 120)):
        small(tmp_path / name, step)
    (tmp_path / "epoch12" / "about" / "metadata").write_text("{")
    assert checkpoint.newest(tmp_path).name == "epoch10"
    assert "passed over: " in capsys.readouterr().out


def test_a_replacement_cut_off_between_its_renames_loses_nothing(tmp_path):
    small(tmp_path / "final", 1)
    (tmp_path / "final").rename(tmp_path / ".final.old")
    assert checkpoint.about(tmp_path / "final") == {"step": 1}
    (tmp_path / "final").rename(tmp_path / ".final.old")
    assert checkpoint.newest(tmp_path) == tmp_path / "final"
    small(tmp_path / "final", 2)
    assert checkpoint.about(tmp_path / "final") == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
