"""Scores: a number with its 95 % interval, and two others that say what it is worth.

    shuffled   the same drawings, their captions exchanged: what is left where the words do not matter
    real       real pictures in the place of the drawings: the floor of a distance or copy rate, the ceiling of the rest

Where a score is a mean over captions or pictures, the single values are kept too. Two runs that were asked the same
are then compared question by question, and the variety of the questions, most of the error, cancels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from evaluation import metrics
from evaluation.metrics import Z


class Interval(NamedTuple):
    value: float
    low: float | None = None  # of 95 %; None where no error is known
    high: float | None = None


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
    n: int = 0  # drawings or pictures
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
        """better or worse, or "" where the error may be all."""
        return "" if not self.beyond else "better" if (self.value > 0) == (wanted == "higher") else "worse"


def difference(a: Score, b: Score, *, paired: bool) -> Difference:
    """b - a: paired, question by question, where both keep the single values; else as of independent samples.

    Paired shares have a question won and one lost added: a few questions that all went one way would else show no
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


# Making them.


def rate(name: str, on: str, by: str, hits: np.ndarray, *, exchanged=None, real=None, better="higher") -> Score:
    """A share of hits, beside the hits with captions shuffled and those of real pictures."""
    value, exchanged, real = (None if h is None else Interval(*metrics.share(h)) for h in (hits, exchanged, real))
    return Score(name, on, by, value, exchanged, real, better, True, len(hits), tuple(map(float, hits)))


def mean(name: str, on: str, by: str, values: np.ndarray, *, real=None, better="lower") -> Score:
    """A mean over pictures, beside that of real pictures."""
    value, real = (None if rows is None else _interval(_mean(name, rows)) for rows in (values, real))
    return Score(name, on, by, value, real=real, better=better, n=len(values), each=tuple(map(float, values)))


def _mean(name: str, values: np.ndarray) -> metrics.Estimate:
    if len(values) < 2:
        raise ValueError(f"{name} needs at least 2 pictures, got {len(values)}")
    return metrics.Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))))


def _interval(estimate: metrics.Estimate) -> Interval:
    return Interval(estimate.value, estimate.value - Z * estimate.error, estimate.value + Z * estimate.error)


def shuffled(own: Sequence[int]) -> np.ndarray:
    """The same rows dealt out again, so that nobody keeps his own: a random cycle."""
    order = np.random.default_rng(0).permutation(len(own))
    dealt = np.empty(len(own), int)
    dealt[order] = np.asarray(own, int)[np.roll(order, 1)]
    return dealt


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 … n - 1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)) if n else np.zeros(0, int)


def flat(images: np.ndarray) -> np.ndarray:
    """Pictures as features: their bytes, 0 … 1."""
    return images.reshape(len(images), math.prod(images.shape[1:])) / 255.0


def accuracy(by: str, drawn: np.ndarray, training: np.ndarray, own: Sequence[int]) -> list[Score]:
    """Whether the nearest training picture, or one of the nearest five, is the caption's own."""
    distance = np.stack([np.linalg.norm(training - one[None], axis=1) for one in drawn])
    rank, other = (metrics.ranks(distance, np.asarray(rows)) for rows in (own, shuffled(own)))
    name = "caption accuracy, top"
    return [rate(f"{name} {k}", "training", by, rank < k, exchanged=other < k) for k in (1, 5)]


def copies(by: str, near: dict[str, metrics.Neighbours], real: metrics.Neighbours | None) -> Iterator[Score]:
    """The copy rate and the mean d1 / d2 of each set of drawings beside those of real held-out pictures.

    The rule d1 / d2 < 1/3 finds near-exact copies. It passes over one whose colours guidance has driven, or that has
    look-alikes among the training pictures; then the mean tells, as it falls below that of real pictures.
    """
    for on, found in near.items():
        floor = None if real is None else metrics.copied(real)
        yield rate("copy rate", on, by, metrics.copied(found), real=floor, better="lower")
        if len(found.index) > 1:
            floor = None if real is None or len(real.index) < 2 else ratio(real)
            yield mean("d1/d2", on, by, ratio(found), real=floor, better="higher")


def ratio(near: metrics.Neighbours) -> np.ndarray:
    """d1 / d2: 0 for an exact copy, 1 where no training picture stands out."""
    return near.distance[:, 0] / near.distance[:, 1]


def recognition(by: str, drawn: np.ndarray, real: np.ndarray, captions: np.ndarray) -> list[Score]:
    """R-precision of drawings, and of the real pictures of the same captions, all in the space of the captions."""
    own = np.arange(len(captions))
    found = []
    for k in (1, 5):
        right, wrong = (metrics.r_precision(drawn, captions, rows, k) for rows in (own, shuffled(own)))
        ceiling = metrics.r_precision(real, captions, own, k)
        found.append(rate(f"R-precision, top {k}", "held-out", by, right, exchanged=wrong, real=ceiling))
    return found


def realism(by: str, on: str, drawn: np.ndarray, own: np.ndarray, other: np.ndarray) -> Iterator[Score]:
    """Distances between sets of features: the drawings against the real pictures of the other side of the split.

    Held-out captions' drawings are compared with the training pictures, training captions' with the held-out ones, so
    that no drawing meets the very picture that it was taught. `real` is the same with the captions' own pictures for
    the drawings: equally many, of the same things, against the same set. So the bias of small samples is in both.
    """
    values = [_interval(metrics.kid(other, features)) for features in (drawn, own)]
    yield Score("KID", on, by, values[0], real=values[1], better="lower", n=len(drawn))
    values = [Interval(metrics.frechet(other, features)) for features in (drawn, own)]
    yield Score("Fréchet distance", on, by, values[0], real=values[1], better="lower", n=len(drawn))
    yield from _two(("precision", "recall"), metrics.precision_recall, by, on, drawn, own, other)
    yield from _two(("density", "coverage"), metrics.density_coverage, by, on, drawn, own, other)


def _two(names: tuple[str, str], measure: Callable, by: str, on: str, drawn, own, other) -> Iterator[Score]:
    found = zip(names, measure(other, drawn), measure(other, own), strict=True)
    for name, value, real in found:
        share = name != "density"  # which may exceed 1
        yield Score(name, on, by, Interval(value), real=Interval(real), share=share, n=len(drawn))
