"""What more of everything costs: `python benchmarks/scaling.py [--preset quick] [--only batch resolution data devices]`

    batch       a training step by pictures in it: time per picture, memory, arithmetic
    resolution  the same by pixels of a picture, eight pictures in a step
    data        by pictures in the set: their preparation (files in the page cache, decoded for the first time), the
                next start (from .cache), what a process grows by while it prepares, beside their bytes, and a step
    devices     by devices that share a batch of eight. These are threads of one CPU, which has no more arithmetic to
                give: what is seen is what dealing out costs, and nothing of how several GPUs would do

Each column follows cost ~ x^k, the line of least squares through the logarithms: 0 is a cost that does not grow, 1 one
that grows in proportion; where a part of the cost is fixed, k says how it grows over this range. Times are wall-clock:
steps of all sizes in turn, so that a machine whose speed drifts bends no law (of devices one after the other), and
medians of them; preparation once each, in processes of their own. Memory of a step is its arguments and temporaries as
compiled; that of a process is its peak, on Linux, less that of preparing a single picture. Pictures are those of the
default dataset, shifted and recoloured into as many as are asked for.

The numbers go to benchmarks/scaling.json, where the axes that are not measured again stay as they were.
"""

import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from params import PRESETS, Params

ROOT = Path(__file__).resolve().parent.parent
BATCHES, SIDES, DEVICES = (1, 2, 4, 8, 16, 32), (16, 32, 48, 64), (1, 2, 4)
PICTURES = (1824, 10_000, 30_000, 100_000)  # the first is as many as the default dataset trains on
B, FEW = 8, 64  # pictures in a step and in the set, where it is not they that grow
TOKENS = 8  # of a caption where pictures are many: their embeddings take 1.5 KiB a token, beside which pictures are few
Axis = Literal["batch", "resolution", "data", "devices"]
Row = dict[str, float]  # a measurement by name and unit; the first is what the others depend on


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "cpu", "emoji64"] = "quick"  # whose network and pictures
    only: tuple[Axis, ...] = ()  # axes to measure, if not all
    rounds: int = 7  # steps of each size that the median is of
    output: Path = ROOT / "validation_images" / "readme_scaling.png"  # the plot


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    if options.rounds < 1:
        sys.exit(f"scaling.py: --rounds {options.rounds}: allowed are whole numbers from 1 up")
    file, found, here = Path(__file__).with_suffix(".json"), {}, {"preset": options.preset, "cores": os.cpu_count()}
    if options.only and file.is_file():
        saved = json.loads(file.read_text())
        found = saved.pop("axes")
        if saved != here:
            sys.exit(f"scaling.py: {file} holds axes of {saved}, here are {here}: measure all axes, without --only")
    for axis in options.only or AXES:
        found[axis] = AXES[axis](PRESETS[options.preset], options.rounds)
        print(f"\n{axis}\n\n{table(found[axis])}", flush=True)
        file.write_text(json.dumps({**here, "axes": found}, indent=1) + "\n")
    plot({axis: found[axis] for axis in AXES if axis in found}, options.output)
    print(f"\n{file} and {options.output} written")


def apart(function: Callable, *args):
    """What a function returns in a process of its own, which begins with nothing imported or allocated."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# The axes.


def batch(config: Params, rounds: int) -> list[Row]:
    costs = apart(steps, [(dataclasses.replace(config, B=size), FEW) for size in BATCHES], rounds)
    return [{"pictures in a step": size, **cost} for size, cost in zip(BATCHES, costs, strict=True)]


def resolution(config: Params, rounds: int) -> list[Row]:
    costs = apart(steps, [(dataclasses.replace(config, H=side, W=side, B=B), FEW) for side in SIDES], rounds)
    return [{"pixels": side**2, **cost} for side, cost in zip(SIDES, costs, strict=True)]


def data(config: Params, rounds: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, (1, *PICTURES))
        for n in PICTURES:
            cold, warm = (apart(prepare, root, n, config) for _ in range(2))
            rows.append({"pictures in the set": n, "prepared, s": cold["s"], "next start, s": warm["s"]})
            rows[-1] |= {"grows by, MiB": cold["MiB"], "their bytes, MiB": cold["bytes"] / 2**20}
    small = dataclasses.replace(config, B=B, TEXT_LEN=TOKENS)
    for row, cost in zip(rows, apart(steps, [(small, n) for n in PICTURES], rounds), strict=True):
        row["step, ms"] = cost["per picture, ms"] * B
    return rows


def devices(config: Params, rounds: int) -> list[Row]:
    costs = [apart(on_devices, count, dataclasses.replace(config, B=B), rounds) for count in DEVICES]
    return [{"devices of one CPU": count, **cost} for count, cost in zip(DEVICES, costs, strict=True)]


AXES = {"batch": batch, "resolution": resolution, "data": data, "devices": devices}


# What is measured, each in a process of its own.


def steps(cases: list[tuple[Params, int]], rounds: int) -> list[Row]:
    """Cost of a training step of each configuration on so many pictures, one step of each in turn."""
    import jax
    import made_up
    from count import count_flops

    import parallel
    import training

    parallel.setup()
    running, costs, times = [], [], [[] for _ in cases]
    for config, pictures in cases:
        state, *inputs = made_up.arguments(config, pictures)
        built = training.build_train_step(config)
        step = built.lower(state, *inputs).compile()
        memory = step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        flops = count_flops(jax.make_jaxpr(built)(state, *inputs).jaxpr) / config.B
        costs.append({"memory, MiB": held / 2**20, "GFLOP per picture": flops / 1e9})
        running.append([step, state, *inputs])
    for _ in range(1 + rounds):
        for run, taken in zip(running, times, strict=True):
            step, state, *inputs = run
            start = time.perf_counter()
            run[1], _ = jax.block_until_ready(step(state, *inputs))
            taken.append(time.perf_counter() - start)
    milliseconds = [1000 * statistics.median(taken[1:]) for taken in times]
    return [
        {"per picture, ms": each / config.B, **cost}
        for each, (config, _), cost in zip(milliseconds, cases, costs, strict=True)
    ]


def on_devices(count: int, config: Params, rounds: int) -> Row:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    (cost,) = steps([(config, FEW)], rounds)
    return {"per picture, ms": cost["per picture, ms"], "memory of one, MiB": cost["memory, MiB"]}


def prepare(root: Path, n: int, config: Params) -> Row:
    """Seconds to load the first n pictures, and how far the process grew."""
    import dataset
    import files

    files.CACHE = root / "cache" / str(n)
    shape = (config.H, config.W, config.CHANNELS)
    dataset.load(root / "1", vendor="made", limit=0, shape=shape)
    before, start = peak(), time.perf_counter()
    pictures = dataset.load(root / str(n), vendor="made", limit=0, shape=shape)
    return {"s": time.perf_counter() - start, "MiB": peak() - before, "bytes": pictures.images.nbytes}


def peak() -> float:
    """The most memory that this process has had, MiB; `ru_maxrss` would begin with what its parent had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def make(root: Path, counts: tuple[int, ...]) -> None:
    """Datasets root/<n> of the first n of the same pictures, no two of which are alike."""
    from PIL import Image, ImageChops

    from sources import emojis

    vendor = emojis.ensure(ROOT / Params.data, Params.vendor)
    files = sorted((ROOT / Params.data / "image" / vendor).glob("*.png"))
    emoji = [Image.open(file).convert("RGBA") for file in files]
    folder = root / "image" / "made"
    folder.mkdir(parents=True)

    def write(start: int) -> None:
        for i in range(start, min(start + 1000, max(counts))):
            copy, number = divmod(i, len(emoji))
            *colours, alpha = ImageChops.offset(emoji[number], copy % 8, copy // 8).split()
            turned = colours[copy % 3 :] + colours[: copy % 3]
            picture = Image.merge("RGBA", [*turned, alpha])
            picture.putpixel((0, 0), (i % 256, i // 256 % 256, i // 65536, 255))
            picture.save(folder / f"{i}.png")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(0, max(counts), 1000)))
    for n in counts:
        (root / str(n)).mkdir()
        (root / str(n) / "image").symlink_to(root / "image")
        rows = "".join(f"{i},{files[i % len(files)].stem} moved and recoloured {i}\n" for i in range(n))
        (root / str(n) / "full_emoji.csv").write_text(f"#,name\n{rows}")


# What is shown.


def law(rows: list[Row], column: str) -> tuple[float, float]:
    """k and c of cost = exp(c) x^k, the line of least squares through the logarithms."""
    import numpy as np

    x, y = (np.log([row[name] for row in rows]) for name in (next(iter(rows[0])), column))
    return np.polyfit(x, y, 1)


def table(rows: list[Row]) -> str:
    """Markdown, with the law that each column follows in the last line."""
    x, *columns = rows[0]
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {row[x]:,} | {' | '.join(f'{row[name]:,.4g}' for name in columns)} |" for row in rows]
    return "\n".join([*lines, f"| ~ x^k | {' | '.join(f'{law(rows, name)[0]:.2f}' for name in columns)} |"])


def plot(found: dict[str, list[Row]], output: Path) -> None:
    """A panel for each axis: every column beside its own first value, and the line of its law."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.8), layout="constrained", squeeze=False)
    for axes, rows in zip(panels[0], found.values(), strict=True):
        x, *columns = rows[0]
        at = np.array([row[x] for row in rows], float)
        for name in columns:
            y, (k, start) = np.array([row[name] / rows[0][name] for row in rows]), law(rows, name)
            (dots,) = axes.plot(at, y, "o", ms=4, label=f"{name.split(',')[0]} ~ x^{k:.2f}")
            axes.plot(at, np.exp(start) * at**k / rows[0][name], "-", lw=1, color=dots.get_color())
        axes.set(xlabel=x, xscale="log", yscale="log", ylabel="beside the first" if axes is panels[0, 0] else None)
        axes.set_xticks(at, [f"{value:,.0f}" for value in at])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
