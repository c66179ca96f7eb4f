"""From a checkpoint to pictures, with the real text encoder and a network too small to draw anything."""

import dataclasses
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import checkpoint
import samplers
import sampling as sampling_module
import schedule as schedules
import training
from images import on_white, save_png, to_bytes
from model import abstract
from params import Sampling, SolverName
from pipeline import DiffusionPipeline, Edit
from test import remembered
from text_encoder import TextEncoder


@pytest.fixture(scope="session")
def tiny(tiny):
    """Random velocities give pictures in which each word shows; random noise gives only black and white."""
    return dataclasses.replace(tiny, prediction="v")


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A checkpoint whose weights are random, so that words and seeds both matter."""
    encoder = TextEncoder(tiny.encoder)
    state = training.init_state(tiny, encoder.dim, jax.random.key(0))
    random = np.random.default_rng(0)

    def noise(weights):
        return jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), weights)

    path = tmp_path_factory.mktemp("models") / "final"
    about = {"config": tiny.to_json(), "encoder": encoder.identity, "step": 1, "prompts": ["red disc", "blue disc"]}
    about["unseen"] = ["blue disc"]
    about |= {"schedule": {"name": "cosine", "T": tiny.T}, "dataset": {"fingerprint": "0"}, "seconds": 1.5}
    items = {"ema_short": noise(state.ema.short), "ema_long": noise(state.ema.long), "train": {"step": state.step}}
    checkpoint.Saver().save(path, items, about=json.loads(json.dumps(about)), now=True)
    return path


@pytest.fixture(scope="session")
def drawer(trained):
    return DiffusionPipeline(trained)


@pytest.fixture(scope="session")
def other(trained, tmp_path_factory):
    """A pipeline of other weights, with the folder of its checkpoint."""
    drawer = DiffusionPipeline(trained, ema="long")
    path = tmp_path_factory.mktemp("models") / "other"
    items = {"ema_short": drawer.weights, "ema_long": drawer.weights, "train": {"step": np.int32(1)}}
    checkpoint.Saver().save(path, items, about=drawer.about, now=True)
    drawer.path = path
    return drawer


def test_a_picture_is_returned_and_written_with_how_it_was_made(drawer, tmp_path):
    path = tmp_path / "new folder" / "disc.png"
    image = drawer.generate_image("red disc", path, cfg=True, c=7, steps=3)
    assert (image.size, image.mode) == ((12, 8), "RGB")
    with Image.open(path) as written:
        np.testing.assert_array_equal(written, image)
        assert (written.text["prompt"], written.text["checkpoint"]) == ("red disc", drawer.hash)
    with pytest.raises(OSError, match="cannot be written"):
        drawer.generate_image("red disc", "/proc/none/disc.png", steps=3)


def test_a_png_tells_how_to_sample_it_again(drawer, tmp_path):
    path = tmp_path / "disc.png"
    sampling = Sampling(sampler="dpmpp_2m_sde", rescale=0.3, temperature=0.5, interval=(0.1, 0.9))
    options = {"steps": 3, "seed": 5, "negative_prompt": "blue – très", "sampling": sampling}
    image = drawer.generate_image("red disc", path, True, 2.5, **options)
    told = remembered(path)
    assert told.sampling == dataclasses.replace(sampling, c=2.5, steps=3, eta=None, negative_prompt="blue – très")
    again = drawer.generate_image(told.prompts[0], sampling=told.sampling, c=None, seed=told.seed)
    np.testing.assert_array_equal(again, image)
    Image.new("RGB", (3, 3)).save(tmp_path / "bare.png")
    with pytest.raises(ValueError, match=r"bare\.png does not say how it was sampled"):
        remembered(tmp_path / "bare.png")


def test_a_png_of_an_older_version_is_read_or_refused_with_the_reason(drawer, tmp_path):
    text = drawer.metadata("red disc", 5, Sampling(steps=3))
    old = json.loads(text["sampling"]) | {"on_white": True, "spacing": "trailing"}
    save_png(Image.new("RGB", (3, 3)), tmp_path / "old.png", text | {"sampling": json.dumps(old)})
    assert remembered(tmp_path / "old.png").sampling == Sampling(steps=3)
    for gone, message in (
        ({"sampler": "euler"}, "sampler = 'euler': allowed are ddim"),
        ({"x": 1}, "unknown fields .'x'"),
        ({"spacing": "log_snr"}, "it knew steps with spacing 'log_snr'"),
    ):
        save_png(Image.new("RGB", (3, 3)), tmp_path / "gone.png", text | {"sampling": json.dumps(old | gone)})
        with pytest.raises(ValueError, match=rf"gone\.png was sampled by another version.*{message}"):
            remembered(tmp_path / "gone.png")


def test_drawing_makes_no_transfer_that_it_does_not_name(drawer, sealed):
    with sealed():
        drawer.generate_arrays(["red disc", "blue box"], Sampling(steps=3, sampler="dpmpp_2m_sde"), seeds=[1, 2])


def test_a_picture_depends_on_its_prompt_and_seed_alone(drawer, trained):
    prompts = ["red disc", "blue box", "a green box", "red disc", "yellow disc"]
    seeds = [3, 1, 4, 1, 5]
    sampling = Sampling(steps=4, eta=0.5)
    together = drawer.generate_arrays(prompts, sampling, seeds=seeds)
    backwards = drawer.generate_arrays(prompts[::-1], sampling, seeds=seeds[::-1])[::-1]
    np.testing.assert_array_equal(together, backwards)
    another = DiffusionPipeline(trained)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        np.testing.assert_array_equal(another.generate_image(prompt, steps=4, seed=seed, eta=0.5), together[i])
    assert (together[0] != together[3]).any()  # another seed
    assert (drawer.generate_arrays(["blue box"], sampling, seeds=[3])[0] != together[0]).any()  # another prompt


def test_a_batch_of_several_draws_what_a_batch_of_one_draws(drawer, trained):
    """As on a GPU: fixed batches, the last one filled up."""
    wide = DiffusionPipeline(trained)
    wide.batch = 2
    prompts, seeds = ["red disc", "blue box", "a green box"], [3, 1, 4]
    drawn = [each.generate_arrays(prompts, Sampling(steps=4), seeds=seeds).astype(int) for each in (drawer, wide)]
    np.testing.assert_allclose(*drawn, atol=1)


def test_threads_may_draw_at_once(drawer, tmp_path):
    jobs = [(prompt, seed) for seed in range(4) for prompt in ("red disc", "blue box")]

    def draw(job):
        return np.asarray(drawer.generate_image(job[0], tmp_path / f"{job}.png", seed=job[1], steps=3))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, jobs))
    np.testing.assert_array_equal(together, [draw(job) for job in jobs])


def test_guidance_of_one_is_no_guidance_and_needs_no_second_evaluation(drawer, monkeypatch):
    config = dataclasses.replace(drawer.config, seed=1)  # a function of its own, not compiled before
    drawer = DiffusionPipeline.from_weights(config, drawer.encoder, drawer.weights)
    rows, call = [], nnx.merge
    monkeypatch.setattr(
        nnx,
        "merge",
        lambda *a: lambda noisy, *inputs: rows.append(len(noisy)) or call(*a)(noisy, *inputs),
    )
    draw = np.asarray
    plain = draw(drawer.generate_image("red disc", cfg=False, steps=5))
    np.testing.assert_array_equal(draw(drawer.generate_image("red disc", c=1, steps=5)), plain)
    assert set(rows) == {1}
    nearly = draw(drawer.generate_image("red disc", c=1.00001, steps=5))
    np.testing.assert_allclose(nearly.astype(int), plain.astype(int), atol=1)
    assert set(rows) == {1, 2}
    assert (draw(drawer.generate_image("red disc", c=7, steps=5)) != plain).any()


def test_only_another_kind_of_step_or_guidance_is_compiled_anew(drawer, monkeypatch):
    drawer.generate_arrays(["red disc"], Sampling(steps=2, interval=(0.1, 0.9)))
    traces = []
    monkeypatch.setattr(sampling_module, "to_bytes", lambda image: traces.append(1) or to_bytes(image))
    for number, c in enumerate((0, 2, 3.5, 100)):
        sampling = Sampling(
            steps=2, c=c, eta=number / 4, temperature=number, rescale=number / 4, interval=(number / 10, 0.95),
            negative_prompt="box" * number,
        )  # fmt: skip
        drawer.generate_arrays(["blue box"] * 3, sampling, seeds=[1, 2, number])
    assert traces == []
    for sampler in set(get_args(SolverName)) - {"heun"}:
        drawer.generate_arrays(["blue box"], Sampling(steps=3, sampler=sampler, interval=(0.1, 0.9)))
    assert traces == []
    for steps in (2, 3):
        drawer.generate_arrays(["blue box"], Sampling(steps=steps, sampler="heun", interval=(0.1, 0.9)))
    assert traces == [1]


@pytest.fixture(scope="module")
def by_hand(drawer, tiny):
    """What the network says of one picture at t, with the caption "red disc" and without one."""
    text, mask = map(jnp.asarray, drawer.encoder(["red disc", ""], tiny.TEXT_LEN))
    model = nnx.merge(abstract(tiny, drawer.encoder.dim)[0], nnx.State(drawer.weights))
    return jax.jit(lambda noisy, t: model(jnp.repeat(noisy, 2, axis=0), jnp.full(2, t), text, mask))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_drawing_is_a_solver_over_guided_and_thresholded_estimates(drawer, tiny, by_hand, prediction):
    """The jitted function against its parts, put together by hand for one picture."""
    schedule = schedules.cosine(tiny.T)
    noise_key, _ = jax.random.split(jax.random.key(9))
    noisy = jax.random.normal(noise_key, (1, tiny.H, tiny.W, tiny.CHANNELS))
    for t, s in itertools.pairwise(samplers.timesteps(schedule, 4).tolist()):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        out = by_hand(noisy, t)[:, None]  # with the caption and without
        known = {"eps": (noisy[None] - sigma * out) / alpha, "v": alpha * noisy[None] - sigma * out, "x0": out}
        with_caption, without = known[prediction]
        denoised = jnp.clip(without + 3 * (with_caption - without), -1, 1)
        noise = (noisy - alpha * denoised) / sigma
        noisy = schedules.add_noise(schedule, denoised, noise, jnp.full(1, s))

    config = dataclasses.replace(tiny, prediction=prediction)
    pipeline = DiffusionPipeline.from_weights(config, drawer.encoder, drawer.weights)
    drawn = pipeline.generate_arrays(["red disc"], Sampling(c=3, sampler="ddim", steps=4, interval=(0, 1)), seeds=9)
    np.testing.assert_allclose(drawn.astype(float) / 127.5 - 1, noisy, atol=0.02)


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(drawer):
    def draw(negative):
        return np.asarray(drawer.generate_image("red disc", steps=4, negative_prompt=negative))

    np.testing.assert_array_equal(draw(""), draw(None))
    assert (draw("blue box") != draw("")).any()
    own = np.asarray(drawer.generate_image("red disc", steps=4, cfg=False)).astype(int)
    np.testing.assert_allclose(draw("red disc").astype(int), own, atol=1)  # steering away from itself leads nowhere


def test_autoguidance_steers_away_from_a_worse_checkpoint(trained, drawer, other):
    def draw(pipeline, **options):
        return pipeline.generate_arrays(
            ["red disc", "blue box"], Sampling(steps=4, interval=(0, 1), **options), seeds=3
        ).astype(int)

    own = DiffusionPipeline(trained, guide=trained)  # steering away from itself leads nowhere
    np.testing.assert_allclose(draw(own, c=5), draw(drawer, c=1), atol=1)
    guided = DiffusionPipeline(trained, guide=other.path)
    np.testing.assert_array_equal(draw(guided, c=1), draw(drawer, c=1))
    np.testing.assert_allclose(draw(guided, c=0), draw(other, c=1), atol=1)
    assert (draw(guided, c=3) != draw(drawer, c=3)).any()
    assert guided.hash != drawer.hash
    with pytest.raises(ValueError, match="negative_prompt and a guide exclude each other"):
        draw(guided, negative_prompt="box")


def test_a_guide_of_other_pictures_is_refused(trained, tiny, tmp_path):
    guide = copy(trained, tmp_path, config={**tiny.to_json(), "H": 16})
    with pytest.raises(ValueError, match=r"guide = .*copy: H is 16, that of the checkpoint 8"):
        DiffusionPipeline(trained, guide=guide)


def test_a_way_between_prompts_and_seeds_begins_and_ends_with_its_own_pictures(drawer):
    sampling = Sampling(steps=4)
    ends = drawer.generate_arrays(["red disc", "blue box"], sampling, seeds=[3, 8]).astype(int)
    way = np.array(drawer.interpolate(("red disc", "blue box"), sampling, seeds=(3, 8), frames=5)).astype(int)
    assert len(way) == 5
    np.testing.assert_allclose(way[[0, -1]], ends, atol=1)
    jumps = np.abs(np.diff(way, axis=0)).mean((1, 2, 3))
    assert 0 < jumps.max() < np.abs(way[0] - way[-1]).mean()
    turning = np.array(drawer.interpolate(("red disc", "red disc"), sampling, seeds=(3, 3), frames=2))
    np.testing.assert_array_equal(turning[0], turning[1])
    with pytest.raises(ValueError, match="eta is above 0: fresh noise has no way"):
        drawer.interpolate(("a", "b"), Sampling(sampler="ddpm", steps=4), seeds=(3, 8))
    with pytest.raises(ValueError, match="3 prompts and 2 seeds: a way has two of each"):
        drawer.interpolate(("a", "b", "c"))
    with pytest.raises(ValueError, match="frames = 1"):
        drawer.interpolate(("a", "b"), frames=1)


def test_a_way_between_noises_keeps_their_size_and_meets_both():
    a, b = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)
    shares = jnp.linspace(0, 1, 5)
    between = jax.vmap(lambda share: sampling_module.slerp(a, b, share))(shares)
    np.testing.assert_allclose((between**2).mean((1, 2, 3)), 1, atol=0.15)
    np.testing.assert_allclose(between[jnp.array([0, 4])], jnp.stack([a, b]), atol=1e-5)
    half = (a + b) / jnp.sqrt(
        2 * (1 + (a * b).sum() / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    )  # Shoemake, Eq. for 1/2
    np.testing.assert_allclose(between[2], half, atol=1e-5)
    np.testing.assert_allclose(sampling_module.slerp(a, a, jnp.float32(0.3)), a, atol=1e-5)


def test_a_film_of_the_drawing_ends_with_the_picture(drawer, tiny):
    weights = jax.tree.map(lambda weight: 0.3 * weight, drawer.weights)  # estimates that are not all black and white
    calm = dataclasses.replace(tiny, prediction="x0")
    pipeline = DiffusionPipeline.from_weights(calm, drawer.encoder, weights)
    film = pipeline.denoising("red disc", Sampling(steps=4, c=1), seed=3)
    assert len(film) == 5
    np.testing.assert_array_equal(film[-1], pipeline.generate_image("red disc", cfg=False, steps=4, seed=3))
    np.testing.assert_array_equal(film[-1], film[-2])  # at t = 0 the picture is the last estimate
    assert (np.asarray(film[0]) != np.asarray(film[-1])).any()


@pytest.mark.parametrize("sampler", get_args(SolverName))
def test_pictures_that_are_watched_are_those_that_are_drawn_at_once(drawer, sampler):
    prompts, sampling = ["red disc", "blue box"], Sampling(steps=5, sampler=sampler)
    watched = [[np.asarray(image) for image in images] for images in drawer.watch(prompts, sampling, seeds=3, every=2)]
    assert [len(images) for images in watched] == [1, 1, 1, 2, 2, 2]  # after 2, 4 and 5 steps of each
    np.testing.assert_array_equal(watched[-1], drawer.generate_arrays(prompts, sampling, seeds=3))
    film = drawer.denoising("red disc", sampling, seed=3)
    np.testing.assert_array_equal([images[0] for images in watched[:3]], [film[number] for number in (1, 3, 4)])
    np.testing.assert_array_equal(watched[3][0], watched[2][0])
    with pytest.raises(ValueError, match="prompt is empty"):
        next(drawer.watch([" "]))
    with pytest.raises(ValueError, match="every = 0"):
        next(drawer.watch(["red disc"], every=0))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 12, 3)).astype(np.uint8))


def test_a_picture_is_redrawn_as_far_as_strength_says(drawer, photo):
    def distance(strength, steps):
        drawn = drawer.generate_image("red disc", steps=steps, c=2, edit=Edit(photo, strength))
        return np.abs(np.asarray(drawn).astype(int) - np.asarray(photo).astype(int)).mean()

    assert distance(0.05, steps=20) < 10
    assert distance(1.0, steps=4) > 20


def test_known_pixels_are_kept_exactly(drawer, photo, tmp_path):
    mask = Image.new("L", (12, 8))
    mask.paste(255, (2, 1, 9, 6))
    mask.save(tmp_path / "mask.png")
    photo.save(tmp_path / "photo.png")
    edit = Edit(tmp_path / "photo.png", mask=tmp_path / "mask.png")
    path = tmp_path / "drawn.png"
    drawn, kept = np.asarray(drawer.generate_image("red disc", path, steps=4, edit=edit)), np.asarray(mask) == 0
    np.testing.assert_array_equal(drawn[kept], np.asarray(photo)[kept])
    assert (drawn[~kept] != np.asarray(photo)[~kept]).mean() > 0.5
    assert remembered(path).strength == 1
    everywhere = Edit(photo, mask=Image.new("1", (12, 8), 1))
    plain = np.asarray(drawer.generate_image("red disc", steps=4, edit=Edit(photo, 1.0))).astype(int)
    np.testing.assert_allclose(np.asarray(drawer.generate_image("red disc", steps=4, edit=everywhere)), plain, atol=1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"image": Image.new("RGB", (12, 9))}, "image is 12 x 9; this checkpoint draws 12 x 8: resize it first"),
        ({"image": Image.new("CMYK", (12, 8))}, "image: its mode is CMYK"),
        ({"mask": Image.new("L", (8, 12))}, "mask is 8 x 12; this checkpoint draws 12 x 8"),
        ({"mask": Image.new("RGB", (12, 8))}, "mask: its mode is RGB"),
        ({"strength": 0}, "strength = 0: allowed"),
        ({"strength": 1.5}, "strength = 1.5: allowed"),
        ({"strength": float("nan")}, "strength = nan: allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_and_masks_that_do_not_fit_are_refused(drawer, photo, edit, message):
    with pytest.raises(ValueError, match=message):
        drawer.generate_image("red disc", steps=1, edit=Edit(**{"image": photo, **edit}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": ["disc", "  "]}, "prompt is empty"),
        ({"prompts": "disc"}, "list of prompts"),
        ({"sampling": Sampling(steps=51)}, "steps = 51.*1 to the 50"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": -1}, "seed = .*-1"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(drawer, wrong, message):
    with pytest.raises(ValueError, match=message):
        drawer.generate_images(**{"prompts": ["disc"], "sampling": Sampling(steps=1), **wrong})


@pytest.mark.parametrize("prompt", [None, 7, ["red disc"], Path("red disc"), b"red disc", "half a \ud83d"])
def test_a_prompt_is_a_text(drawer, prompt):
    with pytest.raises(ValueError, match=r"a prompt is a text, got|is not valid Unicode"):
        drawer.generate_image(prompt, steps=1)
    with pytest.raises(ValueError, match=r"a prompt is a text, got|is not valid Unicode"):
        drawer.generate_images(["red disc", prompt], Sampling(steps=1))
    if not isinstance(prompt, list | bytes):
        with pytest.raises(ValueError, match=r"prompts is .*: give a list of prompts"):
            drawer.generate_images(prompt)


def test_two_emoji_are_two_pictures(drawer):
    one, two = (np.asarray(drawer.generate_image(text, steps=2)) for text in ("😀", "😢"))
    assert (one != two).any()
    np.testing.assert_array_equal(one, drawer.generate_image("grinning face", steps=2))


def test_a_file_that_is_no_picture_is_refused_by_name(drawer, tmp_path):
    path = tmp_path / "a.png"
    for make in (Path.mkdir, lambda path: path.write_bytes(b"x"), os.mkfifo):
        make(path)
        for edit in (Edit(path), Edit(Image.new("RGB", (12, 8)), mask=path)):
            with pytest.raises(ValueError, match=r"a\.png: (cannot be read: it is not a regular file|not a picture)"):
                drawer.generate_image("red disc", steps=1, edit=edit)
        with pytest.raises(ValueError, match=r"a\.png: (cannot be read: it is not a regular file|not a picture)"):
            remembered(path)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("c", float("nan")), ("c", float("inf")), ("c", -1), ("eta", 1.1), ("temperature", -0.1),
        ("steps", 5.5), ("c", "seven"), ("c", None), ("c", 1e300), ("sampler", "euler"),
        ("rescale", 2), ("percentile", float("nan")), ("interval", (0.1, 0.2, 0.3)), ("interval", (0.5, 0.2)),
        ("interval", (0.0, float("nan"))),
    ],
)  # fmt: skip
def test_impossible_sampling_is_refused_with_the_field_and_the_range(field, value):
    with pytest.raises(ValueError, match=rf"{field} = .*allowed are"):
        Sampling(**{field: value})


def test_a_negative_prompt_without_guidance_is_a_contradiction():
    with pytest.raises(ValueError, match="negative_prompt = 'box' does nothing at c = 1"):
        Sampling(negative_prompt="box", c=1)


def test_the_choices_of_the_help_are_the_tables_of_samplers():
    assert set(get_args(SolverName)) == set(samplers.SOLVERS)


def test_numbers_of_any_kind_are_kept_as_plain_ones(drawer, tmp_path):
    odd = Sampling(c=np.float32(3), steps=np.int64(2), eta=np.float64(0), interval=[0, 1])
    assert odd == Sampling(c=3.0, steps=2, eta=0.0, interval=(0.0, 1.0))
    drawer.generate_image("red disc", tmp_path / "disc.png", sampling=odd)
    assert remembered(tmp_path / "disc.png").sampling == dataclasses.replace(odd, eta=None)


def test_a_grid_marks_what_training_has_not_seen(drawer):
    prompts = ["red disc", "blue disc", "a cat"]
    assert drawer.titles(prompts) == ["red disc", "(unseen) blue disc", "a cat"]


def test_no_prompt_gives_no_picture(drawer):
    assert drawer.generate_arrays([]).shape == (0, 8, 12, 3)
    assert drawer.generate_images([]) == []


def test_a_path_that_no_png_can_have_is_refused_before_drawing(drawer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawer, "_sampler", None)
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "disc.jpg", tmp_path, tmp_path / "folder.png"):
        with pytest.raises(ValueError, match=r"name a file that ends in \.png"):
            drawer.generate_image("red disc", path)


def test_transparent_pictures_come_with_clean_alpha(trained, tiny, drawer):
    config = dataclasses.replace(tiny, CHANNELS=4)
    weights = training.init_state(config, drawer.encoder.dim, jax.random.key(0)).weights
    pipeline = DiffusionPipeline.from_weights(config, drawer.encoder, weights)
    known = Image.fromarray(
        np.dstack([np.full((8, 12, 3), 200, np.uint8), np.arange(96, dtype=np.uint8).reshape(8, 12)])
    )
    mask = Image.new("L", (12, 8))
    mask.paste(255, (6, 0, 12, 8))  # the right half is drawn anew
    rgba = pipeline.generate_image("red disc", steps=3, edit=Edit(known, mask=mask))
    assert rgba.mode == "RGBA"
    pixels, old = np.asarray(rgba), np.asarray(known)
    assert (pixels[:, 6:, 3] == 0).any()
    assert (pixels[pixels[..., 3] == 0] == [255, 255, 255, 0]).all()
    np.testing.assert_array_equal(pixels[:, :6, 3], old[:, :6, 3])
    np.testing.assert_array_equal(pixels[1:, :6], old[1:, :6])
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    np.testing.assert_allclose(on_white(pixels).astype(int), np.asarray(white)[..., :3].astype(int), atol=1)


def copy(trained, tmp_path, **changes):
    about = {**checkpoint.about(trained), **changes}
    like = jax.tree.map(np.asarray, DiffusionPipeline(trained).weights)
    items = {"ema_short": like, "ema_long": like, "train": {"step": np.int32(1)}}
    checkpoint.Saver().save(tmp_path / "copy", items, about=about, now=True)
    return tmp_path / "copy"


def test_a_checkpoint_of_another_encoder_or_configuration_is_refused(trained, tiny, tmp_path):
    other = copy(trained, tmp_path, encoder={"name": tiny.encoder, "sha256": "0" * 64})
    with pytest.raises(checkpoint.CheckpointError, match="trained with the files 000000000000"):
        DiffusionPipeline(other)
    wider = dataclasses.replace(tiny, BASE_DIM=16).to_json()
    with pytest.raises(checkpoint.CheckpointError, match=r"copy: ema_short/\S+ is \(.*\), not \("):
        DiffusionPipeline(copy(trained, tmp_path, config=wider))
    with pytest.raises(checkpoint.CheckpointError, match=r"schedule .*linear.*only 'cosine' is known"):
        DiffusionPipeline(copy(trained, tmp_path, schedule={"name": "linear", "T": 50}))
    with pytest.raises(checkpoint.CheckpointError, match="unknown fields"):
        DiffusionPipeline(copy(trained, tmp_path, config={**tiny.to_json(), "colour": 1}))


def test_weights_that_are_not_finite_draw_nothing(trained, tmp_path):
    path = copy(trained, tmp_path)
    broken = DiffusionPipeline(path)
    nan = jax.tree.map(lambda w: np.full(w.shape, np.nan, np.float32), broken.weights)
    checkpoint.Saver().save(
        path, {"ema_short": nan, "ema_long": nan, "train": {"step": np.int32(1)}}, about=broken.about, now=True
    )
    with pytest.raises(checkpoint.CheckpointError, match="non-finite"):
        DiffusionPipeline(path)
