"""What `evaluate.py` found: results.json, the page drawn from it, and runs side by side.

The page is one file: pictures and figures inside, no script, nothing fetched. Its first paragraph, which says whether
the model is good, whether it is done and whether it copies, is computed from the scores and their errors.
"""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.scores import Interval, Score, beyond, difference, find, spread
from files import replacing
from images import as_picture, captioned_grid, save_png

SCHEMA = 1
FIELDS = {  # of results.json
    "schema": int, "checkpoint": dict, "config": dict, "data": dict, "sampling": dict, "sets": dict, "scores": list,
    "levels": dict, "over_time": list, "training_loss": list, "seconds": dict, "notes": list,
}  # fmt: skip
SETS = ("training", "held-out", "invented")  # captions
SHOWN = 30  # drawings of each set on the page
OFFENDERS = 6  # drawings nearest to a training picture, of each set


# results.json.


def write(path: Path, results: dict) -> None:
    """The whole file or none."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(results, default=dataclasses.asdict, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict:
    """A results.json, its scores as objects; ValueError names the file and the field that is wrong."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew with evaluate.py --report") from None
    if not isinstance(results, dict):
        raise ValueError(f"{path} is no results.json: it holds no object; name one that evaluate.py --report wrote")
    if results.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"{path}: schema is {results['schema']!r}, this version reads {SCHEMA}; write it anew")
    for field, kind in FIELDS.items():
        if not isinstance(results.get(field), kind):
            what = f"is {results[field]!r:.40}, not of type {kind.__name__}" if field in results else "is missing"
            raise ValueError(f"{path}: {field} {what}; write it anew with evaluate.py --report")
    try:
        for part, field in ("checkpoint", "images"), ("checkpoint", "path"), ("data", "fingerprint"):
            if field not in results[part]:
                raise ValueError(f"{part}.{field} is missing")
        scores = _scores(results["scores"], "scores")
        over_time = [entry_from(saved, f"over_time[{i}]") for i, saved in enumerate(results["over_time"])]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write it anew with evaluate.py --report") from None
    return {**results, "scores": scores, "over_time": over_time}


def entry_from(saved: object, where: str = "entry") -> dict:
    """One checkpoint of a curve over time as it was before it was JSON; ValueError names the field that is wrong."""
    for field, kind in ("name", str), ("images", int), ("scores", list):
        if not isinstance(saved, dict) or not isinstance(saved.get(field), kind):
            raise ValueError(f"{where}.{field} is missing or not of type {kind.__name__}")
    return {**saved, "scores": _scores(saved["scores"], f"{where}.scores")}


def _scores(saved: list, where: str) -> list[Score]:
    scores = []
    for i, fields in enumerate(saved):
        try:
            intervals = {
                k: fields[k] and Interval._make(map(_number, fields[k])) for k in ("value", "shuffled", "real")
            }
            intervals["value"].value + 0  # neither of these may be missing
            scores.append(Score(**{**fields, **intervals, "each": tuple(map(_number, fields["each"]))}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}[{i}] is damaged ({type(error).__name__}: {error})") from None
    return scores


def _number(saved: object) -> float | None:
    if saved is not None and not isinstance(saved, int | float):
        raise TypeError(f"{saved!r} is no number")
    return saved


# Runs side by side.


def comparison(paths: Sequence[Path]) -> str:
    """A table of the scores of runs; the words better and worse mark what differs from the first beyond the error."""
    if len(paths) < 2:
        raise ValueError("--compare needs at least two results.json")
    runs = [read(path) for path in paths]
    letters = [f"[{chr(ord('A') + i)}]" for i in range(len(runs))]
    first, titles, notes = runs[0], [], []
    for letter, path, run in zip(letters, paths, runs, strict=True):
        titles.append(f"{letter} {path}: {run['checkpoint']['path']}, {run['checkpoint']['images']:,} pictures seen")
        notes += [f"note: {letter} {what}" for what in unlike(first, run)]
    rows = [("", "on", *letters)]
    for key in dict.fromkeys(score.key for run in runs for score in run["scores"]):
        base, *others = scores = [find(run["scores"], *key) for run in runs]
        marks = ["", *(mark(first, run, base, score) for run, score in zip(runs[1:], others, strict=True))]
        cells = [f"{score.show()} {word}".strip() if score else "–" for score, word in zip(scores, marks, strict=True)]
        rows.append((f"{key[0]}, {key[2]}", key[1], *cells))
    legend = "better, worse: than [A], by more than the 95 % error of the difference."
    return "\n".join([*titles, *notes, "", *_columns(rows), "", legend])


def unlike(a: dict, b: dict) -> list[str]:
    """What a reader of b beside a must know."""
    facts = {
        "was evaluated on other pictures than [A]": lambda run: run["data"]["fingerprint"],
        "was drawn with other settings than [A]": lambda run: run["sampling"],
        "has the features of another extractor than [A]": lambda run: run.get("extractor"),
        "predicts something else than [A], so that their losses do not compare": lambda run: run["config"].get(
            "prediction"
        ),
    }
    return [what for what, fact in facts.items() if fact(a) != fact(b)]


def mark(a: dict, b: dict, before: Score | None, after: Score | None) -> str:
    """better or worse where a score of run b differs from that of run a beyond the error; paired where they allow it.

    Single values pair where the runs were asked the same: the same pictures, and the same captions. The pictures whose
    loss is measured follow from the data alone.
    """
    of_loss = after is not None and after.name == "loss"
    if before is None or after is None or (of_loss and a["config"].get("prediction") != b["config"].get("prediction")):
        return ""
    captions = [run["sets"].get(after.on, {}).get("captions") for run in (a, b)]
    same = a["data"]["fingerprint"] == b["data"]["fingerprint"] and (of_loss or captions[0] == captions[1])
    return difference(before, after, paired=same).verdict(after.better)


# In words.


def summary(results: dict) -> dict[str, str]:
    """The three answers, from the numbers and their errors."""
    answers = _good(results["scores"]), [done(results["over_time"])], _copies(results)
    return dict(zip(("Is it good?", "Is it done?", "Does it copy?"), map(" ".join, answers), strict=True))


def text(results: dict) -> str:
    """The scores, the answers and the time as plain text."""
    rows = [("", "on", "drawings", "shuffled", "real pictures")]
    rows += [(f"{s.name}, {s.by}", s.on, s.show(), s.show("shuffled"), s.show("real")) for s in results["scores"]]
    answers = [f"{question} {answer}" for question, answer in summary(results).items()]
    return "\n".join(["", *_columns(rows), "", *answers, "", times(results["seconds"])])


def curve(over_time: list[dict]) -> str:
    """A run's checkpoints as a table, and whether it is done and copies."""
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
        shown = [
            "–" if score is None else score.show() if score.share else f"{score.value.value:.4f}" for score in found
        ]
        rows.append((f"{entry['images']:,}", *shown))
    return "\n".join([*_columns(rows), "", done(over_time), copying_sets_in(over_time)])


def times(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    return f"{total / 60:.1f} minutes: " + ", ".join(f"{part} {spent / total:.0%}" for part, spent in seconds.items())


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} %"


def _good(scores: list[Score]) -> list[str]:
    own, judged = find(scores, "caption accuracy, top 1", by="pixels"), find(scores, "R-precision, top 1")
    said = []
    if own:
        steered = "The words steer the picture" if beyond(own, "shuffled") else "The words hardly steer the picture"
        said.append(
            f"{steered}: for {own.show()} of the training captions the nearest training picture is their own "
            f"(captions shuffled: {percent(own.shuffled)})."
        )
    if judged:
        better = "more often than" if beyond(judged, "shuffled") else "no more often, as far as so few can tell, than"
        said.append(
            f"Held-out captions are recognised in their drawings {better} by chance: {judged.show()}, "
            f"shuffled {percent(judged.shuffled)}, real pictures {percent(judged.real)}."
        )
    kid = find(scores, "KID", "held-out")
    if kid:
        apart = "can be told from" if beyond(kid, "real") else "cannot, by so few, be told from"
        said.append(f"As a set the drawings {apart} real pictures: KID {kid.show()}, real pictures {kid.show('real')}.")
    return said


def done(over_time: list[dict]) -> str:
    """Whether the held-out loss still falls, beyond the paired error of the same pictures and noise."""
    curve = [(entry["images"], find(entry["scores"], "loss", "held-out", "short average")) for entry in over_time]
    curve = [(images, score) for images, score in curve if score]
    if not curve and len(over_time) > 1:
        return "Whether it is done cannot be said: the data hold nothing out."
    if len(curve) < 2:
        return "Whether it is done one checkpoint cannot say: evaluate the run's folder for the curve over time."
    images, loss = zip(*curve, strict=True)
    best = min(range(len(loss)), key=lambda i: loss[i].value.value)
    last = difference(loss[best], loss[-1], paired=True)
    step = difference(loss[-2], loss[-1], paired=True)
    if last.beyond:
        return f"It has passed its best: the held-out loss was lowest at {images[best]:,} pictures and has risen since."
    if step.beyond and step.value < 0:
        return f"It is not done: the held-out loss still fell between {images[-2]:,} and {images[-1]:,} pictures."
    return f"The held-out loss has not changed beyond its error since {images[-2]:,} pictures."


def _copies(results: dict) -> list[str]:
    rates = [score for on in SETS if (score := find(results["scores"], "copy rate", on, "pixels"))]
    if not rates:
        return []
    listed = ", ".join(f"{score.show()} on {score.on} captions" for score in rates)
    real = f"; of real held-out pictures {percent(rates[0].real)} would count as copies" if rates[0].real else ""
    copying = any(beyond(score, "real") for score in rates)
    said = [f"{'It copies' if copying else 'It makes no exact copies that show'}: {listed}{real}."]
    for on in SETS:
        nearness = find(results["scores"], "d1/d2", on, "pixels")
        if nearness and nearness.real and nearness.value.high < nearness.real.low:
            said.append(
                f"On {on} captions it leans on single training pictures: the nearest is at {nearness.show()} of the "
                f"distance of the second nearest, for real held-out pictures at {nearness.show('real')}."
            )
    return said + [copying_sets_in(results["over_time"])] * bool(results["over_time"])


def copying_sets_in(over_time: list[dict]) -> str:
    """The first checkpoint whose copy rate lies above that of real held-out pictures, beyond both errors."""
    for entry in over_time:
        score = find(entry["scores"], "copy rate", by="pixels")
        if beyond(score, "real"):
            return f"Copying sets in by {entry['images']:,} pictures ({entry['name']}): {score.show()}."
    return f"No checkpoint copies up to {over_time[-1]['images']:,} pictures." if over_time else ""


# Figures: lines in colours, everything else in a grey that is readable on white and on black.

GREY, COLOURS = "#85858c", ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5")


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


def figures(results: dict) -> dict[str, bytes]:
    """The curves as PNG files, by name."""
    drawn = {"levels": _levels(results["levels"])}
    if results["training_loss"] or results["over_time"]:
        drawn["over_time"] = _over_time(results["over_time"], results["training_loss"])
    return drawn


def _png(figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    pyplot().close(figure)
    return data.getvalue()


def _levels(levels: dict) -> bytes:
    figure, axes = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    styles = {"short": "-", "long": ":"}
    for ema, sets in levels.items():
        for (on, curve), colour in zip(sets.items(), COLOURS, strict=False):
            mean, error = (np.array(curve[part], float) for part in ("mean", "error"))
            at = np.arange(1, len(mean) + 1)
            axes.plot(at, mean, styles[ema], color=colour, label=f"{on}, {ema} average")
            if ema == "short":
                axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="noise level, tenths of T", ylabel="loss", yscale="log", xticks=(1, 5, 10))
    if axes.lines:
        axes.legend()
    return _png(figure)


def _over_time(over_time: list[dict], training_loss: list) -> bytes:
    figure, (losses, rates) = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    if training_loss:
        losses.plot(*np.transpose(training_loss), color=GREY, alpha=0.6, linewidth=0.8, label="as training saw it")
    for on, colour in ("held-out", COLOURS[0]), ("training", COLOURS[1]):
        for average, style in ("short average", "-"), ("long average", ":"):
            _curve(losses, over_time, ("loss", on, average), f"{on}, {average}", colour, style)
    _curve(rates, over_time, ("caption accuracy, top 1", "", "pixels"), "own picture nearest", COLOURS[2], "-", 100)
    _curve(rates, over_time, ("copy rate", "", "pixels"), "copies", COLOURS[0], "-", 100)
    losses.set(xlabel="pictures seen", ylabel="loss", yscale="log")
    rates.set(xlabel="pictures seen", ylabel="% of training captions", ylim=(0, None))
    for axes in (losses, rates):
        if axes.lines:
            axes.legend()
    return _png(figure)


def _curve(axes, over_time: list[dict], key: tuple, label: str, colour: str, style: str, scale: float = 1) -> None:
    points = [(entry["images"], score.value) for entry in over_time if (score := find(entry["scores"], *key))]
    if points:
        images, values = zip(*points, strict=True)
        value, low, high = scale * np.array(values, float).T
        axes.plot(images, value, style, color=colour, marker="o", markersize=3, label=label)
        if scale == 100:  # the error of a loss is that of the pictures, the same at every checkpoint
            axes.fill_between(images, low, high, color=colour, alpha=0.15, linewidth=0)


# The page.

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
    "Shuffled: the same drawings, their captions exchanged. Real: real pictures in the place of the drawings, which is "
    "the floor of a distance or a copy rate and the ceiling of the rest. In brackets 95 % intervals. From KID to "
    "coverage, drawings for training captions are compared with the held-out pictures and those for held-out captions "
    "with the training pictures; so are the real pictures of the same captions, in equal number, as it matters here."
)


def write_page(folder: Path, results: dict, drawn: dict, own: dict, training: np.ndarray, names: list[str]) -> Path:
    """report.html and its pictures as PNG files; drawn and own are uint8 pictures by set, own may lack a set."""
    curves = figures(results)
    for name, data in curves.items():
        with replacing(folder / f"{name}.png") as beside:
            beside.write_bytes(data)
    for on, images in drawn.items():
        if len(images):
            shown = spread(len(images), SHOWN)
            captions = [results["sets"][on]["captions"][i] for i in shown]
            save_png(captioned_grid(images[shown], captions, columns=6, cell=96), folder / f"{on}.png", None)
    copies = offenders(results["sets"])
    if copies:
        tiles, words = [], []
        for on, i, (first, second), ratio in copies:
            tiles += [drawn[on][i], training[first], training[second]]
            words += [results["sets"][on]["captions"][i], f"{ratio:.2f}: {names[first]}", names[second]]
        grid = captioned_grid(tiles, words, columns=6, cell=96)
        save_png(grid, folder / "neighbours.png", None)
    page = folder / "report.html"
    with replacing(page) as beside:
        beside.write_text(_page(results, curves, drawn, own, training, names), encoding="utf-8")
    return page


def offenders(sets: dict) -> list[tuple[str, int, tuple[int, int], float]]:
    """Of each set the drawings nearest to a training picture: set, number, its two neighbours, d1 / d2."""
    worst = []
    for on, saved in sets.items():
        for i in np.argsort(saved.get("ratio", []), kind="stable")[:OFFENDERS]:
            worst.append((on, int(i), tuple(saved["neighbours"][i]), saved["ratio"][i]))
    return worst


def _page(results: dict, curves: dict, drawn: dict, own: dict, training: np.ndarray, names: list[str]) -> str:
    told, checkpoint, sampling = html.escape, results["checkpoint"], results["sampling"]
    about = (
        f"{checkpoint['path']}, {checkpoint['images']:,} pictures seen in {checkpoint['seconds'] / 60:.0f} minutes of "
        f"training on {results['data']['training']:,} pictures of {results['data']['vendor']}; weights "
        f"{checkpoint['hash'][:12]}, {checkpoint['ema']} average. Drawn with "
        f"{', '.join(f'{name} {value}' for name, value in sampling.items())}."
    )
    body = [
        f"<h1>{told(checkpoint['path'])}</h1><p class=quiet>{told(about)}</p>",
        *(f"<p class=answer><b>{question}</b> {told(answer)}</p>" for question, answer in summary(results).items()),
        "".join(f"<p class=quiet>Note: {told(note)}</p>" for note in results["notes"]),
        f"<h2>Scores</h2>{_table(results['scores'])}<p class=quiet>{told(LEGEND)}</p>",
    ]
    captions = {
        "levels": "Loss at each noise level, the picture's side first; shaded: one standard error over the pictures.",
        "over_time": "Loss, caption accuracy and copies over the pictures seen.",
    }
    for name, data in curves.items():
        body.append(f"<h2>{captions[name]}</h2><img class=curve alt='' src='{_data(data)}'>")
    copies = offenders(results["sets"])
    if copies:
        body.append("<h2>Nearest to a copy</h2><p class=quiet>The drawing, the training picture nearest to it, the")
        body.append(" second nearest; under d1 / d2 = 1/3 it counts as a copy.</p>")
        tiles = [
            _tile(
                [drawn[on][i], training[a], training[b]],
                f"{ratio:.2f} · {on} caption “{results['sets'][on]['captions'][i]}” · {names[a]} · {names[b]}",
            )
            for on, i, (a, b), ratio in copies
        ]
        body.append(_grid(tiles, "15rem"))
    for on, images in drawn.items():
        shown = spread(len(images), SHOWN)
        if len(shown):
            beside = ", the real picture beside each" if on in own else ""
            body.append(f"<h2>Drawn for {on} captions{beside}</h2>")
            tiles = [
                _tile([images[i], *([own[on][i]] if on in own else [])], results["sets"][on]["captions"][i])
                for i in shown
            ]
            body.append(_grid(tiles, "9rem" if on in own else "6rem"))
    body.append(f"<h2>Time</h2><p>{told(times(results['seconds']))}.</p>")
    fields = "".join(f"<tr><td>{told(k)}<td>{told(str(v))}" for k, v in results["config"].items())
    body.append(f"<details><summary>Configuration</summary><div class=wide><table>{fields}</table></div></details>")
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{told(checkpoint['path'])}</title><style>{STYLE}</style>"
    )
    return head + "\n".join(body) + "\n"


def _table(scores: list[Score]) -> str:
    rows = [
        f"<tr><td>{html.escape(s.name)}<br><small>{html.escape(s.by)}</small><td>{html.escape(s.on)}<td>{s.n or ''}"
        f"<td><b>{s.show()}</b><td>{s.show('shuffled')}<td>{s.show('real')}"
        for s in scores
    ]
    head = "<tr><th>score<th>on<th>of<th>drawings<th>shuffled<th>real pictures"
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>"


def _grid(tiles: list[str], cell: str) -> str:
    return f"<div class=grid style='--cell: {cell}'>{''.join(tiles)}</div>"


def _tile(images: list[np.ndarray], caption: str) -> str:
    shown = "".join(f"<img alt='' src='{_data(_bytes(image))}'>" for image in images)
    return f"<figure><div>{shown}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


def _bytes(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    as_picture(image).save(data, format="PNG")
    return data.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
