"""How fast an H100 could train at best, by count: `python benchmarks/roofline.py [--measure] [PRESET …]`.

Every matrix product and convolution of the training step, forward and backward, is read from its jaxpr (count.py) and
takes as long as its FLOPs at the peak rate, or as its bytes through the memory, whichever is longer (Williams et al.
2009). All else costs no time, as if it were fused into these, but for what the state moves: each weight, its two
moments and its gradient (read twice, first for its norm) through AdamW, both averages every tenth step, in bf16 a copy
of the weights; and the pictures and captions of a batch. Nothing is measured, but with --measure: the same steps on the
accelerator that JAX finds, ten of them as one program, as train.py takes them there.

A real step is slower: peaks are not reached, norms and softmax make passes of their own, and each operation takes some
microseconds to launch, which decides where the table leaves it less than that. In one way it may be faster: what stays
in the 50 MB of cache between two operations is counted here as read from the memory. Attention counts as JAX has it by
default, its scores written out.

Peaks: NVIDIA's data sheet of the H100 SXM: 3.35 TB/s; 989 TFLOP/s in bf16 and 495 in TF32, half of what it prints "with
sparsity"; 67 in float32; an H200 differs in its memory alone. TF32 is what JAX's default precision makes of float32 on
such a GPU (docs.jax.dev, "Matmul precision"); jax.default_matmul_precision("highest") is true float32.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--measure" not in sys.argv[1:]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only traces: the count is the same everywhere

import jax
import made_up
from count import Operation, operations

import ema
import parallel
import training
from params import PRESETS, Params

BANDWIDTH = 3.35e12  # bytes per second
PEAKS = {"bf16": 989e12, "TF32": 495e12, "float32": 67e12}  # FLOP per second
PICTURES = 1824


@cache
def step_operations(config: Params) -> tuple[list[Operation], int]:
    """The matrix products and convolutions of a training step, and the number of weights."""
    state, *inputs = made_up.shapes(config, config.MAX_INDEX or PICTURES)
    step = training.build_train_step(config, steps=1)
    jaxpr = jax.make_jaxpr(step)(state, *inputs)
    return list(operations(jaxpr.jaxpr)), sum(leaf.size for leaf in jax.tree.leaves(state.weights))


def state_bytes(weights: int, config: Params) -> float:
    """Bytes of weights, gradient, moments, averages and batch that a step moves outside the network."""
    adamw = 5 + 3  # gradient twice, weight and two moments read; weight and moments written
    averages = (3 + 2) / ema.EVERY
    copy = 1.5 if config.compute == "bfloat16" else 0  # float32 read, bf16 written
    picture = config.H * config.W * config.CHANNELS
    caption = 4 * config.TEXT_LEN * made_up.TEXT_DIM
    return 4 * weights * (adamw + averages + copy) + config.B * (picture + caption)


def bound(each: Iterable[Operation], other_bytes: float, peak: float) -> tuple[float, float]:
    """Seconds that a step takes at least, and those of them in which arithmetic is what it waits for."""
    times = [(operation.flops / peak, operation.bytes / BANDWIDTH) for operation in each]
    computing = sum(arithmetic for arithmetic, memory in times if arithmetic > memory)
    return sum(map(max, times)) + other_bytes / BANDWIDTH, computing


def computing_in(config: Params, arithmetic: str) -> Params:
    return dataclasses.replace(config, compute="bfloat16" if arithmetic == "bf16" else "float32")


def roofline(config: Params, arithmetic: str) -> dict[str, float]:
    """The figures of one row of the table."""
    config = computing_in(config, arithmetic)
    each, weights = step_operations(config)
    assert {operation.dtype for operation in each} == {config.compute}  # so that one peak holds for all
    other = state_bytes(weights, config)
    seconds, computing = bound(each, other, PEAKS[arithmetic])
    return {
        "batch": config.B,
        "parameters_million": weights / 1e6,
        "operations": len(each),
        "tflop": sum(operation.flops for operation in each) / 1e12,
        "gigabytes": (sum(operation.bytes for operation in each) + other) / 1e9,
        "gigabytes_of_state": other / 1e9,
        "step_seconds": seconds,
        "images_per_second": config.B / seconds,
        "compute_bound_share": computing / seconds,
    }


def measured(config: Params, arithmetic: str, rounds: int = 9) -> dict[str, float]:
    """What a step takes on this machine, the median of some programs of ten, and the memory that it needs."""
    config = computing_in(config, arithmetic)
    n = ema.EVERY if parallel.on_accelerator() else 1
    state, *inputs = made_up.arguments(config, config.MAX_INDEX or PICTURES, n)
    with jax.default_matmul_precision("highest" if arithmetic == "float32" else "default"):
        step = training.build_train_step(config)
        start = time.perf_counter()
        steps = step.lower(state, *inputs).compile()
    compiling = time.perf_counter() - start
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        state, loss = steps(state, *inputs)
        loss.block_until_ready()
        times.append((time.perf_counter() - start) / n)
    memory = steps.memory_analysis()
    return {
        "measured_on": jax.devices()[0].device_kind,
        "measured_step_seconds": statistics.median(times[2:]),
        "measured_images_per_second": config.B / statistics.median(times[2:]),
        "memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_seconds": compiling,
    }


def main() -> None:
    words = sys.argv[1:]
    measuring = "--measure" in words
    names = [word for word in words if word != "--measure"] or list(PRESETS)
    if {"-h", "--help"} & set(words):
        sys.exit(__doc__)
    if unknown := set(names) - set(PRESETS):
        sys.exit(f"no preset {', '.join(sorted(unknown))} (presets: {', '.join(PRESETS)})")
    path = Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    print("| preset, batch | in | TFLOP | GB | operations | ms at least | at most | compute-bound | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        rows = found.setdefault(name, {})
        for arithmetic in PEAKS:
            row = rows.setdefault(arithmetic, {})  # with what an earlier run has measured
            row |= roofline(PRESETS[name], arithmetic)
            if measuring:
                row |= measured(PRESETS[name], arithmetic)
            print(
                f"| {name}, {row['batch']} | {arithmetic} | {row['tflop']:.3g} | {row['gigabytes']:.3g} "
                f"| {row['operations']} | {1e3 * row['step_seconds']:.3g} | {row['images_per_second']:,.0f} "
                f"| {row['compute_bound_share']:.0%} | "
                + (f"{row['measured_images_per_second']:,.0f} pictures/s |" if measuring else "|"),
                flush=True,
            )
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path} written")


if __name__ == "__main__":
    main()
