"""One choice of the recipe after the other, at equal cost: `python benchmarks/ablation.py [--minutes 30]`.

Each run is `train.py` on the first 512 pictures, BASE with one of the NETWORKS and a few changes of the recipe. So that
a busy machine bends nothing, cost is counted in pictures: as many as the run's network gets through in `minutes` on one
core by the rate written beside it, which `--pace` measures anew, one step of each in turn. Runs go on where they were
stopped, `--at_once` side by side; on a GPU, which they share, it takes minutes (they fit beside one another with
XLA_PYTHON_CLIENT_MEM_FRACTION=0.05). What a run showed goes into benchmarks/ablation.json as soon as it ends, with its
whole configuration, and is not asked again as long as that stays the same: the table grows from one machine to the
next. Delete the file when training computes something else; other random numbers are chance, as another seed is.

Judged on the averaged weights: the error on held-out pictures, each level's and overall, as the geometric mean of the
error of the velocity (whatever is predicted, so that runs compare) beside that of the first run on the same questions;
and caption accuracy: samples of 128 training captions (c = 2) among the 512 pictures, and their distance to their own.
"""

import dataclasses
import hashlib
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
from params import PRESETS, Params

ROOT = Path(__file__).resolve().parent.parent
PICTURES, SAMPLES = 512, 128
BASE = Params(
    MAX_INDEX=PICTURES, H=32, W=32, encoder="sentence-transformers/all-MiniLM-L6-v2", prediction="v",
    DIM_MULTS=(1, 2), self_attention=(1,), cross_attention=(1,), B=8, learning_rate=4e-4,
    sample_every=10, save_every=5, keep=1,
)  # fmt: skip
NETWORKS = {  # training pictures/s on one core (AVX2), and the fields that decide it
    "patch 2": (7.7, {"PATCH": 2, "BASE_DIM": 96}),
    "128 channels": (7.2, {"PATCH": 2, "BASE_DIM": 128, "BLOCKS": 1}),
    "patch 1": (3.0, {"PATCH": 1, "BASE_DIM": 64}),
    "patch 4": (13.9, {"PATCH": 4, "BASE_DIM": 128}),
    "three resolutions": (
        7.8,
        {"PATCH": 2, "BASE_DIM": 64, "DIM_MULTS": (1, 2, 4), "self_attention": (1, 2), "cross_attention": (1, 2)},
    ),
}
RUNS = {  # network, and changes that leave its pace as it is
    "v": ("patch 2", {}),
    "v, 128 channels": ("128 channels", {}),
    "eps": ("patch 2", {"prediction": "eps"}),
    "x0": ("patch 2", {"prediction": "x0"}),
    "v, min-SNR": ("patch 2", {"loss_weight": "min_snr"}),
    "eps, min-SNR": ("patch 2", {"prediction": "eps", "loss_weight": "min_snr"}),
    "x0, min-SNR": ("patch 2", {"prediction": "x0", "loss_weight": "min_snr"}),
    "v, patch 1": ("patch 1", {}),
    "v, patch 4": ("patch 4", {}),
    "v, dropout": ("patch 2", {"dropout": 0.1}),
    "v, augmentation": ("patch 2", {"augmentation": 0.15}),
    "x0, patch 4": ("patch 4", {"prediction": "x0"}),
    "v, three resolutions": ("three resolutions", {}),
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


def configs(minutes: float) -> dict[str, Params]:
    """Every run by name."""
    runs = {}
    for name, (network, changes) in RUNS.items():
        pace, sizes = NETWORKS[network]
        epochs = max(1, round(60 * minutes * pace / PICTURES))
        runs[name] = dataclasses.replace(BASE, epochs=epochs, **sizes, **changes)
    return runs | {f"{name}, seed 1": dataclasses.replace(runs[name], seed=1) for name in SECOND_SEED}


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    if options.pace:
        return print(measured_pace())
    if options.measure:
        with replacing(options.measure / "shown.json") as beside:
            beside.write_text(json.dumps(shown(options.measure)))
        return
    runs = configs(options.minutes)
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
        core, output = cores.get(), options.output / folder(name, runs[name])
        try:
            train(output, runs[name], core)
            found = measure(output, core)
        finally:
            cores.put(core)
        with writing:
            kept[name] = {"config": runs[name].to_json(), **found}
            with replacing(path) as beside:
                beside.write_text(lines_of(everything) + "\n")
        print(f"{name}: trained, measured", flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        waiting = [pool.submit(run, name) for name in chosen if not measured(kept.get(name), runs[name])]
    faults = [fault for fault in (done.exception() for done in waiting) if fault]
    for fault in faults:
        traceback.print_exception(fault)
    shown_now = {name: kept[name] for name in runs if measured(kept.get(name), runs[name])}
    if shown_now:
        print(table(shown_now))
    sys.exit("\n".join(map(str, faults)) or None)


def measured(row: dict | None, config: Params) -> bool:
    """Whether a row of the table is of this very configuration."""
    try:
        return row is not None and Params.from_json(row["config"]) == config
    except ValueError:  # of another version of Params
        return False


def lines_of(results: dict) -> str:
    """JSON with one line for each configuration and for each list of numbers, the errors of one picture."""
    text = json.dumps(results, indent=1)
    return re.sub(r'(?<="config": )\{[^{}]*\}|\[[-\d.,\s]+\]', lambda found: re.sub(r"\s+", " ", found[0]), text)


def folder(name: str, config: Params) -> str:
    """A folder of its own for each configuration, so that an edited run starts anew."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()
    return f"{name.replace(', ', '_').replace(' ', '_')}-{digest[:8]}"


def flags(config: Params, preset: str) -> list[str]:
    """The words after `python train.py` that make `config` out of a preset whose switches are all off."""
    words = [preset]
    for field in dataclasses.fields(Params):
        value = getattr(config, field.name)
        if value is True:
            words.append(f"--{field.name}")
        elif value != getattr(PRESETS[preset], field.name):
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def train(output: Path, config: Params, core: int) -> None:
    """Train into a folder, going on where it was stopped; RuntimeError if it was stopped again."""
    if (output / "final").is_dir():
        return
    output.mkdir(parents=True, exist_ok=True)
    on_core(core, output, "train.py", *flags(config, "cpu"), "--resume", "--output", str(output))


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


def measured_pace() -> dict[str, float]:
    """Pictures per second of each network on this process's cores: one step of each in turn, medians."""
    import made_up

    import training

    running, times = {}, {name: [] for name in NETWORKS}
    for name, (_, sizes) in NETWORKS.items():
        config = dataclasses.replace(BASE, **sizes)
        step = training.build_train_step(config)
        running[name] = [step, *made_up.arguments(config, PICTURES)]
    for _ in range(12):
        for name, run in running.items():
            step, *inputs = run
            start = time.perf_counter()
            run[1], loss = step(*inputs)
            loss.block_until_ready()
            times[name].append(time.perf_counter() - start)
    return {name: round(BASE.B / statistics.median(taken[2:]), 1) for name, taken in times.items()}


def shown(run: Path) -> dict:
    """Held-out errors and caption accuracy of a run's end."""
    import numpy as np

    import dataloader
    import dataset
    from evaluation import heldout, metrics
    from params import Sampling
    from pipeline import DiffusionPipeline

    pipeline = DiffusionPipeline(run / "final")
    config, encoder = pipeline.config, pipeline.encoder
    unseen = dataset.side(dataset.from_config(dataclasses.replace(config, MAX_INDEX=0)), heldout=True)
    text = dataloader.encode(encoder, unseen.names, config.TEXT_LEN)
    losses = heldout.build_measure(config, unseen.images, *text)(pipeline.weights)
    error = np.log(in_velocity(losses, heldout.measured_steps(len(losses), config.T), config))

    known = dataset.side(dataset.from_config(config), heldout=False)
    own = np.linspace(0, len(known.names), SAMPLES, endpoint=False).astype(int)
    samples = pipeline.generate_arrays([known.names[row] for row in own], Sampling(c=2.0), seeds=range(SAMPLES))
    distance = metrics.distances(samples, known.images)
    rank = metrics.ranks(distance, own)
    with (run / "metrics.jsonl").open() as lines:
        last = json.loads(lines.readlines()[-1])
    return {
        "pictures": last["images"],
        "log_error": error.round(4).tolist(),
        "top1": metrics.top(rank, 1),
        "top5": metrics.top(rank, 5),
        "median_rank": float(np.median(rank) + 1),
        "own_distance": float(distance[np.arange(SAMPLES), own].mean()),
    }


def in_velocity(losses, t, config: Params):
    """Losses [n, levels] at steps t, whatever is predicted, as errors of the velocity that the prediction stands for.

    At step t the same error is SNR times as large in the noise as in the clean image, SNR + 1 times in the velocity.
    """
    import numpy as np

    import schedule

    alpha, sigma = (np.asarray(part, np.float64)[t] for part in schedule.from_config(config))
    return losses / {"eps": alpha**2, "v": 1.0, "x0": sigma**2}[config.prediction]


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
