"""The benchmarks run, on the smallest network, and what they measure fits together; how fast it is decides nothing."""

import math

import ablation
import pytest
import roofline
import scaling

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
