"""Draw the curves of one or more runs side by side: `python plot.py models_vA0 [OTHER_RUN …] [--output curves.png]`.

Left the loss of each run over the pictures it has seen, right its loss at each noise level at the end (the image side
first). Needs matplotlib, which requirements-dev.txt brings.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


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
    import numpy as np
    from matplotlib import pyplot as plt

    if not options.runs:
        raise ValueError("name at least one folder with a metrics.jsonl, such as models_vA0")
    figure, (curves, levels) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
    for run in options.runs:
        lines = read(run)
        seen = [line["images"] / 1000 for line in lines]
        loss = np.array([line["loss"] for line in lines])
        width = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        (drawn,) = curves.plot(seen[width - 1 :], smooth, label=run.name)
        curves.plot(seen, loss, color=drawn.get_color(), alpha=0.2)
        last = [line["loss_per_level"] for line in lines[-max(1, len(lines) // 10) :]]
        levels.plot(
            range(1, len(last[0]) + 1),
            np.ma.masked_invalid(np.array(last, float)).mean(axis=0),
            marker="o",
            markersize=3,
        )
    curves.set(xlabel="pictures seen, thousands", ylabel="training loss", yscale="log")
    levels.set(xlabel="noise level, tenths of T", yscale="log", xticks=(1, 5, 10))
    curves.legend(frameon=False)
    for axes in (curves, levels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)
    print(f"{options.output} written: {', '.join(str(run) for run in options.runs)}")


def read(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the --output folder of a training run")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append({field: line[field] for field in ("images", "loss", "loss_per_level")})
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete that line") from None
        except KeyError as field:
            raise ValueError(f"{path} line {number} has no {field}: another version wrote it") from None
    if not lines:
        raise ValueError(f"{path} has no lines yet: the first comes after --log_every steps")
    return lines


if __name__ == "__main__":
    main()
