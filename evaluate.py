"""Measure a checkpoint: is it good, is it done, does it only copy? `python evaluate.py [--checkpoint FOLDER]`.

    python evaluate.py                                     caption accuracy: does the caption steer the picture?
    python evaluate.py --report results --samples 500      everything on one page: results/report.html
    python evaluate.py --checkpoint models_vA0             loss and copies over time: every checkpoint of that run
    python evaluate.py --compare a/results.json b/results.json
    python evaluate.py --recommend 1 2 3 5 7               which guidance draws best; the checkpoint keeps it as its own
    python evaluate.py --report b --pictures b.npz         the same page on pictures that others have drawn

Caption accuracy is the share of training captions whose sample is nearer, pixel by pixel, to its own training picture
than to any other. With the captions shuffled it must fall to chance. A report adds held-out and invented captions,
distances between samples and real pictures, copies of training pictures, and the loss on held-out pictures. Transparent
samples and real pictures are laid on white before anything but the loss is measured, so that RGB and RGBA compare.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files
from params import Sampling

if TYPE_CHECKING:  # what takes long is imported where it is used, so that --help is instant
    import numpy as np

    from dataset import Pictures
    from evaluation.captions import Captions
    from evaluation.features import Extractor
    from evaluation.scores import Score
    from pipeline import DiffusionPipeline

BATCH = 16  # captions sampled and kept on disk at a time: what an interruption loses
CURVE = 64  # training captions sampled for each checkpoint of a curve over time


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None  # as of test.py, or the folder of a whole run; models_vA0/final, else pretrained
    report: Path | None = None  # folder for report.html and results.json
    pictures: Path | None = None  # npz of others' pictures of the same captions, to score in the place of samples
    compare: tuple[Path, ...] = ()  # results.json of two or more reports, to set side by side
    recommend: tuple[float, ...] = ()  # guidance (c) to choose from, on held-out captions, for this checkpoint
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    data: Path | None = None  # dataset, where it is no longer where the checkpoint was trained
    samples: int = 256  # pictures to sample
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    seed: int = 0  # the first sample's; each has the next one
    ema: Literal["short", "long"] | None = None  # which average of the weights samples; short, or the only one there


# The checkpoint and its samples.


class Subject(NamedTuple):
    """What is evaluated: a checkpoint, and the real pictures of both sides of the split."""

    path: Path
    options: Options
    pipeline: DiffusionPipeline
    real: dict[str, Pictures]  # "training", "held-out"
    images: dict[str, np.ndarray]  # theirs on white, uint8 [n, h, w, 1 or 3]
    notes: list[str]  # what a reader must know; grows

    @property
    def seen(self) -> int:
        """Pictures, by training."""
        return self.pipeline.about["step"] * self.pipeline.config.B

    def note(self, what: str) -> None:
        self.notes.append(what)
        print(f"note: {what}", flush=True)


def load(path: Path, options: Options) -> Subject:
    import dataset
    from images import on_white
    from pipeline import DiffusionPipeline

    pipeline = DiffusionPipeline(path, options.encoder, ema=options.ema)
    pictures = dataset.from_config(pipeline.config, options.data)
    real = {on: dataset.side(pictures, heldout=on == "held-out") for on in ("training", "held-out")}
    images = {on: on_white(side.images) for on, side in real.items()}
    subject = Subject(path, options, pipeline, real, images, [])
    if pictures.fingerprint != pipeline.about["dataset"]["fingerprint"]:
        subject.note("the pictures are not those that the checkpoint was trained on")
    return subject


def samples_of(subject: Subject, sets: dict[str, Captions]) -> dict[str, np.ndarray]:
    """uint8 samples of each set, on white, kept on disk batch by batch under a hash of all that they depend on."""
    import numpy as np
    from tqdm import tqdm

    from images import on_white

    def sample(texts: list[str], seeds: list[int]) -> dict[str, np.ndarray]:
        return {"images": on_white(subject.pipeline.generate_arrays(texts, subject.options.sampling, seeds=seeds))}

    recipe = [subject.pipeline.hash, subject.pipeline.resolved(subject.options.sampling).to_json()]
    samples = {on: [np.zeros((0, *subject.images["training"].shape[1:]), np.uint8)] for on in sets}
    starts = [(on, start) for on, chosen in sets.items() for start in range(0, len(chosen.texts), BATCH)]
    seed = subject.options.seed
    for on, start in tqdm(starts, unit=" batches", disable=None):
        texts = sets[on].texts[start : start + BATCH]
        seeds = list(range(seed, seed + len(texts)))
        seed += len(texts)
        key = json.dumps([*recipe, texts, seeds])
        samples[on].append(files.cached("samples", key, partial(sample, texts, seeds))["images"])
    return {on: np.concatenate(batches) for on, batches in samples.items()}


# What is measured.


def losses(subject: Subject) -> tuple[list[Score], dict]:
    """Loss of each average of the weights on held-out and on as many training pictures, and that by noise level."""
    import numpy as np

    import dataset
    from evaluation.heldout import per_picture
    from evaluation.scores import mean, spread
    from pipeline import DiffusionPipeline

    unseen, trained = subject.real["held-out"], subject.real["training"]
    sets = {"held-out": unseen} if len(unseen.names) > 1 else {}
    sets["training"] = dataset.select(trained, spread(len(trained.names), len(unseen.names) if sets else CURVE))
    own = subject.pipeline
    levels = {ema: {} for ema in ([own.ema] if "ema" in own.about else ["short", "long"])}  # an export has only one
    found = []
    for ema, curves in levels.items():
        pipeline = own if ema == own.ema else DiffusionPipeline(subject.path, subject.options.encoder, ema=ema)
        for on, pictures in sets.items():
            key = json.dumps([pipeline.hash, pictures.fingerprint, on, len(pictures.names)])
            each = files.cached("losses", key, partial(loss_per_level, pipeline, pictures))["losses"]
            found.append(mean("loss", on, f"{ema} average", per_picture(each, pipeline.config.T)))
            curve = {"mean": each.mean(axis=0), "error": each.std(axis=0, ddof=1) / np.sqrt(len(each))}
            curves[on] = {part: [None if np.isnan(x) else float(x) for x in line] for part, line in curve.items()}
    return found, levels


def loss_per_level(pipeline: DiffusionPipeline, pictures: Pictures) -> dict[str, np.ndarray]:
    import dataloader
    from evaluation import heldout

    text = dataloader.encode(pipeline.encoder, pictures.names, pipeline.config.TEXT_LEN)
    measure = heldout.build_measure(pipeline.config, pictures.images, *text)
    return {"losses": measure(pipeline.weights)}


def in_features(
    subject: Subject, extractor: Extractor, sets: dict[str, Captions], samples: dict[str, np.ndarray]
) -> list[Score]:
    """What needs the extractor: caption accuracy and copies, realism, R-precision by the judge."""
    from evaluation import features, judge
    from evaluation.scores import realism, words_and_copies

    extract = partial(features.extract, extractor)
    samples, real = ({on: extract(images) for on, images in each.items()} for each in (samples, subject.images))
    found, _ = words_and_copies(extractor.name, samples, real, sets["training"].own)
    own = {on: real[on][sets[on].own] for on in real}
    for on, other in (("training", "held-out"), ("held-out", "training")):
        try:
            found += realism(extractor.name, on, samples[on], own[on], real[other])
        except ValueError as error:
            subject.note(f"{on} captions: {error}")
    try:
        judging = (subject.pipeline.config, extractor, subject.options.data)
        found += judge.recognition(*judging, sets["held-out"].texts, samples["held-out"], own["held-out"])
    except ValueError as error:
        subject.note(f"R-precision on held-out captions: {error}")
    return found


# What is written.


def recommend(subject: Subject) -> None:
    """Keep in a checkpoint which guidance draws held-out captions best, after printing what each one gives.

    That is the one of lowest KID among those whose drawings are recognised as often as any, as far as the errors tell.
    """
    import checkpoint
    from evaluation import features
    from evaluation.captions import evenly
    from evaluation.scores import difference, find
    from sharing import portable

    if not subject.path.is_dir():
        raise ValueError(f"--recommend: {subject.path} is not a folder here, which could keep it; download it first")
    options, names = subject.options, {on: side.names for on, side in subject.real.items()}
    sets = {"held-out": evenly(names["held-out"], options.samples // 2)}
    sets["training"] = evenly(names["training"], options.samples - len(sets["held-out"].texts))
    columns = (("KID", "held-out"), ("R-precision, top 5", "held-out"), ("caption accuracy, top 1", "training"))
    extractor, found = features.load(), []
    print("".join(f"{title:26}" for title in ("guidance", *(f"{name}, {on}" for name, on in columns))))
    for c in options.recommend:
        tried = subject._replace(options=replace(options, sampling=replace(options.sampling, c=c)))
        scores = in_features(tried, extractor, sets, samples_of(tried, sets))
        kid, recognised, steered = (find(scores, *column) for column in columns)
        if not kid or not recognised:
            raise ValueError("--recommend: the data hold out too few captions to choose by")
        found.append((tried.options.sampling, kid, recognised))
        print(f"{c:<26g}" + "".join(f"{score.show():26}" for score in (kid, recognised, steered)), flush=True)

    most = max((recognised for _, _, recognised in found), key=lambda score: score.value.value)
    good = [each for each in found if not difference(each[2], most, paired=True)]
    best, *_ = min(good, key=lambda each: each[1].value.value)
    (portable if portable.is_exported(subject.path) else checkpoint).recommend(subject.path, best)
    told = subject.pipeline.resolved(best).told()
    print(f"{subject.path} recommends {told}. Next: python test.py --checkpoint {subject.path}")


def caption_accuracy(subject: Subject) -> None:
    """Print how often the nearest training picture is the caption's own, beside shuffled captions and chance."""
    import numpy as np

    from evaluation import metrics
    from evaluation.captions import evenly
    from evaluation.scores import shuffled

    n, chosen = len(subject.real["training"].names), evenly(subject.real["training"].names, subject.options.samples)
    distance = metrics.distances(samples_of(subject, {"": chosen})[""], subject.images["training"])
    told = subject.pipeline.resolved(subject.options.sampling).told()
    print(f"{len(distance)} captions of {n} training pictures, {told}")
    print(f"{'':22}{'nearest':>9}{'top 5':>9}{'median rank':>13}")
    for label, rows in (("its own caption", np.array(chosen.own)), ("captions shuffled", shuffled(chosen.own))):
        rank = metrics.ranks(distance, rows)
        print(f"{label:22}{metrics.top(rank, 1):9.1%}{metrics.top(rank, 5):9.1%}{np.median(rank) + 1:13.0f}")
    print(f"{'chance':22}{1 / n:9.1%}{min(1, 5 / n):9.1%}{(n + 1) / 2:13.0f}")


def point_of_curve(subject: Subject) -> dict:
    """Losses, caption accuracy and copies of one checkpoint of a run."""
    from evaluation.captions import evenly
    from evaluation.scores import words_and_copies

    print(f"{subject.path}:", flush=True)
    chosen = evenly(subject.real["training"].names, CURVE)
    samples = samples_of(subject, {"training": chosen})
    by_pixels, _ = words_and_copies("pixels", samples, subject.images, chosen.own)
    return {"name": subject.path.name, "images": subject.seen, "scores": [*losses(subject)[0], *by_pixels]}


def write_report(subject: Subject, over_time: list[dict]) -> None:
    """Measure everything, write it as results.json and report.html, and print it."""
    from evaluation import features, report
    from evaluation.captions import choose, drawn_by_others
    from evaluation.scores import surface, words_and_copies

    start = time.perf_counter()
    options, pipeline, real = subject.options, subject.pipeline, subject.real
    extractor = None
    try:
        extractor = features.load()
    except features.FeatureError as error:
        subject.note(f"no scores in features: {error}")
    sets = choose(real["training"].names, real["held-out"].names, options.samples)
    if options.pictures:
        samples, theirs = drawn_by_others(options.pictures, sets, subject.images["training"].shape[1:])
        author = {"path": str(options.pictures), "hash": files.sha256(options.pictures), **theirs}
        config, sampling, by_loss, levels = author.pop("config"), author.pop("sampling"), [], {}
    else:
        samples = samples_of(subject, sets)
        author = {
            "path": str(subject.path), "hash": pipeline.hash, "ema": pipeline.ema, "step": pipeline.about["step"],
            "images": subject.seen, "seconds": pipeline.about["seconds"],
        }  # fmt: skip
        sampling = {**pipeline.resolved(options.sampling).to_json(), "seed": options.seed}
        config, (by_loss, levels) = pipeline.config.to_json(), losses(subject)
    by_pixels, near = words_and_copies("pixels", samples, subject.images, sets["training"].own)
    own = {on: subject.images[on][sets[on].own] for on in real}
    for on in real:
        by_pixels += surface(on, samples[on], own[on], pipeline.config.PATCH) if len(samples[on]) else []
    by_features = in_features(subject, extractor, sets, samples) if extractor else []
    results = {
        "command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]),
        "checkpoint": author,
        "config": config,
        "data": {
            "fingerprint": real["training"].fingerprint, "vendor": pipeline.config.vendor,
            **{on: len(side.names) for on, side in real.items()},
        },
        "sampling": sampling,
        "extractor": extractor and {"name": extractor.name, "identity": extractor.identity},
        "sets": {on: {"captions": chosen.texts} for on, chosen in sets.items()},
        "scores": [*by_pixels, *by_features, *by_loss],
        "levels": levels,
        "over_time": over_time,
        "seconds": time.perf_counter() - start,
        "notes": subject.notes,
    }  # fmt: skip
    for on, found in near.items():
        results["sets"][on] |= {"neighbours": found.index.tolist(), "ratio": found.ratio.tolist()}
    page = options.report / "report.html"
    report.write_page(page, results, samples, own, subject.images["training"], real["training"].names)
    report.write(options.report / "results.json", results)
    if captions := sets["held-out"].texts:
        blind = options.report / "blind.html"
        report.write_blind(blind, results["checkpoint"]["path"], samples["held-out"], own["held-out"], captions)
    beside = "results.json and blind.html" if captions else "results.json"
    print(f"{report.summary(results)}\n{page} written, with {beside} beside it")


def refuse(options: Options) -> None:
    """Raise ValueError for options that contradict each other, or that a task would ignore."""
    default = Options(sampling=options.sampling)
    given = [field for field in vars(options) if getattr(options, field) != getattr(default, field)]
    tasks = {"compare": (), "recommend": ("checkpoint", "encoder", "data", "samples", "seed", "ema")}  # what each takes
    for task, beside in tasks.items():
        ignored = [f"--{field}" for field in given if field not in (task, *beside)]
        if task in given and ignored:
            raise ValueError(f"--{task} does nothing with {', '.join(ignored)}: give one of them at a time")
    if options.samples < 2:
        raise ValueError(f"--samples {options.samples}: at least 2 are needed")
    if options.recommend and options.sampling.negative_prompt:
        raise ValueError("--negative_prompt is of single drawings, and --recommend is for all: leave it out")
    if options.pictures and not options.report:
        raise ValueError(f"--pictures {options.pictures}: say with --report where to write what is measured of them")


def evaluate(options: Options) -> None:
    import checkpoint
    from evaluation import report
    from sharing import portable

    refuse(options)
    if options.compare:
        print(report.comparison([files.from_home(path) for path in options.compare]))
        return
    path = options.checkpoint or portable.default_checkpoint()
    run = [] if options.pictures else checkpoint.checkpoints(path)
    over_time = [point_of_curve(load(path, options)) for path in run]
    if run:
        print(report.curve(over_time))
    if options.report or options.recommend or not run:
        subject = load(run[-1] if run else path, options)
        if options.recommend:
            recommend(subject)
        elif options.report:
            write_report(subject, over_time)
        else:
            caption_accuracy(subject)


def main() -> None:
    files.secure_streams()
    try:
        settings = {"description": __doc__, "use_underscores": True, "config": (tyro.conf.FlagCreatePairsOff,)}
        options = tyro.cli(Options, **settings)
        import parallel
        from pipeline import CheckpointError, recommended

        with suppress(CheckpointError):  # of the folder of a run, whose checkpoints are to be sampled alike
            options = tyro.cli(Options, default=Options(sampling=recommended(options.checkpoint)), **settings)

        parallel.setup()
        evaluate(files.expanded(options))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what is sampled is kept, the same command goes on")


if __name__ == "__main__":
    main()
