"""The benchmarks run, on the smallest network, and what they measure fits together; how fast it is decides nothing."""

import json
import math

import ablation
import jax
import made_up
import numpy as np
import peer_recipe
import pytest
import roofline
import scaling

import dataset
import params
from evaluation.captions import choose, drawn_by_others

pytestmark = pytest.mark.slow


def numbers(measured):
    for value in measured.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def test_everything_about_a_preset(tiny, monkeypatch):
    import benchmark

    monkeypatch.setattr(benchmark, "SIZE", 64)
    monkeypatch.setattr(benchmark, "SOLVERS", ("ddim", "dpmpp_2m"))
    found = benchmark.preset(tiny, rounds=3)
    assert all(math.isfinite(number) for number in numbers(found))
    assert found["draw_guided_seconds"].keys() == set(benchmark.SOLVERS)
    assert found["pictures_per_second"] == pytest.approx(tiny.B / found["step_seconds"])
    assert 0 < found["arithmetic_over_counted"] <= 1


def test_steps_of_several_sizes(tiny):
    (few, many) = scaling.steps([(tiny, 8), (tiny, 80)], rounds=1)
    assert few["GFLOP per picture"] == many["GFLOP per picture"] > 0
    assert few["memory, MiB"] < many["memory, MiB"]


def test_a_step_on_this_machine(tiny):
    found = roofline.measured(tiny, "float32", rounds=1)
    assert found["measured_images_per_second"] == pytest.approx(tiny.B / found["measured_step_seconds"])


def test_the_pace_of_a_network(tiny, monkeypatch):
    monkeypatch.setattr(ablation, "BASE", tiny)
    monkeypatch.setattr(ablation, "NETWORKS", {"smallest": (1.0, {})})
    assert ablation.measured_pace()["smallest"] > 0


def test_the_forward_pass_that_is_counted_is_that_of_the_network(tiny):
    forward, inputs = made_up.forward(tiny)
    assert jax.eval_shape(forward, *inputs).shape == (1, tiny.H, tiny.W, tiny.CHANNELS)


def test_a_peer_learns_from_our_training_pictures_and_its_own_are_scored_as_ours(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(params, "PRESETS", {"smallest": tiny})
    assert peer_recipe.prepare(tmp_path, "smallest", samples=6) > 0
    real = dataset.side(dataset.from_config(tiny), heldout=False)
    sets = choose(real.names, [], 6)
    with np.load(tmp_path / "data.npz") as data:
        np.testing.assert_array_equal(data["images"], real.images)
        asked = data["captions"].tolist()
        assert asked == [text for chosen in sets.values() for text in chosen.texts]
        assert len(data["text_emb"]) == len(data["text_mask"]) == 1 + len(real.names) + len(asked)
    about = {"images": 0, "step": 0, "seconds": 0.0, "ema": "", "config": {}, "sampling": {}}
    drawn = real.images[: len(asked)]
    np.savez(tmp_path / "pictures.npz", images=drawn, captions=asked, about=json.dumps(about))
    found, _ = drawn_by_others(tmp_path / "pictures.npz", sets, drawn.shape[1:])
    np.testing.assert_array_equal(np.concatenate([*found.values()]), drawn)
