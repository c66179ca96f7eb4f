"""What `evaluate.py` measured, for people: results.json, tables of scores, and one HTML page.

The page is one file: pictures and figures inside, no script, nothing fetched. Its first paragraphs, which say whether
the model is good, whether it is done and whether it copies, are computed from the scores and their errors.
"""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from evaluation.scores import Interval, Score, beyond, difference, find, spread
from files import replacing
from images import as_picture

SCHEMA = 2  # of results.json; any change of what a field means needs another number
SETS = ("training", "held-out", "invented")  # of captions
SHOWN = 30  # samples of each set on the page
NEAREST = 6  # samples nearest to a training picture, of each set


def write(path: Path, results: dict) -> None:
    """Write results.json, the whole file or none."""
    text = json.dumps({**results, "schema": SCHEMA}, default=dataclasses.asdict, allow_nan=False)
    with replacing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    """A results.json with its scores as objects; ValueError names a file that is none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if results["schema"] != SCHEMA:
            raise ValueError(f"its schema is {results['schema']!r}, this version reads {SCHEMA}")
        if missing := {"checkpoint", "config", "data", "sampling", "sets"} - results.keys():
            raise ValueError(f"it has no {sorted(missing)}")
        results["scores"] = [_score(fields) for fields in results["scores"]]
        for entry in results["over_time"]:
            entry["scores"] = [_score(fields) for fields in entry["scores"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no results.json ({why}); write it anew with evaluate.py --report") from None
    return results


def _score(fields: dict) -> Score:
    parts = {part: fields[part] and Interval(*fields[part]) for part in ("value", "shuffled", "real")}
    return Score(**{**fields, **parts, "each": tuple(fields["each"])})


def table(scores: Sequence[Score]) -> str:
    """The scores beside those of shuffled captions and of real pictures."""
    rows = [("", "on", "samples", "shuffled", "real pictures")]
    rows += [(f"{s.name}, {s.by}", s.on, s.show(), s.show("shuffled"), s.show("real")) for s in scores]
    return _columns(rows)


def curve(over_time: Sequence[dict]) -> str:
    """A run's checkpoints as a table, and whether the run is done and copies."""
    columns = (
        ("loss", "held-out", "short average"), ("loss", "held-out", "long average"),
        ("loss", "training", "short average"), ("loss", "training", "long average"),
        ("caption accuracy, top 1", "training", "pixels"), ("copy rate", "training", "pixels"),
        ("d1/d2", "training", "pixels"),
    )  # fmt: skip
    averages = ("held-out loss", "long average", "training loss", "long average")
    rows = [("pictures seen", *averages, "own picture nearest", "copies", "d1/d2")]
    for entry in over_time:
        found = [find(entry["scores"], *key) for key in columns]
        cells = ["–" if s is None else s.show() if s.share else f"{s.value.value:.4f}" for s in found]
        rows.append((f"{entry['images']:,}", *cells))
    return "\n".join([_columns(rows), "", done(over_time), copying_since(over_time)])


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
        base, *others = scores = [find(run["scores"], *key) for run in runs]
        marks = ["", *(mark(runs[0], run, base, score) for run, score in zip(runs[1:], others, strict=True))]
        cells = [f"{score.show()} {word}".strip() if score else "–" for score, word in zip(scores, marks, strict=True)]
        rows.append((f"{key[0]}, {key[2]}", key[1], *cells))
    legend = "better, worse: than [A], by more than the 95 % error of the difference."
    return "\n".join([*titles, *notes, "", _columns(rows), "", legend])


def unlike(a: dict, b: dict) -> list[str]:
    """What a reader of run b beside run a must know."""
    facts = {
        "was evaluated on other pictures than [A]": ("data", "fingerprint"),
        "predicts something else than [A], so that their losses do not compare": ("config", "prediction"),
        "was sampled with other settings than [A]": ("sampling",),
        "has the features of another extractor than [A]": ("extractor",),
    }
    return [what for what, path in facts.items() if reduce(dict.get, path, a) != reduce(dict.get, path, b)]


def mark(a: dict, b: dict, before: Score | None, after: Score | None) -> str:
    """better or worse where a score of run b differs from that of run a beyond the error, else "".

    Single values pair where both runs have the same pictures and the same captions. The pictures whose loss is measured
    follow from the data alone.
    """
    of_loss = after is not None and after.name == "loss"
    if before is None or after is None or (of_loss and a["config"].get("prediction") != b["config"].get("prediction")):
        return ""
    captions = [run["sets"].get(after.on, {}).get("captions") for run in (a, b)]
    paired = a["data"]["fingerprint"] == b["data"]["fingerprint"] and (of_loss or captions[0] == captions[1])
    return difference(before, after, paired=paired).verdict(after.better)


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def summary(results: dict) -> str:
    """The scores, and what they answer, as plain text."""
    said = (f"{question} {answer}" for question, answer in answers(results).items())
    return "\n".join([table(results["scores"]), "", *said])


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
    step = difference(loss[-2], loss[-1], paired=True)
    if difference(loss[best], loss[-1], paired=True).beyond:
        return f"It has passed its best: the held-out loss was lowest at {images[best]:,} pictures and has risen since."
    if step.beyond and step.value < 0:
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


# Figures: lines in colours, everything else in a grey that is readable on white and on black.

GREY, ORANGE, BLUE, GREEN = "#85858c", "#e8590c", "#1c7ed6", "#2f9e44"
COLOURS, STYLES = {"held-out": ORANGE, "training": BLUE}, {"short": "-", "long": ":"}


def pyplot():
    """matplotlib for figures without a screen; ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    plt.rcParams.update({name: GREY for name in names})
    plt.rcParams.update({"savefig.transparent": True, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt


def levels_figure(levels: dict) -> str:
    """Loss at each noise level, of both averages on both sides of the split."""
    figure, axes = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    for ema, sets in levels.items():
        for on, curve in sets.items():
            mean, error = (np.array(curve[part], float) for part in ("mean", "error"))
            at = np.arange(1, len(mean) + 1)
            axes.plot(at, mean, STYLES[ema], color=COLOURS[on], label=f"{on}, {ema} average")
            if ema == "short":
                axes.fill_between(at, mean - error, mean + error, color=COLOURS[on], alpha=0.2, linewidth=0)
    axes.set(xlabel="noise level, tenths of T", ylabel="loss", yscale="log", xticks=(1, 5, 10))
    return _figure_image(figure)


def over_time_figure(over_time: Sequence[dict]) -> str:
    """Loss, caption accuracy and copy rate over the pictures seen."""
    figure, (losses, rates) = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")

    def line(axes, key: tuple[str, str, str], label: str, colour: str, style: str = "-") -> None:
        points = [(entry["images"], s) for entry in over_time if (s := find(entry["scores"], *key))]
        if points:
            images, scores = zip(*points, strict=True)
            scale = 100 if scores[0].share else 1
            value, low, high = scale * np.array([score.value for score in scores], float).T
            axes.plot(images, value, style, color=colour, marker="o", markersize=3, label=label)
            if scores[0].share:  # the error of a loss is that of the pictures, the same at every checkpoint
                axes.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)

    for on, colour in COLOURS.items():
        for ema, style in STYLES.items():
            line(losses, ("loss", on, f"{ema} average"), f"{on}, {ema} average", colour, style)
    line(rates, ("caption accuracy, top 1", "", "pixels"), "own picture nearest", GREEN)
    line(rates, ("copy rate", "", "pixels"), "copies", ORANGE)
    losses.set(xlabel="pictures seen", ylabel="loss", yscale="log")
    rates.set(xlabel="pictures seen", ylabel="% of training captions", ylim=(0, None))
    return _figure_image(figure)


def _figure_image(figure) -> str:
    for axes in figure.axes:
        axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    pyplot().close(figure)
    return f"<img class=curve alt='' src='{_data_url(data)}'>"


STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --quiet: #6e6e73; --paper: #fff; --line: #e3e3e6; --card: #f6f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f2f2f4; --quiet: #98989f; --paper: #131315; --line: #303034; --card: #1e1e21 } }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
p.quiet, figcaption, small { color: var(--quiet); font-size: .85rem } .answer { font-size: 1.1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--quiet) }
img.curve { width: 100%; max-width: 56rem; height: auto }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)); gap: .75rem }
figure { margin: 0; padding: .5rem; background: var(--card); border-radius: .6rem; overflow-wrap: anywhere }
figure div { display: flex; gap: .3rem; align-items: start }
figure img { flex: 1; min-width: 0; height: auto; background: #fff; border-radius: .3rem }
figcaption { line-height: 1.3; margin-top: .35rem }
"""
LEGEND = (
    "Shuffled: the same samples, their captions exchanged. Real: real pictures in the place of the samples, which is "
    "the floor of a distance or a copy rate and the ceiling of the rest. In brackets 95 % intervals. From KID to "
    "coverage, samples of training captions are compared with the held-out pictures and those of held-out captions "
    "with the training pictures; so are the real pictures of the same captions, in equal number, as it matters here."
)


def write_page(path: Path, results: dict, samples: dict, own: dict, training: np.ndarray, names: Sequence[str]) -> None:
    """The page: scores, answers, curves, the samples nearest to training pictures, and samples of each set.

    samples: uint8 [n, h, w, 1 or 3] by set of captions; own: the real picture of each caption, by set, where there are
    such; training and names: all training pictures and their captions.
    """
    body = [
        *_head(results),
        f"<h2>Scores</h2>{_html_table(results['scores'])}<p class=quiet>{LEGEND}</p>",
        "<h2>Loss at each noise level, the picture's side first; shaded: one standard error over the pictures</h2>",
        levels_figure(results["levels"]),
    ]
    if results["over_time"]:
        body += ["<h2>Over the pictures seen</h2>", over_time_figure(results["over_time"])]
    nearest = []
    for on, saved in results["sets"].items():
        for i in np.argsort(saved.get("ratio", []), kind="stable")[:NEAREST]:
            a, b = saved["neighbours"][i]
            caption = f"{saved['ratio'][i]:.2f} · {on} caption “{saved['captions'][i]}” · {names[a]} · {names[b]}"
            nearest.append(([samples[on][i], training[a], training[b]], caption))
    body.append("<h2>Nearest to a copy</h2><p class=quiet>The sample, the training picture nearest to it, the second")
    body.append(f"nearest; under d1 / d2 = 1/3 it counts as a copy.</p>{_grid(nearest, '15rem')}")
    for on, images in samples.items():
        captions, beside = results["sets"][on]["captions"], [own[on]] if on in own else []
        tiles = [([images[i], *(real[i] for real in beside)], captions[i]) for i in spread(len(images), SHOWN)]
        title = f"<h2>Samples of {on} captions{', the real picture beside each' if beside else ''}</h2>"
        body.append(title + _grid(tiles, "9rem" if beside else "6rem") if tiles else "")
    fields = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in results["config"].items())
    body.append(f"<details><summary>Configuration</summary><div class=wide><table>{fields}</table></div></details>")
    with replacing(path) as beside:
        beside.write_text("\n".join(body) + "\n", encoding="utf-8")


def _head(results: dict) -> list[str]:
    """What was evaluated, and the answers."""
    checkpoint, data = results["checkpoint"], results["data"]
    title = html.escape(checkpoint["path"])
    about = (
        f"{checkpoint['images']:,} pictures seen in {checkpoint['seconds'] / 60:.0f} minutes of training on "
        f"{data['training']:,} pictures of {data['vendor']}; weights {checkpoint['hash'][:12]}, {checkpoint['ema']} "
        f"average. Sampled with {', '.join(f'{name} {value}' for name, value in results['sampling'].items())}. "
        f"Evaluated in {results['seconds'] / 60:.1f} minutes."
    )
    return [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p class=quiet>{html.escape(about)}</p>",
        *(f"<p class=answer><b>{question}</b> {html.escape(said)}</p>" for question, said in answers(results).items()),
        *(f"<p class=quiet>Note: {html.escape(note)}</p>" for note in results["notes"]),
    ]


def _html_table(scores: Sequence[Score]) -> str:
    rows = [
        f"<tr><td>{html.escape(s.name)}<br><small>{html.escape(s.by)}</small><td>{html.escape(s.on)}<td>{s.n or ''}"
        f"<td><b>{s.show()}</b><td>{s.show('shuffled')}<td>{s.show('real')}"
        for s in scores
    ]
    head = "<tr><th>score<th>on<th>of<th>samples<th>shuffled<th>real pictures"
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>"


def _grid(tiles: Sequence[tuple[list[np.ndarray], str]], cell: str) -> str:
    """Pictures side by side over their caption, as many tiles in a row as fit; `cell` is the least width of one."""
    figures = ""
    for images, caption in tiles:
        shown = ""
        for image in images:
            data = io.BytesIO()
            as_picture(image).save(data, format="PNG")
            shown += f"<img alt='' src='{_data_url(data)}'>"
        figures += f"<figure><div>{shown}</div><figcaption>{html.escape(caption)}</figcaption></figure>"
    return f"<div class=grid style='--cell: {cell}'>{figures}</div>"


def _data_url(png: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
