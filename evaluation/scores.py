"""Scores: a number with its 95 % interval, where one is known, beside others that say what it is worth.

    shuffled   the same samples with their captions exchanged: what is left where the words do not matter
    real       real pictures in the place of the samples: the floor of a distance or copy rate, the ceiling of the rest

Where a score is a mean over captions or pictures, the single values are kept too. Two runs with the same captions are
then compared caption by caption, and the variety of the captions, most of the error, cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    better: Literal["higher", "lower", "as real"] = "higher"
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


def difference(a: Score, b: Score, *, paired: bool) -> float:
    """b - a, or 0 where chance makes a difference as large as that in more than 5 % of cases.

    paired: compare caption by caption where both keep the single values, else as independent samples. Paired shares
    have one caption won and one lost added, without which a few captions that all went one way would show no error at
    all (Bonett & Price 2012).
    """
    if paired and a.each and len(a.each) == len(b.each):
        each = np.append(np.subtract(b.each, a.each), [1, -1] if a.share else [])
        value, error = float(each.mean()), each.std(ddof=1) / math.sqrt(len(each))
    elif a.value.error is None or b.value.error is None:
        return 0.0
    else:
        value, error = b.value.value - a.value.value, math.hypot(a.value.error, b.value.error)
    return value if abs(value) > Z * error else 0.0


def rate(name: str, on: str, by: str, hits: np.ndarray, *, exchanged=None, real=None, better="higher") -> Score:
    """A share of hits, beside the hits with captions shuffled and those of real pictures."""
    value, exchanged, real = (None if h is None else metrics.share(h) for h in (hits, exchanged, real))
    return Score(name, on, by, value, exchanged, real, better, True, len(hits), tuple(map(float, hits)))


def mean(name: str, on: str, by: str, values: np.ndarray, *, real=None, better="lower") -> Score:
    """A mean over pictures, beside that of real pictures."""
    if len(values) < 2:
        raise ValueError(f"{name} needs at least 2 pictures, got {len(values)}")
    value, floor = (
        None if v is None else Interval.around(np.mean(v), np.std(v, ddof=1) / np.sqrt(len(v))) for v in (values, real)
    )
    return Score(name, on, by, value, None, floor, better, False, len(values), tuple(map(float, values)))


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
    """Caption accuracy and copies, by pictures or features [n, …], and the training pictures nearest to each sample.

    Caption accuracy: is the nearest training picture, or one of the nearest five, the caption's own? A sample with
    d1 / d2 < 1/3 is a near-exact copy. That rule misses a copy whose colours guidance has changed, or that has
    look-alikes among the training pictures; there the mean of d1 / d2 falls below that of real held-out pictures.
    """
    training, unseen, found = real["training"], real["held-out"], []
    distance = metrics.distances(samples["training"], training)
    rank, other = (metrics.ranks(distance, np.asarray(rows)) for rows in (own, shuffled(own)))
    for k in (1, 5):
        found.append(rate(f"caption accuracy, top {k}", "training", by, rank < k, exchanged=other < k))
    near = {on: metrics.neighbours(rows, training) for on, rows in samples.items() if len(rows)}
    floor = metrics.neighbours(unseen, training) if len(unseen) else None
    for on, its in near.items():
        found.append(rate("copy rate", on, by, its.copied, real=floor and floor.copied, better="lower"))
        if len(its.ratio) > 1:
            ratio = floor.ratio if len(unseen) > 1 else None
            found.append(mean("d1/d2", on, by, its.ratio, real=ratio, better="higher"))
    return found, near


def surface(on: str, samples: np.ndarray, own: np.ndarray, patch: int) -> list[Score]:
    """What the eye sees first: the finest detail of uint8 samples, and whether the borders of patches show in them.

    `own` are the real pictures of the same captions. A good sample has neither more detail than they have nor less.
    """
    each = {}
    for which, images in (("value", samples), ("real", own)):
        flat, edges = metrics.texture(images)
        named = {"detail in flat regions": flat, "detail at edges": edges}
        named |= {f"steps across patches of {patch}": metrics.border_steps(images, patch)} if patch > 1 else {}
        for name, values in named.items():
            each.setdefault(name, {})[which] = values[np.isfinite(values)]
    enough = {name: found for name, found in each.items() if min(map(len, found.values())) > 1}
    return [mean(name, on, "pixels", f["value"], real=f["real"], better="as real") for name, f in enough.items()]


def realism(by: str, on: str, samples: np.ndarray, own: np.ndarray, other: np.ndarray) -> list[Score]:
    """Distances between sets of features: the samples against the real pictures of the other side of the split.

    Samples of held-out captions are compared with the training pictures, those of training captions with the held-out
    ones, so that none meets the very picture that was trained on. `real` is the same with the captions' own pictures
    for the samples: equally many, of the same things, against the same set, so both have the bias of small sets.
    """
    lower = {"better": "lower", "n": len(samples)}
    kid, floor = metrics.kid(other, samples), metrics.kid(other, own)
    frechet, frechet_floor = (Interval(metrics.frechet(other, features)) for features in (samples, own))
    return [
        Score("KID", on, by, kid, real=floor, **lower),
        Score("Fréchet distance", on, by, frechet, real=frechet_floor, **lower),
    ]
