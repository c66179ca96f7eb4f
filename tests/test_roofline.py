"""Counts of FLOPs and bytes against those made by hand, and the roofline that is made of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import roofline
from count import Operation, count_flops, operations

import ema
import training


def counted(function, *shapes, dtype=jnp.float32):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return list(operations(jax.make_jaxpr(function)(*arrays).jaxpr))


def dense(x, kernel):
    return jnp.sum(jnp.tanh(x @ kernel))


def halving(x, kernel):
    """A convolution by 3 x 3 at every second pixel."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)))


def test_a_dense_layer_and_its_gradients():
    x, kernel = (3, 5), (5, 7)
    assert counted(dense, x, kernel) == [Operation(2 * 3 * 5 * 7, 4 * (15 + 35 + 21), "float32")]
    both = counted(jax.value_and_grad(dense, argnums=(0, 1)), x, kernel, dtype=jnp.bfloat16)
    assert both == [Operation(2 * 3 * 5 * 7, 2 * (15 + 35 + 21), "bfloat16")] * 3


def test_a_strided_convolution_and_its_gradients_multiply_as_often():
    x, kernel = (2, 8, 6, 3), (3, 3, 3, 5)
    out, taps = 2 * 4 * 3 * 5, 3 * 3 * 3
    once = Operation(2 * out * taps, 4 * (2 * 8 * 6 * 3 + 3 * 3 * 3 * 5 + out), "float32")
    assert counted(halving, x, kernel) == [once]
    assert counted(jax.value_and_grad(halving, argnums=(0, 1)), x, kernel) == [once] * 3


def test_a_loop_counts_as_often_as_it_runs():
    def thrice(x, kernel):
        return jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=3)[0]

    assert len(counted(thrice, (4, 5), (5, 5))) == 3
    jaxpr = jax.make_jaxpr(jax.jit(thrice))(jnp.ones((4, 5)), jnp.ones((5, 5))).jaxpr
    assert count_flops(jaxpr) == 3 * 2 * 4 * 5 * 5


@pytest.mark.parametrize(("choose", "inner"), [(max, 7), (min, 5)])
def test_of_the_branches_of_a_condition_counts_one(choose, inner):
    def either(yes, x, long, short):
        return jax.lax.cond(yes, lambda: (x @ long).sum(), lambda: (x @ short).sum())

    shapes = ((), bool), ((3, 4), jnp.float32), ((4, 7), jnp.float32), ((4, 5), jnp.float32)
    jaxpr = jax.make_jaxpr(either)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).jaxpr
    assert count_flops(jaxpr, choose) == 2 * 3 * 4 * inner


def test_a_step_waits_for_arithmetic_or_for_memory_whichever_takes_longer():
    slow, wide = Operation(6 * 10**12, 10**6, "float32"), Operation(10**6, 67 * 10**8, "float32")
    seconds, computing = roofline.bound([slow, wide], 33.5e8, peak=3e12)
    assert (seconds, computing) == (pytest.approx(2 + 0.002 + 0.001), 2)


@pytest.mark.parametrize("arithmetic", ["bf16", "TF32"])
def test_the_figures_of_a_preset_add_up(tiny, arithmetic):
    row = roofline.roofline(tiny, arithmetic)
    config = dataclasses.replace(tiny, compute="bfloat16" if arithmetic == "bf16" else "float32")
    each, weights = roofline.step_operations(config)
    bytes_per_weight = 4 * (8 + 5 / ema.EVERY) + (6 if arithmetic == "bf16" else 0)
    other = weights * bytes_per_weight + tiny.B * (8 * 12 * 3 + 7 * 384 * 4)
    assert row["gigabytes_of_state"] == pytest.approx(other / 1e9)
    assert row["gigabytes"] == pytest.approx((sum(operation.bytes for operation in each) + other) / 1e9)
    assert row["images_per_second"] == pytest.approx(tiny.B / row["step_seconds"])
    least = max(row["gigabytes"] / 3350, row["tflop"] / (989 if arithmetic == "bf16" else 495))
    assert row["step_seconds"] >= least * (1 - 1e-9)
    assert row["parameters_million"] * 1e6 == sum(
        leaf.size for leaf in jax.tree.leaves(training.init_state(tiny, 384, jax.random.key(0)).weights)
    )


def test_the_table_has_a_row_for_every_peak_and_is_kept_as_json(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "PRESETS", {"tiny": tiny})
    monkeypatch.setattr(roofline, "__file__", str(tmp_path / "roofline.py"))
    monkeypatch.setattr("sys.argv", ["roofline.py", "tiny"])
    roofline.main()
    _, _, *rows, written = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| tiny, 3", peak] for peak in roofline.PEAKS]
    assert written == f"{tmp_path / 'roofline.json'} written"
    kept = json.loads((tmp_path / "roofline.json").read_text())
    assert kept["tiny"]["TF32"] == roofline.roofline(tiny, "TF32")
    monkeypatch.setattr(roofline, "measured", lambda config, arithmetic: {"measured_images_per_second": 7.0})
    for words in (["tiny", "--measure"], ["tiny"]):  # counting anew leaves what was measured
        monkeypatch.setattr("sys.argv", ["roofline.py", *words])
        roofline.main()
        kept = json.loads((tmp_path / "roofline.json").read_text())
        assert kept["tiny"]["TF32"] == {**roofline.roofline(tiny, "TF32"), "measured_images_per_second": 7.0}
    monkeypatch.setattr("sys.argv", ["roofline.py", "small"])
    with pytest.raises(SystemExit, match="no preset small"):
        roofline.main()
