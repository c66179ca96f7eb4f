"""Scores: a number with its 95 % interval, beside two others that say what it is worth.

    shuffled   the same samples with their captions exchanged: what is left where the words do not matter
    real       real pictures in the place of the samples: the floor of a distance or copy rate, the ceiling of the rest

Where a score is a mean over captions or pictures, the single values are kept too. Two runs with the same captions are
then compared caption by caption, and the variety of the captions, most of the error, cancels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from evaluation import metrics
from evaluation.metrics import Interval, Z


@dataclass(frozen=True)
class Score:
    name: str
    on: str  # which captions or pictures
    by: str  # "pixels", the extractor, the judge, or which average of the weights
    value: Interval
    shuffled: Interval | None = None
    real: Interval | None = None
    better: Literal["higher", "lower"] = "higher"
    share: bool = False  # shown in per cent
    n: int = 0  # samples or pictures
    each: tuple[float, ...] = ()  # the mean of these is the value

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.on, self.by

    def show(self, which: str = "value") -> str:
        """ "12.5 % (8.0–17.1)", or "" where there is none."""
        interval = getattr(self, which)
        if interval is None:
            return ""
        scale, digits = (100, 1) if self.share else (1, max(0, 3 - math.ceil(math.log10(abs(interval.value) + 1e-3))))
        value, low, high = ("" if x is None else f"{scale * x:z.{digits}f}" for x in interval)
        return f"{value}{' %' if self.share else ''}" + (f" ({low}–{high})" if low else "")


def find(scores: Sequence[Score], name: str, on: str = "", by: str = "") -> Score | None:
    """The first of that name, on these captions and by this measure where they are given."""
    return next((s for s in scores if s.name == name and on in ("", s.on) and by in ("", s.by)), None)


def beyond(score: Score | None, which: Literal["shuffled", "real"]) -> bool:
    """Whether the score's interval lies above that of the other, without touching it."""
    other = score and getattr(score, which)
    if not other or score.value.low is None:
        return False
    return score.value.low > (other.value if other.high is None else other.high)


class Difference(NamedTuple):
    value: float
    error: float | None  # standard error; None where it is not known

    @property
    def beyond(self) -> bool:
        """Whether it is larger than chance makes it in 95 % of cases."""
        return self.error is not None and abs(self.value) > Z * self.error

    def verdict(self, wanted: Literal["higher", "lower"]) -> str:
        """better or worse, or "" where the difference may be chance."""
        return "" if not self.beyond else "better" if (self.value > 0) == (wanted == "higher") else "worse"


def difference(a: Score, b: Score, *, paired: bool) -> Difference:
    """b - a: paired, caption by caption, where both keep the single values; else as of independent samples.

    Paired shares have one caption won and one lost added: a few captions that all went one way would else show no
    error at all (Bonett & Price 2012).
    """
    if paired and a.each and len(a.each) == len(b.each):
        each = np.append(np.subtract(b.each, a.each), [1, -1] if a.share else [])
        return Difference(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))
    value = b.value.value - a.value.value
    if a.value.low is None or b.value.low is None:
        return Difference(value, None)
    errors = [(score.value.high - score.value.low) / (2 * Z) for score in (a, b)]
    return Difference(value, math.hypot(*errors))


def rate(name: str, on: str, by: str, hits: np.ndarray, *, exchanged=None, real=None, better="higher") -> Score:
    """A share of hits, beside the hits with captions shuffled and those of real pictures."""
    value, exchanged, real = (None if h is None else metrics.share(h) for h in (hits, exchanged, real))
    return Score(name, on, by, value, exchanged, real, better, True, len(hits), tuple(map(float, hits)))


def mean(name: str, on: str, by: str, values: np.ndarray, *, real=None, better="lower") -> Score:
    """A mean over pictures, beside that of real pictures."""

    def interval(values: np.ndarray) -> Interval:
        if len(values) < 2:
            raise ValueError(f"{name} needs at least 2 pictures, got {len(values)}")
        return _interval(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))))

    floor = None if real is None else interval(real)
    return Score(
        name, on, by, interval(values), real=floor, better=better, n=len(values), each=tuple(map(float, values))
    )


def _interval(value: float, error: float) -> Interval:
    return Interval(value, value - Z * error, value + Z * error)


def shuffled(own: Sequence[int]) -> np.ndarray:
    """The same rows in another order in which none keeps its place: a random cycle."""
    order = np.random.default_rng(0).permutation(len(own))
    exchanged = np.empty(len(own), int)
    exchanged[order] = np.asarray(own, int)[np.roll(order, 1)]
    return exchanged


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 … n - 1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)) if n else np.zeros(0, int)


def words_and_copies(
    by: str, samples: dict[str, np.ndarray], real: dict[str, np.ndarray], own: Sequence[int]
) -> tuple[list[Score], dict[str, metrics.Neighbours]]:
    """Caption accuracy and copies by features [n, d], and the training pictures nearest to the samples of each set."""
    near = {on: metrics.neighbours(rows, real["training"]) for on, rows in samples.items() if len(rows)}
    floor = metrics.neighbours(real["held-out"], real["training"]) if len(real["held-out"]) else None
    return [*accuracy(by, samples["training"], real["training"], own), *copies(by, near, floor)], near


def accuracy(by: str, samples: np.ndarray, training: np.ndarray, own: Sequence[int]) -> Iterator[Score]:
    """Whether the nearest training picture, or one of the nearest five, is the caption's own."""
    distance = metrics.distances(samples, training)
    rank, other = (metrics.ranks(distance, np.asarray(rows)) for rows in (own, shuffled(own)))
    for k in (1, 5):
        yield rate(f"caption accuracy, top {k}", "training", by, rank < k, exchanged=other < k)


def copies(by: str, near: dict[str, metrics.Neighbours], real: metrics.Neighbours | None) -> Iterator[Score]:
    """The copy rate and the mean d1 / d2 of each set of samples beside those of real held-out pictures.

    The rule d1 / d2 < 1/3 finds near-exact copies. It misses one whose colours guidance has changed, or that has
    look-alikes among the training pictures; there the mean falls below that of real pictures.
    """
    for on, found in near.items():
        yield rate("copy rate", on, by, found.copied, real=real and real.copied, better="lower")
        if len(found.index) > 1:
            floor = real.ratio if real and len(real.index) > 1 else None
            yield mean("d1/d2", on, by, found.ratio, real=floor, better="higher")


def realism(by: str, on: str, samples: np.ndarray, own: np.ndarray, other: np.ndarray) -> Iterator[Score]:
    """Distances between sets of features: the samples against the real pictures of the other side of the split.

    Samples of held-out captions are compared with the training pictures, those of training captions with the held-out
    ones, so that none meets the very picture that was trained on. `real` is the same with the captions' own pictures
    for the samples: equally many, of the same things, against the same set, so both have the bias of small sets.
    """
    values = [_interval(*metrics.kid(other, features)) for features in (samples, own)]
    yield Score("KID", on, by, values[0], real=values[1], better="lower", n=len(samples))
    values = [Interval(metrics.frechet(other, features)) for features in (samples, own)]
    yield Score("Fréchet distance", on, by, values[0], real=values[1], better="lower", n=len(samples))
    pairs = (("precision", "recall"), metrics.precision_recall), (("density", "coverage"), metrics.density_coverage)
    for names, measure in pairs:
        for name, value, real in zip(names, measure(other, samples), measure(other, own), strict=True):
            share = name != "density"  # which may exceed 1
            yield Score(name, on, by, Interval(value), real=Interval(real), share=share, n=len(samples))
