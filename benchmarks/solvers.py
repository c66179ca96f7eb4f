"""How many evaluations does a solver need? `python benchmarks/solvers.py [--checkpoint FOLDER] [--captions N]`.

Draws the same training captions from the same noise with every solver and number of evaluations of the network, and
measures two things against the training pictures: caption accuracy (is the caption's own picture the nearest of all,
pixel by pixel?) and the distance to that picture. A table goes to benchmarks/solvers.json, a plot beside it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None  # of train.py or export.py; models_vA0/final, else pretrained
    captions: int = 16  # how many of the training captions, spread over the data
    evaluations: tuple[int, ...] = (5, 10, 15, 20, 50, 100, 250)  # of the network, each of them guided
    c: float = 7.0  # guidance
    output: Path = Path("benchmarks/solvers.json")  # the table; the plot has the same name and .png


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    if min(options.evaluations) < 1 or options.captions < 1:
        sys.exit("--evaluations and --captions: allowed are whole numbers from 1 up")
    import numpy as np
    from tqdm import tqdm

    import dataset
    from evaluation import metrics
    from files import replacing
    from params import Sampling
    from pipeline import DiffusionPipeline
    from samplers import SOLVERS

    pipeline = DiffusionPipeline(options.checkpoint)
    pictures = dataset.from_config(pipeline.config)
    training = np.flatnonzero(~pictures.heldout)
    images, names = pictures.images[training], [pictures.names[row] for row in training]
    own = np.unique(np.linspace(0, len(names) - 1, options.captions).astype(int))
    prompts = [names[row] for row in own]

    runs = [(name, count) for count in options.evaluations for name in SOLVERS]
    table = {name: {} for name in SOLVERS}
    for name, count in tqdm(runs, unit="run", disable=None):
        steps = (count + 1) // 2 if name == "heun" else count  # heun: 2 n - 1 evaluations for n steps
        sampling = Sampling(options.c, sampler=name, steps=steps)
        drawn = pipeline.generate_arrays(prompts, sampling, seeds=range(len(prompts)))
        distance = metrics.distances(drawn, images)
        table[name][count] = {
            "steps": steps,
            "caption_accuracy": metrics.top(metrics.ranks(distance, own), 1),
            "distance": float(distance[np.arange(len(own)), own].mean()),
        }
    result = {"captions": len(own), "pictures": len(names), "c": options.c, "checkpoint": pipeline.hash}
    with replacing(options.output) as beside:
        beside.write_text(json.dumps({**result, "solvers": table}, indent=1) + "\n")
    print_table(table, options.evaluations)
    plot(table, options)
    print(f"{options.output} and {options.output.with_suffix('.png')} written")


def print_table(table: dict, evaluations: tuple[int, ...]) -> None:
    """Caption accuracy / distance in bytes, as Markdown."""
    print("| evaluations |", " | ".join(str(count) for count in evaluations), "|")
    print("|---" * (len(evaluations) + 1) + "|")
    for name, row in table.items():
        cells = [f"{row[count]['caption_accuracy']:.0%} / {row[count]['distance']:.1f}" for count in evaluations]
        print(f"| {name} |", " | ".join(cells), "|")


def plot(table: dict, options: Options) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, field, label in zip(
        panels,
        ("caption_accuracy", "distance"),
        ("caption accuracy", "distance to the own picture, bytes"),
        strict=True,
    ):
        for name, row in table.items():
            axes.plot(options.evaluations, [row[n][field] for n in options.evaluations], "o-", ms=3, label=name)
        axes.set(xlabel="evaluations of the network, each guided", ylabel=label, xscale="log")
        axes.set_xticks(options.evaluations, [str(count) for count in options.evaluations])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05)
    panels[0].legend(frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
