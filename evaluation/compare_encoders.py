"""Compare text encoders: `python -m evaluation.compare_encoders quick --encoders A B C --minutes 5 --output encoders`.

Trains the same preset once with each encoder, for equally many minutes of training steps, and evaluates each run with
`evaluate.py --report`. Useful company for an encoder: `NAME:random`, its shape with random weights (what knowing
nothing of words is worth), and `NAME:words`, its word embeddings alone.

Each run has a folder of its own, OUTPUT/<number>_<encoder>; the table is OUTPUT/encoders.md. The same command again
goes on where it was stopped, and prints the table at once when everything is done.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from params import PRESETS

ROOT = Path(__file__).parent.parent
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
    prog = "python -m evaluation.compare_encoders"
    options = tyro.cli(Options, prog=prog, description=__doc__, use_underscores=True)
    try:
        compare(options)
    except (ValueError, OSError) as error:
        sys.exit(f"compare_encoders: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what is trained is kept, the same command goes on")


def compare(options: Options) -> None:
    import text_encoder
    from evaluation import report

    check(options)
    report.pyplot()  # missing? rather now than after the training
    results = []
    for number, encoder in enumerate(options.encoders, 1):
        print(f"[{number} of {len(options.encoders)}] {encoder}", flush=True)
        name = re.sub(r"[^\w.-]+", "_", encoder).strip("_")
        run = options.output / f"{number}_{name[-60:]}"
        if not (run / "final").is_dir():
            words = ["--encoder", text_encoder.resolved(encoder), "--minutes", options.minutes, "--epochs", 1_000_000]
            words += ["--data", options.data] if options.data else []
            words += ["--vendor", options.vendor] if options.vendor else []
            run_script("train.py", options.preset, "--resume", *words, "--output", run)
        page = run / "report"
        if not (page / "results.json").is_file():
            run_script("evaluate.py", "--checkpoint", run / "final", "--samples", options.samples, "--report", page)
        results.append(report.read(page / "results.json"))
    print(f"\n{write_table(options, results)}")
    print(f"{options.output / 'encoders.md'} written; each run's page is report/report.html in its folder")


def check(options: Options) -> None:
    """Refuse what cannot be compared, and a folder that holds another comparison."""
    from files import replacing

    if options.preset not in PRESETS:
        raise ValueError(f"no preset {options.preset!r}; allowed are {', '.join(PRESETS)}")
    if len(set(options.encoders)) < len(options.encoders) or not options.encoders:
        raise ValueError("--encoders: name one or more different ones")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g}: allowed are numbers above 0")
    asked = json.loads(json.dumps(asdict(options), default=str))
    del asked["output"]
    file = options.output / "asked.json"
    if file.exists() and (before := json.loads(file.read_text())) != asked:
        differ = [f"--{name} was {before.get(name)}" for name in asked if before.get(name) != asked[name]]
        raise ValueError(f"{options.output} holds another comparison ({'; '.join(differ)}); choose another --output")
    with replacing(file) as beside:
        beside.write_text(json.dumps(asked))


def run_script(script: str, *words: object) -> None:
    """Run a script to its end; a Ctrl-C reaches it too, and is raised here once it has saved and stopped."""
    running = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, words)])
    try:
        code = running.wait()
    except KeyboardInterrupt:
        running.wait()
        raise
    if code:
        raise ValueError(f"{script} stopped with an error, see above; the same command goes on from there")


def write_table(options: Options, results: Sequence[dict]) -> str:
    """The runs as a table in Markdown; better and worse are said of what differs from the first beyond the error."""
    from evaluation.report import mark
    from evaluation.scores import find
    from files import replacing

    titles = [title for title, key in COLUMNS.items() if any(find(result["scores"], *key) for result in results)]
    lines = [
        f"Preset {options.preset}, {options.minutes:g} minutes of training each.\n",
        f"| encoder | pictures seen | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
    ]
    for encoder, result in zip(options.encoders, results, strict=True):
        cells = [encoder, f"{result['checkpoint']['images']:,}"]
        for title in titles:
            first, score = (find(one["scores"], *COLUMNS[title]) for one in (results[0], result))
            verdict = mark(results[0], result, first, score) if result is not results[0] else ""
            cells.append(f"{score.show()} {verdict}".strip() if score else "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\nIn brackets 95 % intervals; better and worse: than the first, beyond the error.\n")
    with replacing(options.output / "encoders.md") as beside:
        beside.write_text("\n".join(lines), encoding="utf-8")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
