"""What `evaluate.py` measured, for people: results.json, tables of scores, and two HTML pages.

A page is one file: pictures inside, no script, nothing fetched. The report's first paragraphs, which say whether
the model is good, whether it is done and whether it copies, are computed from the scores and their errors.
"""

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evaluation.scores import Interval, Score, beyond, difference, find, spread
from files import parsed, replacing
from images import as_picture
from params import Sampling

SCHEMA = 2  # of results.json; any change of what a field means needs another number
SETS = ("training", "held-out", "invented")  # of captions
SHOWN = 30  # samples of each set on the page
NEAREST = 6  # samples nearest to a training picture, of each set
OVER_TIME = {  # what is shown of every checkpoint of a run: name, on, by of the score
    "held-out loss": ("loss", "held-out", "short average"),
    "held-out loss, long average": ("loss", "held-out", "long average"),
    "training loss": ("loss", "training", "short average"),
    "training loss, long average": ("loss", "training", "long average"),
    "own picture nearest": ("caption accuracy, top 1", "training", "pixels"),
    "copies": ("copy rate", "training", "pixels"),
    "d1/d2": ("d1/d2", "training", "pixels"),
}


def write(path: Path, results: dict) -> None:
    """Write results.json, the whole file or none."""
    text = json.dumps({**results, "schema": SCHEMA}, default=dataclasses.asdict, allow_nan=False)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    """A results.json with its scores as objects; ValueError names a file that is none."""
    try:
        results = parsed(Path(path).read_bytes())
        if results["schema"] != SCHEMA:
            raise ValueError(f"its schema is {results['schema']!r}, this version reads {SCHEMA}")
        if missing := {"checkpoint", "config", "data", "sampling", "sets"} - results.keys():
            raise ValueError(f"it has no {sorted(missing)}")
        parts = [results[part] for part in ("config", "sampling", "sets")]
        if not all(isinstance(part, dict) for part in (*parts, *results["sets"].values())):
            raise ValueError("config, sampling or sets are no fields")
        texts = results["checkpoint"]["path"], results["data"]["fingerprint"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(results["checkpoint"]["images"], int):
            raise ValueError("path, fingerprint or images is of another kind")
        for part in (results, *results["over_time"]):
            part["scores"] = [_score(fields) for fields in part["scores"]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no results.json ({why}); write it anew with evaluate.py --report") from None
    return results


def _score(fields: dict) -> Score:
    parts = {part: fields[part] and _interval(*fields[part]) for part in ("shuffled", "real")}
    if not all(isinstance(fields[part], str) for part in ("name", "on", "by")):
        raise ValueError("the name of a score is no text")
    each = tuple(map(_finite, fields["each"]))
    return Score(**{**fields, **parts, "value": _interval(*fields["value"]), "each": each})


def _interval(value: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(_finite(value)) if low is high is None else Interval(*map(_finite, (value, low, high)))


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return float(number)


# Tables, as rows of cells.


def score_rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The scores beside those of shuffled captions and of real pictures."""
    rows = [(f"{s.name}, {s.by}", s.on, str(s.n), s.show(), s.show("shuffled"), s.show("real")) for s in scores]
    return [("score", "on", "of", "samples", "shuffled", "real pictures"), *rows]


def as_text(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def as_html(rows: Iterable[tuple[object, ...]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows)
    return f"<table>{''.join(lines)}</table>"


def level_rows(levels: dict) -> list[tuple[str, ...]]:
    """Loss at each noise level ± its standard error, of both averages on both sides of the split."""
    n = len(next(iter(levels.values()))["training"]["mean"])
    rows = [("up to this share of T", *(f"{(i + 1) / n:.0%}" for i in range(n)))]
    for ema, sets in levels.items():
        for on, curve in sets.items():
            pairs = zip(curve["mean"], curve["error"], strict=True)
            cells = ("–" if mean is None else f"{mean:.4f} ± {error:.4f}" for mean, error in pairs)
            rows.append((f"{on}, {ema} average", *cells))
    return rows


def curve_rows(over_time: Sequence[dict]) -> list[tuple[str, ...]]:
    """The columns of OVER_TIME for each checkpoint of a run."""
    rows = [("pictures seen", *OVER_TIME)]
    for entry in over_time:
        found = [find(entry["scores"], *key) for key in OVER_TIME.values()]
        cells = ["–" if s is None else s.show() if s.share else f"{s.value.value:.4f}" for s in found]
        rows.append((f"{entry['images']:,}", *cells))
    return rows


def curve(over_time: Sequence[dict]) -> str:
    """A run's checkpoints as a table, and whether the run is done and copies."""
    return "\n".join([as_text(curve_rows(over_time)), "", done(over_time), copying_since(over_time)])


def comparison(paths: Sequence[Path]) -> str:
    """A table of the scores of runs; the words better and worse mark what differs from the first beyond the error."""
    if len(paths) < 2:
        raise ValueError("--compare needs at least two results.json")
    runs = [read(path) for path in paths]
    letters = [f"[{chr(ord('A') + i)}]" for i in range(len(runs))]
    titles, notes, rows = [], [], [("", "on", *letters)]
    for letter, path, run in zip(letters, paths, runs, strict=True):
        titles.append(f"{letter} {path}: {run['checkpoint']['path']}, {run['checkpoint']['images']:,} pictures seen")
        notes += [f"note: {letter} {what}" for what in unlike(runs[0], run)]
    for key in dict.fromkeys(score.key for run in runs for score in run["scores"]):
        cells, base = [], find(runs[0]["scores"], *key)
        for run in runs:
            score = find(run["scores"], *key)
            word = mark(runs[0], run, base, score) if base and score else ""
            cells.append(f"{score.show()} {word}".strip() if score else "–")
        rows.append((f"{key[0]}, {key[2]}", key[1], *cells))
    legend = "better, worse: than [A], by more than the 95 % error of the difference."
    return "\n".join([*titles, *notes, "", as_text(rows), "", legend])


def unlike(a: dict, b: dict) -> list[str]:
    """What a reader of run b beside run a must know."""

    def settings(run: dict) -> dict:
        return {name: value for name, value in run["sampling"].items() if name not in Sampling.FORMER}

    prediction, other = (run["config"].get("prediction") for run in (a, b))
    facts = {
        "was evaluated on other pictures than [A]": a["data"]["fingerprint"] != b["data"]["fingerprint"],
        "predicts something else than [A], so that their losses do not compare": prediction != other,
        "was sampled with other settings than [A]": settings(a) != settings(b),
        "has the features of another extractor than [A]": a.get("extractor") != b.get("extractor"),
    }
    return [what for what, differs in facts.items() if differs]


def mark(a: dict, b: dict, before: Score, after: Score) -> str:
    """better or worse where a score of run b differs from that of run a beyond the error, else "".

    Single values pair where both runs have the same pictures and the same captions. The pictures whose loss is measured
    follow from the data alone.
    """
    of_loss = after.name == "loss"
    if of_loss and a["config"].get("prediction") != b["config"].get("prediction"):
        return ""
    captions, others = (run["sets"].get(after.on, {}).get("captions") for run in (a, b))
    paired = a["data"]["fingerprint"] == b["data"]["fingerprint"] and (of_loss or captions == others)
    found = difference(before, after, paired=paired)
    if not found or after.better == "as real":
        return ""
    return "better" if (found > 0) == (after.better == "higher") else "worse"


# Answers.


def summary(results: dict) -> str:
    """The scores, and what they answer, as plain text."""
    said = (f"{question} {answer}" for question, answer in answers(results).items())
    return "\n".join([as_text(score_rows(results["scores"])), "", *said])


def answers(results: dict) -> dict[str, str]:
    """Whether the checkpoint is good, done and copies, from the scores and their errors."""
    scores, over_time = results["scores"], results["over_time"]
    copying = f"{copies(scores)} {copying_since(over_time)}".strip()
    return {"Is it good?": good(scores), "Is it done?": done(over_time), "Does it copy?": copying}


def good(scores: Sequence[Score]) -> str:
    said = []
    if own := find(scores, "caption accuracy, top 1", by="pixels"):
        verb = "steer" if beyond(own, "shuffled") else "hardly steer"
        beside = f"{own.show()} of the training captions have their own picture nearest"
        said.append(f"The words {verb} the picture: {beside} (captions shuffled: {own.show('shuffled')}).")
    if judged := find(scores, "R-precision, top 1"):
        often = "more often than" if beyond(judged, "shuffled") else "no more often, as far as so few can tell, than"
        beside = f"{judged.show()}, shuffled {judged.show('shuffled')}, real pictures {judged.show('real')}"
        said.append(f"Held-out captions are recognised in their samples {often} by chance: {beside}.")
    if kid := find(scores, "KID", "held-out"):
        verb = "can be told from" if beyond(kid, "real") else "cannot, by so few, be told from"
        said.append(f"As a set the samples {verb} real pictures: KID {kid.show()}, real pictures {kid.show('real')}.")
    return " ".join(said)


def done(over_time: Sequence[dict]) -> str:
    """Whether the held-out loss still falls, beyond the paired error of the same pictures and noise."""
    points = [(entry["images"], find(entry["scores"], "loss", "held-out", "short average")) for entry in over_time]
    points = [(images, score) for images, score in points if score]
    if not points and len(over_time) > 1:
        return "Whether it is done cannot be said: the data hold nothing out."
    if len(points) < 2:
        return "Whether it is done one checkpoint cannot say: evaluate the run's folder for the curve over time."
    images, loss = zip(*points, strict=True)
    best = min(range(len(loss)), key=lambda i: loss[i].value.value)
    if difference(loss[best], loss[-1], paired=True):
        return f"It has passed its best: the held-out loss was lowest at {images[best]:,} pictures and has risen since."
    if difference(loss[-2], loss[-1], paired=True) < 0:
        return f"It is not done: the held-out loss still fell between {images[-2]:,} and {images[-1]:,} pictures."
    return f"The held-out loss has not changed beyond its error since {images[-2]:,} pictures."


def copies(scores: Sequence[Score]) -> str:
    rates = [score for on in SETS if (score := find(scores, "copy rate", on, "pixels"))]
    copying = "It copies" if any(beyond(score, "real") for score in rates) else "It makes no exact copies that show"
    listed = ", ".join(f"{score.show()} on {score.on} captions" for score in rates)
    real = f" (real held-out pictures: {rates[0].show('real')})" if rates and rates[0].real else ""
    said = [f"{copying}: {listed}{real}."] if rates else []
    for on in SETS:
        ratio = find(scores, "d1/d2", on, "pixels")
        if ratio and ratio.real and ratio.value.high < ratio.real.low:
            beside = f"d1/d2 is {ratio.show()}, of real held-out pictures {ratio.show('real')}"
            said.append(f"On {on} captions it leans on single training pictures: {beside}.")
    return " ".join(said)


def copying_since(over_time: Sequence[dict]) -> str:
    """The first checkpoint whose copy rate lies above that of real held-out pictures, beyond both errors."""
    for entry in over_time:
        score = find(entry["scores"], "copy rate", by="pixels")
        if beyond(score, "real"):
            return f"Copying sets in by {entry['images']:,} pictures ({entry['name']}): {score.show()}."
    return f"No checkpoint copies up to {over_time[-1]['images']:,} pictures." if over_time else ""


# The page.

STYLE = """
:root { color-scheme: light dark }
body { max-width: 60rem; margin: auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif }
h1, h2 { font-size: 1.2rem; margin-top: 2rem }
small { opacity: .7 }
table { display: block; overflow-x: auto; font-size: .9rem }
td { padding: .2rem 1rem .2rem 0; white-space: nowrap }
img { background: white; max-width: 100%; border-radius: .3rem }
.grid, figure div { display: flex; flex-wrap: wrap; gap: .75rem }
figure { margin: 0; font-size: .85rem; overflow-wrap: anywhere }
figure div { flex-wrap: nowrap; gap: .3rem; align-items: start }
figure img { flex: 1; min-width: 0 }
"""
LEGEND = """
Shuffled: the same samples, their captions exchanged. Real: real pictures in the place of the samples, which is the
floor of a distance or a copy rate and the ceiling of the rest. In brackets 95 % intervals. By KID and Fréchet distance,
samples of training captions are compared with the held-out pictures and those of held-out captions with the training
pictures; so are the real pictures of the same captions, in equal number, as it matters here."""
BLIND = """
One of the two pictures over each caption was drawn by the network, which has never seen the caption. The other one is
real. Write down which one you take for drawn, then open the answers. Who cannot tell is right half of the time."""
COPIES = "The sample, the training picture nearest to it, the second nearest; under d1 / d2 = 1/3 it counts as a copy."


def write_page(path: Path, results: dict, samples: dict, own: dict, training: np.ndarray, names: Sequence[str]) -> None:
    """The page: answers, scores, losses, the samples nearest to training pictures, and samples of each set.

    samples: uint8 [n, h, w, 1 or 3] by set of captions; own: the real picture of each caption, by set, where there are
    such; training and names: all training pictures and their captions.
    """
    checkpoint, data, levels = results["checkpoint"], results["data"], results["levels"]
    about = (
        f"{checkpoint['images']:,} pictures seen in {checkpoint['seconds'] / 60:.0f} minutes of training on "
        f"{data['training']:,} pictures of {data['vendor']}; weights {checkpoint['hash'][:12]}, {checkpoint['ema']} "
        f"average. Sampled with {', '.join(f'{name} {value}' for name, value in results['sampling'].items())}. "
        f"Evaluated in {results['seconds'] / 60:.1f} minutes."
    )
    nearest = []
    for on, saved in results["sets"].items():
        for i in np.argsort(saved.get("ratio", []), kind="stable")[:NEAREST]:
            a, b = saved["neighbours"][i]
            caption = f"{saved['ratio'][i]:.2f} · {on} caption “{saved['captions'][i]}” · {names[a]} · {names[b]}"
            nearest.append(([samples[on][i], training[a], training[b]], caption))
    sections = {
        "Scores": f"{as_html(score_rows(results['scores']))}<small>{LEGEND}</small>",
        "Loss at each noise level, the picture's side first": as_html(level_rows(levels)) if levels else "",
        "Over the pictures seen": as_html(curve_rows(results["over_time"])) if results["over_time"] else "",
        "Nearest to a copy": f"<small>{COPIES}</small>{_grid(nearest)}" if nearest else "",
    }
    for on, images in samples.items():
        captions, beside = results["sets"][on]["captions"], [own[on]] if on in own else []
        tiles = [([images[i], *(real[i] for real in beside)], captions[i]) for i in spread(len(images), SHOWN)]
        sections[f"Samples of {on} captions{', the real picture beside each' if beside else ''}"] = _grid(tiles)
    sections["Configuration"] = as_html(results["config"].items())
    page = [
        f"<small>{html.escape(about)}</small>",
        *(f"<p><b>{question}</b> {html.escape(said)}" for question, said in answers(results).items()),
        *(f"<p>Note: {html.escape(note)}" for note in results["notes"]),
        *(f"<h2>{name}</h2>{content}" for name, content in sections.items() if content),
    ]
    _write_html(path, checkpoint["path"], page)


def write_blind(path: Path, title: str, samples: np.ndarray, own: np.ndarray, captions: Sequence[str]) -> None:
    """A page for somebody to tell samples of held-out captions from the real pictures, in random order."""
    left = np.random.default_rng(0).integers(2, size=len(samples)).astype(bool)  # whether the sample stands there
    pairs = [
        [sample, real] if first else [real, sample] for sample, real, first in zip(samples, own, left, strict=True)
    ]
    tiles = [
        (pair, f"{number}. {caption}") for number, (pair, caption) in enumerate(zip(pairs, captions, strict=True), 1)
    ]
    answers = " ".join(f"{number}&nbsp;{'left' if first else 'right'}" for number, first in enumerate(left, 1))
    page = [f"<p>{BLIND}", _grid(tiles), f"<p><details><summary>Which were drawn</summary>{answers}</details>"]
    _write_html(path, title, page)


def _write_html(path: Path, title: str, page: Sequence[str]) -> None:
    head = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    with replacing(path) as beside:
        beside.write_text("\n".join([*head, *page]) + "\n", encoding="utf-8")


def _grid(tiles: Sequence[tuple[list[np.ndarray], str]]) -> str:
    """Pictures side by side over their caption, as many tiles in a row as fit."""
    figures = ""
    for images, caption in tiles:
        shown = ""
        for image in images:
            as_picture(image).save(data := io.BytesIO(), format="png")
            shown += f"<img alt='' src='data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'>"
        width = 5 * len(images)
        figures += f"<figure style='width: {width}rem'><div>{shown}</div>{html.escape(caption)}</figure>"
    return figures and f"<div class=grid>{figures}</div>"
