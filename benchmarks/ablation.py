"""One choice of the recipe after the other, at equal cost: `python benchmarks/ablation.py [--minutes 30]`.

Each run is `train.py cpu` on the first 512 pictures, with BASE and a few fields changed from it. So that a busy machine
bends nothing, cost is counted in pictures: as many as the run's network gets through in `minutes` on one core by the
rates of PACE, which `--pace` measures anew, one step of each in turn. Runs go on where they were stopped, `--at_once`
side by side; on a GPU, which they share, it takes minutes (with XLA_PYTHON_CLIENT_MEM_FRACTION=0.05 they fit beside one
another). What a run showed goes into benchmarks/ablation.json as soon as it ends, and is not asked again: the table
grows from one machine to the next. Delete the file when RUNS or the steps of training change.

Judged on the averaged weights: the error on held-out pictures, each level's and overall, as the geometric mean of the
error of the velocity (whatever is predicted, so that runs compare) beside that of the first run on the same questions;
and caption accuracy: drawings of 128 training captions (c = 2) among the 512 pictures, and their distance to their own.
"""

import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from files import replacing
from params import PRESETS, Params, flags

ROOT = Path(__file__).resolve().parent.parent
PICTURES, DRAWN = 512, 128
BASE = {"prediction": "v", "PATCH": 2, "BASE_DIM": 96}  # in full, as the preset may change
RUNS = {
    "v": {},
    "v, 128 channels": {"BASE_DIM": 128, "BLOCKS": 1},
    "eps": {"prediction": "eps"},
    "x0": {"prediction": "x0"},
    "v, min-SNR": {"loss_weight": "min_snr"},
    "eps, min-SNR": {"prediction": "eps", "loss_weight": "min_snr"},
    "x0, min-SNR": {"prediction": "x0", "loss_weight": "min_snr"},
    "v, patch 1": {"PATCH": 1, "BASE_DIM": 64},
    "v, patch 4": {"PATCH": 4, "BASE_DIM": 128},
    "v, dropout": {"dropout": 0.1},
    "v, augmentation": {"augmentation": 0.15},
    "x0, patch 4": {"PATCH": 4, "BASE_DIM": 128, "prediction": "x0"},
    "v, even t": {"low_discrepancy": True},
    "v, three resolutions": {
        "BASE_DIM": 64,
        "DIM_MULTS": (1, 2, 4),
        "self_attention": (1, 2),
        "cross_attention": (1, 2),
    },
}
SECOND_SEED = ("v", "x0", "x0, patch 4")  # run once more with another seed: how much of a difference is chance


@dataclass(frozen=True)
class Options:
    minutes: float = 30.0  # of one core for each run
    only: tuple[str, ...] = ()  # names of the runs to do, if not all
    at_once: int = 2  # runs side by side, on one core each
    output: Path = Path("models_ablation")  # folder of the runs
    pace: bool = False  # measure the rates, print them and stop
    measure: Path | None = None  # write what the run in this folder shows to its shown.json, and stop


# Pictures/s on one core, by (PATCH, BASE_DIM)
PACE = {(2, 96): 7.7, (2, 128): 7.2, (1, 64): 3.0, (4, 128): 13.9, (2, 64): 7.8}


def configs() -> dict[str, Params]:
    """Every run by name: the `cpu` preset with BASE, then with its changes."""
    base = dataclasses.replace(PRESETS["cpu"], MAX_INDEX=PICTURES, **BASE)
    runs = {name: dataclasses.replace(base, **changes) for name, changes in RUNS.items()}
    return runs | {f"{name}, seed 1": dataclasses.replace(runs[name], seed=1) for name in SECOND_SEED}


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    runs = configs()
    if options.pace:
        return print(pace(runs))
    if options.measure:
        with replacing(options.measure / "shown.json") as beside:
            beside.write_text(json.dumps(shown(options.measure)))
        return
    if unknown := set(options.only) - set(runs):
        sys.exit(f"ablation.py: --only {', '.join(sorted(unknown))}: allowed are {', '.join(runs)}")
    path = Path(__file__).with_suffix(".json")
    everything = json.loads(path.read_text()) if path.is_file() else {}
    kept = everything.setdefault(f"{options.minutes:g} minutes", {})
    chosen = [name for name in runs if name in options.only or not options.only]
    cores, writing = Queue(), Lock()
    for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), options.at_once):
        cores.put(core)

    def run(name: str) -> None:
        core, output = cores.get(), options.output / folder(f"{options.minutes:g} minutes") / folder(name)
        try:
            train(output, runs[name], options.minutes, core)
            found = measure(output, core)
        finally:
            cores.put(core)
        with writing:
            kept[name] = found
            with replacing(path) as beside:
                beside.write_text(lines_of(everything) + "\n")
        print(f"{name}: trained, measured", flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        waiting = [pool.submit(run, name) for name in chosen if name not in kept]
    faults = [fault for fault in (done.exception() for done in waiting) if fault]
    for fault in faults:
        traceback.print_exception(fault)
    if kept:
        print(table({name: kept[name] for name in runs if name in kept}))
    sys.exit("\n".join(map(str, faults)) or None)


def lines_of(results: dict) -> str:
    """JSON with one line for each list of numbers, the errors of one picture."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[-\d.,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)


def folder(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def train(output: Path, config: Params, minutes: float, core: int) -> None:
    """Train into a folder, going on where it was stopped; RuntimeError if it was stopped again."""
    if (output / "final").is_dir():
        return
    seen = minutes * 60 * PACE[config.PATCH, config.BASE_DIM]
    words = [*flags(config, "cpu"), "--resume", "--output", str(output)]
    words += ["--epochs", str(round(seen / PICTURES)), "--sample_every", "10", "--save_every", "5", "--keep", "1"]
    output.mkdir(parents=True, exist_ok=True)
    on_core(core, output, "train.py", *words)


def measure(output: Path, core: int) -> dict:
    """What a trained run shows, found by a process of its own; RuntimeError if that was stopped."""
    on_core(core, output, "benchmarks/ablation.py", "--measure", str(output))
    return json.loads((output / "shown.json").read_text())


def on_core(core: int, output: Path, script: str, *words: str) -> None:
    """Run a script on one core; what it says goes to log.txt in the output folder."""
    with (output / "log.txt").open("a") as log:
        command = ["taskset", "-c", str(core), sys.executable, script, *words]
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{output}: {script} was stopped, see log.txt there; the same command goes on")


def pace(runs: dict[str, Params]) -> dict[str, float]:
    """Pictures per second of each network on this process's cores: one step of each in turn, medians."""
    import made_up

    import training

    steps = {}
    for config in {(config.PATCH, config.BASE_DIM): config for config in runs.values()}.values():
        data = made_up.data(config, PICTURES)
        init_key, keys = training.streams(0)
        state = training.init(config, made_up.TEXT_DIM, init_key)
        step = training.build_train_step(config, training.structure(config, made_up.TEXT_DIM))
        steps[config.PATCH, config.BASE_DIM] = [step, state, data, keys]
    B = PRESETS["cpu"].B
    times = {size: [] for size in steps}
    for _ in range(12):
        for size, (step, state, data, keys) in steps.items():
            start = time.perf_counter()
            state, loss = step(state, data, keys)
            loss.block_until_ready()
            times[size].append(time.perf_counter() - start)
            steps[size][1] = state
    return {str(size): round(B / statistics.median(taken[2:]), 1) for size, taken in times.items()}


def shown(run: Path) -> dict:
    """Held-out errors and caption accuracy of a run's end."""
    import numpy as np

    import dataloader
    import dataset
    import training
    from evaluation import heldout, metrics
    from params import Sampling
    from pipeline import DiffusionPipeline

    pipeline = DiffusionPipeline(run / "final")
    config, encoder = pipeline.config, pipeline.encoder
    everything = dataset.from_config(dataclasses.replace(config, MAX_INDEX=0))
    rows = np.flatnonzero(everything.heldout)
    text = dataloader.encode(encoder, [everything.names[row] for row in rows], config.TEXT_LEN)
    losses = heldout.build_losses(config, training.structure(config, encoder.dim))
    each = heldout.loss_per_level(losses, pipeline.weights, everything.images[rows], *text, T=config.T)
    error = np.log(heldout.in_velocity(each, config))

    pictures = dataset.from_config(config)
    known = np.flatnonzero(~pictures.heldout)
    own = np.linspace(0, len(known), DRAWN, endpoint=False).astype(int)
    prompts = [pictures.names[known[row]] for row in own]
    drawn = pipeline.generate_arrays(prompts, Sampling(c=2.0), seeds=range(DRAWN))
    distance = metrics.distances(drawn, pictures.images[known])
    rank = metrics.ranks(distance, own)
    with (run / "metrics.jsonl").open() as lines:
        last = json.loads(lines.readlines()[-1])
    return {
        "pictures": last["images"],
        "log_error": error.round(4).tolist(),
        "top1": metrics.top(rank, 1),
        "top5": metrics.top(rank, 5),
        "median_rank": float(np.median(rank) + 1),
        "own_distance": float(distance[np.arange(DRAWN), own].mean()),
    }


def table(results: dict[str, dict]) -> str:
    """Markdown: each run beside the first one on the same questions, with the standard error of the difference."""
    import numpy as np

    first = np.array(next(iter(results.values()))["log_error"])
    lines = ["| run | pictures seen | held-out error | tenths 1, 3, 5, 7, 9 | nearest | top 5 | median rank |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        ratio = np.array(found["log_error"]) - first
        mean, error = ratio.mean(), ratio.mean(axis=1).std(ddof=1) / np.sqrt(len(ratio))
        levels = ", ".join(f"{np.exp(ratio.mean(axis=0)[level]):.2f}" for level in (0, 2, 4, 6, 8))
        lines.append(
            f"| {name} | {found['pictures']:,} | {np.exp(mean):.3f} ± {error:.3f} | {levels} | "
            f"{found['top1']:.1%} | {found['top5']:.1%} | {found['median_rank']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
