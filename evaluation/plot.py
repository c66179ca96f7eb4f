"""Draw the curves of one or more runs side by side: `python plot.py models_vA0 [OTHER_RUN …] [--output curves.png]`.

Left the loss of each run over the pictures it has seen, smoothed, with the loss on held-out pictures dashed where it
was measured. Right the same at the end, at each noise level. Needs matplotlib, which requirements-dev.txt brings.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # Okabe & Ito 2008
INK, GRID = "#3c3c43", "#e5e5ea"
SOLID = {"marker": "o", "markersize": 4}
DASHED = {"dashes": (3, 1.5), "marker": "o", "markersize": 4, "markerfacecolor": "white"}
SMOOTH, LAST = 1 / 20, 1 / 10  # share of a run's lines that a point of the curve, and "at the end", is the mean of


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders with a metrics.jsonl
    output: Path = Path("validation_images/curves.png")  # the picture to write


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    try:
        plot(options)
    except (ValueError, OSError) as error:
        sys.exit(f"plot.py: {error}")


def plot(options: Options) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not options.runs:
        raise ValueError("name at least one folder with a metrics.jsonl, such as models_vA0")
    runs = [read(run) for run in options.runs]
    look = {
        "font.size": 11, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "lines.linewidth": 2,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12,
    }  # fmt: skip
    with plt.rc_context(look):
        figure, (curves, levels) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
        for i, (lines, label) in enumerate(zip(runs, labels(options.runs), strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            draw_curves(curves, lines, colour, label)
            draw_levels(levels, lines, colour)
        heldout = any(line["heldout_loss"] is not None for lines in runs for line in lines)
        handles, names = curves.get_legend_handles_labels()
        if heldout:
            handles.append(Line2D([], [], color=INK, **DASHED))
            names.append("held-out pictures")
        curves.legend(handles, names, frameon=False, handlelength=2.4)
        curves.set(
            title="training loss" if not heldout else "loss", xlabel="pictures seen", yscale="log", xlim=(0, None)
        )
        curves.xaxis.set_major_formatter(FuncFormatter(short))
        levels.set(
            title="loss at the end, by noise level", xlabel="share of T: picture … noise", yscale="log", xlim=(0, 1)
        )
        for axes in (curves, levels):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.output, dpi=120)
        plt.close(figure)
    print(f"{options.output} written: {', '.join(str(run) for run in options.runs)}")


def draw_curves(axes, lines: list[dict], colour: str, label: str) -> None:
    """Training loss, smoothed over its pale self, and held-out loss."""
    import numpy as np

    seen = np.array([line["images"] for line in lines])
    loss = np.array([line["loss"] for line in lines], float)  # NaN where a line has none
    reach = round(len(lines) * SMOOTH / 2)
    smooth = [mean(loss[max(0, i - reach) : i + reach + 1]) for i in range(len(loss))]
    axes.plot(seen, loss, color=colour, alpha=0.2, linewidth=1)
    axes.plot(seen, smooth, color=colour, label=label)
    found = [(line["images"], line["heldout_loss"]) for line in lines if line["heldout_loss"] is not None]
    if found:
        axes.plot(*zip(*found, strict=True), color=colour, **DASHED)


def draw_levels(axes, lines: list[dict], colour: str) -> None:
    import numpy as np

    for field, style in ("loss_per_level", SOLID), ("heldout_loss_per_level", DASHED):
        found = [line[field] for line in lines if line[field] is not None]
        if found:
            last = np.array(found[-max(1, round(len(found) * LAST)) :], float)
            middle = (np.arange(last.shape[1]) + 0.5) / last.shape[1]
            axes.plot(middle, [mean(level) for level in last.T], color=colour, **style)


def mean(values) -> float:
    """Of the values that are not NaN; NaN if there are none."""
    kept = values[values == values]
    return kept.mean() if len(kept) else float("nan")


def short(pictures: float, _position: int) -> str:
    """1200000 as 1.2 M."""
    for size, unit in (1e6, " M"), (1e3, " k"):
        if pictures >= size:
            return f"{pictures / size:g}{unit}"
    return f"{pictures:g}"


def labels(runs: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of the folders above it as tell it apart."""
    paths = [run.resolve().parts for run in runs]
    return [
        next(
            "/".join(path[-k:])
            for k in range(1, len(path) + 1)
            if sum(other[-k:] == path[-k:] for other in set(paths)) == 1
        )
        for path in paths
    ]


def read(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, with None for what was not measured."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the --output folder of a training run")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            needed = {field: line[field] for field in ("images", "loss", "loss_per_level")}
            lines.append({**needed, **{field: line.get(field) for field in ("heldout_loss", "heldout_loss_per_level")}})
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete that line") from None
        except KeyError as field:
            raise ValueError(f"{path} line {number} has no {field}: another version wrote it") from None
    if not lines:
        raise ValueError(f"{path} has no lines yet: the first comes after --log_every steps")
    return lines


if __name__ == "__main__":
    main()
