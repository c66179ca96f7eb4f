"""Compare text encoders: `python compare_encoders.py quick --encoders A B C --minutes 5 --output encoders`.

Trains the same preset once with each encoder, for equally many minutes of training steps, and evaluates each run with
`evaluate.py --report`. What remains to be told apart is the encoder. Useful company for an encoder: `NAME:random`, its
shape with random weights (what knowing nothing of words is worth), and `NAME:words`, its word embeddings alone.

Each run has a folder of its own, OUTPUT/<number>_<encoder>. A second call goes on where the first was stopped, and
prints the table at once when everything is done: OUTPUT/encoders.md, with the same numbers in OUTPUT/encoders.json.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from params import PRESETS

HERE = Path(__file__).parent
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
COLUMNS = {  # of the table: name, on, by of the score; any measure where it says nothing
    "own picture nearest": ("caption accuracy, top 1", "training", "pixels"),
    "recognised, held-out": ("R-precision, top 5", "held-out", ""),
    "held-out loss": ("loss", "held-out", "short average"),
}


@dataclass(frozen=True)
class Options:
    preset: Annotated[str, tyro.conf.Positional] = "quick"  # of train.py, the same for all
    encoders: tuple[str, ...] = (MINILM, f"{MINILM}:words", f"{MINILM}:random")  # names or folders
    minutes: float = 5.0  # of training steps for each
    samples: int = 256  # pictures to draw of each run
    data: Path | None = None  # dataset, if not the preset's own
    vendor: str | None = None  # whose pictures, if not the preset's own
    output: Path = Path("encoders")  # folder of the runs and the table


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    try:
        compare(options)
    except (ValueError, OSError) as error:
        sys.exit(f"compare_encoders.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what is trained is kept, the same command goes on")


def compare(options: Options) -> None:
    import text_encoder
    from evaluation import report

    check(options)
    report.pyplot()  # missing? rather now than after the training
    folders = []
    for number, encoder in enumerate(options.encoders, 1):
        name = re.sub(r"[^\w.-]+", "_", encoder).strip("_")
        folders.append(options.output / f"{number}_{name[-60:]}")
        print(f"[{number} of {len(options.encoders)}] {encoder}", flush=True)
        train(options, text_encoder.resolved(encoder), folders[-1])
        evaluate(options, folders[-1])
    table = write_table(options, [report.read(folder / "report" / "results.json") for folder in folders])
    print(f"\n{table}\n\n{options.output / 'encoders.md'} written; each run's page is report/report.html in its folder")


def check(options: Options) -> None:
    """Refuse what cannot be compared, and a folder in which something else was."""
    from files import replacing

    if options.preset not in PRESETS:
        raise ValueError(f"no preset {options.preset!r}; allowed are {', '.join(PRESETS)}")
    if len(set(options.encoders)) < len(options.encoders) or not options.encoders:
        raise ValueError("--encoders: name one or more different ones")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g}: allowed are numbers above 0")
    asked = {field: str(getattr(options, field)) for field in ("preset", "minutes", "samples", "data", "vendor")}
    asked["encoders"] = list(options.encoders)
    file = options.output / "asked.json"
    if file.exists() and (before := json.loads(file.read_text())) != asked:
        differ = [f"--{field} was {before.get(field)}" for field in asked if before.get(field) != asked[field]]
        raise ValueError(f"{options.output} holds another comparison ({'; '.join(differ)}); choose another --output")
    with replacing(file) as beside:
        beside.write_text(json.dumps(asked))


def train(options: Options, encoder: str, folder: Path) -> None:
    """Train into `folder` unless it holds the end of a run; goes on from the checkpoint of one that was stopped."""
    if (folder / "final").is_dir():
        return
    words = ["--encoder", encoder, "--minutes", options.minutes, "--epochs", 1_000_000, "--output", folder]
    words += ["--data", options.data] if options.data else []
    words += ["--vendor", options.vendor] if options.vendor else []
    call("train.py", options.preset, "--resume", *words)


def evaluate(options: Options, folder: Path) -> None:
    if not (folder / "report" / "results.json").is_file():
        call(
            "evaluate.py", "--checkpoint", folder / "final", "--samples", options.samples, "--report", folder / "report"
        )


def call(script: str, *words: object) -> None:
    """Run a script to its end; a Ctrl-C reaches it too, and is raised here once it has saved and stopped."""
    running = subprocess.Popen([sys.executable, str(HERE / script), *map(str, words)])
    try:
        code = running.wait()
    except KeyboardInterrupt:
        running.wait()
        raise
    if code:
        raise ValueError(f"{script} stopped with an error, see above; the same command goes on from there")


def write_table(options: Options, runs: Sequence[dict]) -> str:
    """The runs as a table in Markdown; better and worse are said of what differs from the first beyond the error."""
    from evaluation.report import mark
    from evaluation.scores import find
    from files import replacing

    found = [{title: find(run["scores"], *key) for title, key in COLUMNS.items()} for run in runs]
    titles = [title for title in COLUMNS if any(row[title] for row in found)]
    lines = [
        f"Preset {options.preset}, {options.minutes:g} minutes of training each.",
        "",
        f"| encoder | pictures seen | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
    ]
    numbers = []
    for encoder, run, row in zip(options.encoders, runs, found, strict=True):
        cells, seen = [], run["checkpoint"]["images"]
        for title in titles:
            score = row[title]
            word = mark(runs[0], run, found[0][title], score) if run is not runs[0] else ""
            cells.append(f"{score.show()} {word}".strip() if score else "–")
        lines.append(f"| {encoder} | {seen:,} | {' | '.join(cells)} |")
        numbers.append({"encoder": encoder, "images": seen, **{t: row[t] and row[t].value._asdict() for t in titles}})
    lines += ["", "In brackets 95 % intervals; better and worse: than the first, beyond the error."]
    table = "\n".join(lines)
    for name, text in ("encoders.md", table), ("encoders.json", json.dumps(numbers, indent=1)):
        with replacing(options.output / name) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
