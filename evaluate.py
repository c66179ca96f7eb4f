"""Measure a checkpoint: is it good, is it done, does it only copy? `python evaluate.py [--checkpoint FOLDER]`.

    python evaluate.py                                     caption accuracy: does the caption steer the picture?
    python evaluate.py --report results --samples 500      everything on one page: results/report.html
    python evaluate.py --checkpoint models_vA0             loss and copies over time: every checkpoint of that run
    python evaluate.py --compare a/results.json b/results.json

Draws captions and looks for the nearest training picture, by pixel distance. Caption accuracy is the share for which
that is the caption's own picture; with the captions shuffled it must fall to chance. A report needs matplotlib.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from params import Sampling

if TYPE_CHECKING:
    import numpy as np

    from evaluation.metrics import Neighbours
    from evaluation.scores import Score
    from pipeline import DiffusionPipeline

BATCH = 16  # captions drawn and kept at a time: what an interruption loses
CURVE = 64  # training captions drawn for each checkpoint of a curve over time


@dataclass(frozen=True)
class Options:
    checkpoint: Path = Path("models_vA0/final")  # folder written by train.py, or a run's: all of its checkpoints
    report: Path | None = None  # folder for report.html, results.json and pictures
    compare: tuple[Path, ...] = ()  # results.json of two or more reports, to set side by side
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    extractor: str = "efficientnet-lite0"  # of features: that, a folder with a DINOv2, or an .onnx file
    data: Path | None = None  # dataset, where it is no longer where the checkpoint was trained
    samples: int = 256  # pictures to draw
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    seed: int = 0  # the first picture's; each has the next one
    ema: Literal["short", "long"] = "short"  # which average of the weights draws


def main() -> None:
    try:
        options = tyro.cli(Options, description=__doc__, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    except ValueError as error:  # of Sampling, which says which field is wrong and what is allowed
        sys.exit(f"evaluate.py: {error}")
    import dataset
    import parallel
    from checkpoint import CheckpointError
    from text_encoder import EncoderError

    parallel.setup()
    try:
        evaluate(options)
    except (dataset.DatasetError, CheckpointError, EncoderError, ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what is drawn is kept, the same command goes on")


def evaluate(options: Options) -> None:
    import checkpoint
    from evaluation import report

    if options.compare:
        print(report.comparison(options.compare))
        return
    if options.samples < 2:
        raise ValueError(f"--samples {options.samples}: at least 2 are needed")
    if options.report:
        report.pyplot()  # missing? rather now than after the drawing
        if options.extractor != Options.extractor:
            from evaluation import features

            features.load(options.extractor)  # likewise
    path = options.checkpoint
    if run := checkpoint.checkpoints(path):
        path = run[-1]
        print(report.curve(over_time(run, options)))
    if options.report:
        full_report(path, options)
    elif not run:
        quick(load(path, options), options)


# What is evaluated.


class Subject(NamedTuple):
    """A checkpoint and the real pictures of both sides of the split."""

    path: Path
    pipeline: "DiffusionPipeline"
    training: "np.ndarray"  # uint8 [n, h, w, c]
    names: list[str]
    heldout: "np.ndarray"
    heldout_names: list[str]
    fingerprint: str
    notes: list[str]  # what a reader must know; grows


def load(path: Path, options: Options) -> Subject:
    import dataset
    from pipeline import DiffusionPipeline

    pipeline = DiffusionPipeline(path, options.encoder, ema=options.ema)
    pictures = dataset.from_config(pipeline.config, options.data)
    training, heldout = (dataset.side(pictures, heldout=which) for which in (False, True))
    sides = (training.images, training.names, heldout.images, heldout.names)
    subject = Subject(path, pipeline, *sides, pictures.fingerprint, [])
    if pictures.fingerprint != pipeline.about["dataset"]["fingerprint"]:
        note(subject, "the pictures are not those that the checkpoint was trained on")
    return subject


def note(subject: Subject, what: str) -> None:
    subject.notes.append(what)
    print(f"note: {what}", flush=True)


# Which captions, and their drawings.


class Captions(NamedTuple):
    texts: list[str]
    own: Sequence[int]  # the row of each one's real picture on its side of the split; empty for invented ones
    seeds: list[int]


def choose(names: list[str], heldout: list[str], samples: int, seed: int) -> dict[str, Captions]:
    """A quarter of the samples for held-out captions, a quarter for invented ones, the rest for training captions.

    Each set is spread over the data and no caption comes twice: where there are fewer captions, fewer are drawn, of
    held-out and invented ones to the gain of the training captions. Seeds count up from `seed` through the sets.
    """
    from evaluation.scores import spread

    unseen = spread(len(heldout), samples // 4)
    made = invented([*names, *heldout], samples // 4)
    trained = spread(len(names), samples - len(unseen) - len(made))
    chosen = {
        "training": ([names[row] for row in trained], trained.tolist()),
        "held-out": ([heldout[row] for row in unseen], unseen.tolist()),
        "invented": (made, []),
    }
    for on, (texts, own) in chosen.items():
        chosen[on] = Captions(texts, own, list(range(seed, seed + len(texts))))
        seed += len(texts)
    return chosen


def invented(captions: list[str], count: int) -> list[str]:
    """Captions that nobody has drawn: the first word of a real one of two words before the last word of another.

    "red heart" and "wrapped gift" give "red gift", unless there is one. Common words come up as often as in the data.
    Of several vendors the second one's style is asked for.
    """
    import numpy as np

    two_words = (re.fullmatch(r"(\S+) (\S+?)(, .+ style)?", caption) for caption in captions if ":" not in caption)
    pairs = [words.groups("") for words in two_words if words]
    if not pairs:
        return []
    drawn = np.random.default_rng(0).integers(len(pairs), size=(100 * count, 2))
    found = dict.fromkeys(f"{pairs[a][0]} {pairs[b][1]}{pairs[b][2]}" for a, b in drawn)
    known = {caption.lower() for caption in captions}
    return [caption for caption in found if caption.lower() not in known][:count]


def sampling(subject: Subject, options: Options) -> dict:
    """What a drawing depends on, besides the checkpoint, its caption and its seed."""
    return subject.pipeline.resolved(options.sampling).to_json()


def draw(subject: Subject, texts: list[str], seeds: list[int], options: Options) -> dict[str, "np.ndarray"]:
    return {"images": subject.pipeline.generate_arrays(texts, options.sampling, seeds=seeds)}


def drawings(subject: Subject, sets: dict[str, Captions], options: Options) -> dict[str, "np.ndarray"]:
    """uint8 pictures of each set, kept batch by batch under a hash of all that they depend on."""
    import numpy as np
    from tqdm import tqdm

    from files import cached

    recipe = [subject.pipeline.hash, sampling(subject, options)]
    drawn = {}
    with tqdm(total=sum(len(chosen.texts) for chosen in sets.values()), unit="img", disable=None) as bar:
        for on, chosen in sets.items():
            pictures = [np.zeros((0, *subject.training.shape[1:]), np.uint8)]
            for start in range(0, len(chosen.texts), BATCH):
                texts, seeds = chosen.texts[start : start + BATCH], chosen.seeds[start : start + BATCH]
                make = partial(draw, subject, texts, seeds, options)
                pictures.append(cached("drawn", json.dumps([*recipe, texts, seeds]), make)["images"])
                bar.update(len(texts))
            drawn[on] = np.concatenate(pictures)
    return drawn


# Caption accuracy alone.


def quick(subject: Subject, options: Options) -> None:
    import numpy as np

    from evaluation import metrics, scores

    names = subject.names
    own, drawn = on_training(subject, options.samples, options)
    distance = metrics.distances(drawn, subject.training)
    print(f"{len(own)} captions of {len(names)} training pictures, guidance {options.sampling.c:g}")
    print(f"{'':22}{'nearest':>9}{'top 5':>9}{'median rank':>13}")
    for label, rows in (("its own caption", own), ("captions shuffled", scores.shuffled(own))):
        rank = metrics.ranks(distance, rows)
        print(f"{label:22}{metrics.top(rank, 1):9.1%}{metrics.top(rank, 5):9.1%}{np.median(rank) + 1:13.0f}")
    print(f"{'chance':22}{1 / len(names):9.1%}{min(1, 5 / len(names)):9.1%}{(len(names) + 1) / 2:13.0f}")


def on_training(subject: Subject, most: int, options: Options) -> tuple["np.ndarray", "np.ndarray"]:
    """The rows of at most `most` training captions, and their drawings."""
    from evaluation.scores import spread

    own = spread(len(subject.names), most)
    seeds = [options.seed + i for i in range(len(own))]
    chosen = Captions([subject.names[row] for row in own], own, seeds)
    return own, drawings(subject, {"training": chosen}, options)["training"]


# What is measured.


def losses(subject: Subject) -> tuple[list["Score"], dict]:
    """Held-out loss and that of as many training pictures, for both averages; and the curves over the noise levels."""
    import numpy as np
    from tqdm import tqdm

    import checkpoint
    import dataloader
    import training
    from evaluation import heldout
    from evaluation.scores import mean, spread

    pipeline = subject.pipeline
    config, like = pipeline.config, pipeline.weights
    enough = len(subject.heldout) > 1
    rows = spread(len(subject.names), len(subject.heldout) if enough else CURVE)
    sets = {"held-out": (subject.heldout, subject.heldout_names)} if enough else {}
    sets["training"] = subject.training[rows], [subject.names[row] for row in rows]
    averages = checkpoint.restore(subject.path, {"ema_short": like, "ema_long": like})
    measure = heldout.build_losses(config, training.graphdef(config, pipeline.encoder.dim))
    found, levels = [], {"short": {}, "long": {}}
    bar = partial(tqdm, unit=" batches", leave=False, disable=None)
    for on, (images, names) in sets.items():
        text = dataloader.encode(pipeline.encoder, names, config.TEXT_LEN)
        for ema, curves in levels.items():
            each = heldout.loss_per_level(measure, averages[f"ema_{ema}"], images, *text, T=config.T, progress=bar)
            found.append(mean("loss", on, f"{ema} average", heldout.per_picture(each, config.T)))
            curve = {"mean": each.mean(axis=0), "error": each.std(axis=0, ddof=1) / np.sqrt(len(each))}
            curves[on] = {part: [None if np.isnan(x) else float(x) for x in line] for part, line in curve.items()}
    return found, levels


def in_pixels(subject: Subject, drawn: dict, own: Sequence[int]) -> tuple[list["Score"], dict[str, "Neighbours"]]:
    """Caption accuracy and copies by pixels, and the nearest training pictures of every drawing."""
    from evaluation.scores import accuracy, flat

    drawn = {on: flat(images) for on, images in drawn.items()}
    training = flat(subject.training)
    found, near = neighbourhood("pixels", drawn, training, flat(subject.heldout))
    return [*accuracy("pixels", drawn["training"], training, own), *found], near


def neighbourhood(by: str, drawn: dict, training: "np.ndarray", heldout: "np.ndarray"):
    from evaluation import metrics
    from evaluation.scores import copies

    near = {on: metrics.neighbours(rows, training) for on, rows in {**drawn, "real": heldout}.items() if len(rows)}
    real = near.pop("real", None)
    return list(copies(by, near, real)), near


def in_features(
    subject: Subject, sets: dict[str, Captions], drawn: dict, options: Options, clock: "Clock"
) -> tuple[list["Score"], dict | None]:
    """What needs the extractor: captions and copies in features, realism, R-precision by a judge."""
    from evaluation import features
    from evaluation.scores import accuracy, realism

    try:
        extractor = features.load(options.extractor)
    except features.FeatureError as error:
        note(subject, f"no scores in features: {error}")
        return [], None
    by = extractor.name
    with clock.part("features"):
        training, heldout = (features.extract(extractor, images) for images in (subject.training, subject.heldout))
        drawn = {on: features.extract(extractor, images) for on, images in drawn.items()}
    with clock.part("scores in features"):
        found = accuracy(by, drawn["training"], training, sets["training"].own)
        found += neighbourhood(by, drawn, training, heldout)[0]
        for on, mine, other in (("training", training, heldout), ("held-out", heldout, training)):
            try:
                found += realism(by, on, drawn[on], mine[sets[on].own], other)
            except ValueError as error:
                note(subject, f"{on} captions: {error}")
    with clock.part("judge"):
        try:
            found += judged(subject, extractor, sets["held-out"], drawn["held-out"], heldout, options.data)
        except ValueError as error:
            note(subject, f"R-precision on held-out captions: {error}")
    return found, {"name": extractor.name, "identity": extractor.identity}


def judged(
    subject: Subject, extractor, chosen: Captions, drawn: "np.ndarray", heldout: "np.ndarray", root: Path | None
) -> list["Score"]:
    """R-precision on held-out captions, by a judge that has seen real training pictures of every vendor and no other.

    Its words are MiniLM's whatever encoder the checkpoint has, so that checkpoints of different encoders compare.
    """
    from evaluation import judge as judges
    from evaluation.scores import recognition
    from text_encoder import MINILM, TextEncoder

    if len(chosen.texts) < 6:
        raise ValueError(f"top 5 needs at least 6 of them, got {len(chosen.texts)}; raise --samples or hold out more")
    config, encoder = subject.pipeline.config, TextEncoder(MINILM)
    judge = judges.from_config(config, extractor, encoder, root)
    captions = judges.embed(encoder, chosen.texts, config.TEXT_LEN) - judge.mean
    seen, real = (judge(features) - judge.mean for features in (drawn, heldout[chosen.own]))
    return recognition(f"judge on {extractor.name}", seen, real, captions)


# A run over time.


def over_time(run: list[Path], options: Options) -> list[dict]:
    """Losses, caption accuracy and copy rate of each checkpoint of a run, kept in its over_time.json as they come."""
    import checkpoint
    import dataset
    from files import replacing
    from params import Params

    pictures = dataset.from_config(Params.from_json(checkpoint.about(run[-1])["config"]), options.data)
    keys = entry_keys(run, options, pictures.fingerprint)
    entries = known_entries(run, keys)
    for path, key in zip(run, keys, strict=True):
        if key not in entries:
            print(f"{path}:", flush=True)
            entries[key] = entry(load(path, options), options)
            with replacing(path.parent / "over_time.json") as beside:
                beside.write_text(json.dumps(entries, default=asdict) + "\n", encoding="utf-8")
    return [entries[key] for key in keys]


def entry(subject: Subject, options: Options) -> dict:
    own, drawn = on_training(subject, CURVE, options)
    found = [*losses(subject)[0], *in_pixels(subject, {"training": drawn}, own)[0]]
    return {"name": subject.path.name, "images": images_seen(subject), "scores": found}


def images_seen(subject: Subject) -> int:
    return subject.pipeline.about["step"] * subject.pipeline.config.B


def entry_keys(run: list[Path], options: Options, fingerprint: str) -> list[str]:
    """A name for what is measured of each checkpoint: its `about` has step and seconds, which no other run repeats."""
    import checkpoint

    asked = [fingerprint, CURVE, options.sampling.to_json(), options.seed, options.ema]
    return [hashlib.sha256(json.dumps([checkpoint.about(path), *asked]).encode()).hexdigest() for path in run]


def known_entries(run: list[Path], keys: list[str]) -> dict[str, dict]:
    """What was measured before of a run's checkpoints, oldest first; a damaged file is as good as none."""
    from evaluation.report import entry_from

    with suppress(OSError, ValueError, TypeError, IndexError):
        saved = json.loads((run[0].parent / "over_time.json").read_text(encoding="utf-8"))
        return {key: entry_from(saved[key]) for key in keys if key in saved}
    return {}


# Everything.


class Clock(dict):
    """Seconds by part."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0) + time.perf_counter() - start


def full_report(path: Path, options: Options) -> None:
    """All scores of one checkpoint: results.json, report.html and its pictures."""
    import numpy as np

    import checkpoint
    from evaluation import report
    from evaluation.scores import ratio

    clock = Clock()
    with clock.part("loading"):
        subject = load(path, options)
        sets = choose(subject.names, subject.heldout_names, options.samples, options.seed)
    with clock.part("sampling"):
        drawn = drawings(subject, sets, options)
    with clock.part("held-out loss"):
        by_loss, levels = losses(subject)
    with clock.part("pixels"):
        by_pixels, near = in_pixels(subject, drawn, sets["training"].own)
    by_features, extractor = in_features(subject, sets, drawn, options, clock)

    about, config = subject.pipeline.about, subject.pipeline.config
    siblings = checkpoint.checkpoints(path.parent)
    results = {
        "schema": report.SCHEMA,
        "checkpoint": {
            "path": str(path), "hash": subject.pipeline.hash, "ema": options.ema, "step": about["step"],
            "images": images_seen(subject), "seconds": about["seconds"],
        },
        "config": config.to_json(),
        "data": {
            "fingerprint": subject.fingerprint, "vendor": config.vendor,
            "training": len(subject.names), "held-out": len(subject.heldout_names),
        },
        "sampling": {**sampling(subject, options), "seed": options.seed},
        "extractor": extractor,
        "sets": {on: {"captions": chosen.texts, "seeds": chosen.seeds} for on, chosen in sets.items()},
        "scores": [*by_pixels, *by_features, *by_loss],
        "levels": levels,
        "over_time": list(known_entries(siblings, entry_keys(siblings, options, subject.fingerprint)).values()),
        "training_loss": training_loss(path.parent),
        "seconds": clock,
        "notes": subject.notes,
    }  # fmt: skip
    for on, found in near.items():
        results["sets"][on] |= {"neighbours": found.index.tolist(), "ratio": ratio(found).tolist()}
    own = {"training": subject.training[sets["training"].own], "held-out": subject.heldout[sets["held-out"].own]}
    with clock.part("page"):
        page = report.write_page(options.report, results, drawn, own, subject.training, subject.names)
        with report.replacing(options.report / "drawn.npz") as beside, beside.open("wb") as stream:
            np.savez_compressed(stream, **drawn)
    report.write(options.report / "results.json", results)
    print(report.text(results))
    print(f"{page} written, with results.json and its pictures beside it")


def training_loss(run: Path) -> list[list[float]]:
    """Some 200 means of the loss that training logged, over the pictures seen; none without a log."""
    import numpy as np

    with suppress(OSError, ValueError, KeyError):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        points = [[line["images"], line["loss"]] for line in lines]
        return [np.mean(part, axis=0).tolist() for part in np.array_split(points, min(200, len(points)))]
    return []


if __name__ == "__main__":
    main()
