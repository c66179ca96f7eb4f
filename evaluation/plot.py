"""Curves of runs side by side: `python -m evaluation.plot models_vA0 [OTHER_RUN …] [--output curves.png]`.

Left the loss of each run over the pictures it has seen, smoothed, with the loss on held-out pictures dashed where it
was measured. Right the same at the end, at each noise level. Needs matplotlib, which requirements-dev.txt brings.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # Okabe & Ito 2008
SOLID = {"marker": "o", "markersize": 4}
DASHED = {"linestyle": "--", "marker": "o", "markersize": 4, "markerfacecolor": "white"}
SMOOTH, LAST = 1 / 20, 1 / 10  # share of a run's lines that a point of the curve, and "at the end", is the mean of
STYLE = {"font.size": 11, "lines.linewidth": 2, "axes.axisbelow": True, "axes.titlelocation": "left"}


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders with a metrics.jsonl
    output: Path = Path("validation_images/curves.png")  # the picture to write


def main() -> None:
    options = tyro.cli(Options, prog="python -m evaluation.plot", description=__doc__, use_underscores=True)
    try:
        plot(options)
    except (ValueError, OSError) as error:
        sys.exit(f"plot: {error}")


def plot(options: Options) -> None:
    from evaluation.report import pyplot

    if not options.runs:
        raise ValueError("name at least one folder with a metrics.jsonl, such as models_vA0")
    runs = {run: read(run) for run in options.runs}
    plt = pyplot()
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    with plt.rc_context(STYLE):
        figure, (curves, levels) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
        for i, (run, lines) in enumerate(runs.items()):
            colour = COLOURS[i % len(COLOURS)]
            plot_curves(curves, lines, colour, str(run))
            plot_levels(levels, lines, colour)
        heldout = any(line.get("heldout_loss") is not None for lines in runs.values() for line in lines)
        if heldout:
            curves.plot([], [], color="grey", label="held-out pictures", **DASHED)
        curves.legend(handlelength=2.4)
        curves.set(title="loss" if heldout else "training loss", xlabel="pictures seen", xlim=(0, None))
        curves.xaxis.set_major_formatter(EngFormatter())
        levels.set(title="loss at the end, by noise level", xlabel="share of T: picture … noise", xlim=(0, 1))
        for axes in (curves, levels):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.output, dpi=120, transparent=False)
        plt.close(figure)
    print(f"{options.output} written: {', '.join(map(str, runs))}")


def plot_curves(axes, lines: list[dict], colour: str, label: str) -> None:
    """Training loss, smoothed over its pale self, and held-out loss."""
    import numpy as np

    seen = np.array([line["images"] for line in lines])
    loss = np.array([line["loss"] for line in lines], float)  # NaN where it was not finite
    reach = round(len(lines) * SMOOTH / 2)
    smooth = [mean(loss[max(0, i - reach) : i + reach + 1]) for i in range(len(loss))]
    axes.plot(seen, loss, color=colour, alpha=0.2, linewidth=1)
    axes.plot(seen, smooth, color=colour, label=label)
    heldout = np.array([line.get("heldout_loss") for line in lines], float)
    measured = ~np.isnan(heldout)
    if measured.any():
        axes.plot(seen[measured], heldout[measured], color=colour, **DASHED)


def plot_levels(axes, lines: list[dict], colour: str) -> None:
    """Training and held-out loss at each noise level, the mean of the last lines."""
    import numpy as np

    for field, style in ("loss_per_level", SOLID), ("heldout_loss_per_level", DASHED):
        measured = np.array([line[field] for line in lines if line.get(field)], float)
        if len(measured):
            levels = [mean(level) for level in measured[-max(1, round(len(measured) * LAST)) :].T]
            axes.plot((np.arange(len(levels)) + 0.5) / len(levels), levels, color=colour, **style)


def mean(values) -> float:
    """Of the values that are not NaN; NaN if there are none."""
    known = values[values == values]
    return known.mean() if len(known) else float("nan")


def read(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; raises ValueError."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the --output folder of a training run")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete that line") from None
        for field in ("images", "loss", "loss_per_level"):
            if field not in lines[-1]:
                raise ValueError(f"{path} line {number} has no {field!r}: another version wrote it")
    if not lines:
        raise ValueError(f"{path} has no lines yet: the first comes after --log_every steps")
    return lines


if __name__ == "__main__":
    main()
