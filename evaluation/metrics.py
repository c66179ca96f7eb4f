"""Numbers for drawn pictures: arrays in, numbers out.

Caption accuracy asks whether the words steered the picture: among all training pictures, is the one that belongs to
the caption the nearest to what was drawn? Chance is 1 / (number of training pictures).

The other scores compare sets of features, one row per picture, real ones and drawn ones:

    kid                  how far apart the two distributions are, unbiased and with a standard error
    frechet              the same between Gaussian fits; biased upwards for small sets, so only for equal sizes
    precision_recall     share of the drawn that look real, share of the real that could have been drawn
    density_coverage     the same, less upset by outliers
    neighbours, copied   which training picture is nearest, and whether the drawn one is a copy of it
    r_precision          whether a drawing is nearer to its own caption than to the others

None means much alone: report each beside its floor, the same score between real training and real held-out pictures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

BLOCK = 1024  # rows of a table of all pairs in memory at once
Z = 1.959963984540054  # a normal variable lies within ± Z in 95 % of cases
COPY = 1 / 3  # of the distance to the second nearest training picture (arXiv 2505.16959)
TWIN = 0.1  # of the spread: training pictures as near as this to each other count as one


class Estimate(NamedTuple):
    value: float
    error: float  # standard error


class Share(NamedTuple):
    value: float
    low: float  # of the 95 % confidence interval
    high: float


class Neighbours(NamedTuple):
    index: Int[np.ndarray, "n 2"]  # of the nearest training picture, and of the nearest one that differs from it
    distance: Float[np.ndarray, "n 2"]


def distances(a: UInt8[np.ndarray, "n h w c"], b: UInt8[np.ndarray, "m h w c"]) -> Float[np.ndarray, "n m"]:
    """Root mean squared difference of every picture of a to every one of b, in bytes (0 … 255)."""
    a, b = (pictures.reshape(len(pictures), -1).astype(np.float64) for pictures in (a, b))
    return np.sqrt(_squared(a, b) / a.shape[1])


def ranks(distance: Float[np.ndarray, "n m"], own: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """How many of the m pictures are nearer than each drawing's own one, or as near (0: its own is the nearest)."""
    mine = np.take_along_axis(distance, own[:, None], axis=1)
    return (distance <= mine).sum(axis=1) - 1


def top(rank: Int[np.ndarray, "n"], k: int) -> float:
    """Share of the drawings whose own picture is among the k nearest."""
    return float((rank < k).mean())


def share(hits: Bool[np.ndarray, "n"]) -> Share:
    """Share of hits with its 95 % interval, which stays within [0, 1] (Wilson 1927)."""
    (n,) = _enough("a share", 1, hits=hits)
    p = float(np.mean(hits))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Share(p, min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


# Distances between distributions.


def kid(real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"]) -> Estimate:
    """Kernel Inception distance: unbiased MMD² with the kernel (x·y / d + 1)³  (Bińkowski et al. 2018, §4).

    The published recipe averages the estimate over random subsets. Over all subsets that average is the estimate from
    the full sample (both are the one U-statistic), so that is what is computed. The spread over subsets of a few
    hundred pictures is no standard error, since they share pictures. The error here is the root of the U-statistic's
    exact variance, with the moments of Hoeffding's decomposition k(x, y) = mean + row + column + rest put in:

        4 var(g_x) / n + 4 var(g_y) / m  +  2 r_xx / n(n-1) + 2 r_yy / m(m-1) + 4 r_xy / nm

    where g_x = E k(x, X) - E k(x, Y) is what a picture contributes by itself and r is the variance of a rest. The first
    two vanish where the distributions agree and are never taken as negative. So the error is right for sets that differ
    and errs on the safe side for equal ones: it is 10 to 40 % too large there, and value ± 1.96 error holds 0 in 98 %.
    """
    n, m = _enough("KID", 4, real=real, drawn=drawn)
    xx, yy, xy = _kernel(real), _kernel(drawn), _kernel(real, drawn)
    own_x = np.var(xx.rows - xy.rows, ddof=1) - xx.rest / (n - 1) - xy.rest / m  # less the noise in the means
    own_y = np.var(yy.rows - xy.columns, ddof=1) - yy.rest / (m - 1) - xy.rest / n
    pairs = 2 * xx.rest / (n * (n - 1)) + 2 * yy.rest / (m * (m - 1)) + 4 * xy.rest / (n * m)
    variance = max(4 * own_x / n + 4 * own_y / m, 0) + max(pairs, 0)
    return Estimate(float(xx.mean + yy.mean - 2 * xy.mean), float(np.sqrt(variance)))


class _Kernel(NamedTuple):
    rows: np.ndarray  # mean of k(x, ·) per x
    columns: np.ndarray  # mean of k(·, y) per y
    mean: float
    rest: float  # variance of what neither row nor column explains, unbiased


def _kernel(a: np.ndarray, b: np.ndarray | None = None) -> _Kernel:
    """Moments of k(x, y) over all pairs of a and b, or over all pairs of different pictures of a."""
    same = b is None
    a, b = np.asarray(a, np.float64), np.asarray(a if same else b, np.float64)
    n, m = len(a), len(b)
    rows, columns, squares = np.empty(n), np.zeros(m), 0.0
    for block in _blocks(n):
        k = (a[block] @ b.T / a.shape[1] + 1) ** 3
        if same:
            k[np.arange(len(k)), np.arange(n)[block]] = 0
        rows[block] = k.sum(1) / (m - same)
        columns += k.sum(0) / (n - same)
        squares += (k**2).sum() / (n * (m - same))
    mean = rows.mean()
    if same:
        rest = (squares - mean**2 - 2 * rows.var() * (n - 1) / (n - 2)) * (n - 1) / (n - 3)
    else:
        rest = (squares - mean**2 - rows.var() - columns.var()) * n / (n - 1) * m / (m - 1)
    return _Kernel(rows, columns, mean, rest)


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|μ_a - μ_b|² + tr(A + B - 2 (A^½ B A^½)^½) of the means and covariances  (Dowson & Landau 1982).

    With A = XᵀX the trace is the sum of the roots of the eigenvalues of X B Xᵀ, symmetric and with no more rows than X:
    no root of a singular matrix, so it is right with fewer pictures than features too. The estimate is biased upwards
    by about 1 / n, and steeply where n < d: compare only values from equally many pictures.
    """
    _enough("the Fréchet distance", 2, a=a, b=b)
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a), _gaussian(b)
    if len(root_a) > root_a.shape[1]:
        root_a = np.linalg.qr(root_a, mode="r")
    cross = root_a @ root_b.T
    eigenvalues = np.linalg.eigvalsh(cross @ cross.T)
    trace = (root_a**2).sum() + (root_b**2).sum() - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and a matrix X with XᵀX the covariance."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    return mean, (features - mean) / np.sqrt(len(features) - 1)


# Manifolds made of balls: around each picture, as far as its k-th nearest neighbour.


def precision_recall(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], *, k: int = 3
) -> tuple[float, float]:
    """Share of the drawn in balls of the real, share of the real in balls of the drawn  (Kynkäänniemi et al. 2019)."""
    _enough(f"precision and recall with k = {k}", k + 1, real=real, drawn=drawn)
    in_real, in_drawn = _inside(drawn, real, k), _inside(real, drawn, k)
    return float((in_real.per_point > 0).mean()), float((in_drawn.per_point > 0).mean())


def density_coverage(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], *, k: int = 5
) -> tuple[float, float]:
    """Mean number of real balls around a drawn picture over k, share of real balls that hold one  (Naeem et al. 2020).

    Density may exceed 1. Where the distributions agree it is 1 on average, and coverage is
    1 - (n-1)...(n-k) / (n+m-1)...(n+m-k), about 1 - 2^-k for equally many.
    """
    _enough(f"density and coverage with k = {k}", k + 1, real=real)
    _enough("density and coverage", 1, drawn=drawn)
    inside = _inside(drawn, real, k)
    return float(inside.per_point.mean() / k), float((inside.per_ball > 0).mean())


class _Inside(NamedTuple):
    per_point: np.ndarray  # in how many balls each point lies
    per_ball: np.ndarray  # how many points each ball holds


def _inside(points: np.ndarray, centres: np.ndarray, k: int) -> _Inside:
    """Balls around the centres, each as far as its k-th nearest other centre, and the points in them."""
    points, centres = (np.asarray(features, np.float64) for features in (points, centres))
    radius = np.empty(len(centres))
    for block in _blocks(len(centres)):
        radius[block] = np.partition(_squared(centres[block], centres), k, axis=1)[:, k]  # the 0-th is itself
    per_point, per_ball = np.empty(len(points), int), np.zeros(len(centres), int)
    for block in _blocks(len(points)):
        held = _squared(points[block], centres) <= radius[None, :]
        per_point[block] = held.sum(1)
        per_ball += held.sum(0)
    return _Inside(per_point, per_ball)


# Memorization.


def neighbours(drawn: Float[np.ndarray, "n d"], training: Float[np.ndarray, "m d"]) -> Neighbours:
    """The nearest training picture of each drawn one, and the nearest of those that differ from that.

    A picture that is twice in the training set would be its own second neighbour and hide every copy of itself behind
    d1 / d2 = 1, and emoji have many such (the flags of France and St. Martin). So training pictures no further from
    the first neighbour than TWIN times the spread, the root mean squared distance from the mean, are passed over.
    """
    _enough("nearest neighbours", 1, drawn=drawn)
    _enough("nearest neighbours", 2, training=training)
    drawn, training = (np.asarray(features, np.float64) for features in (drawn, training))
    twin = TWIN**2 * training.var(0).sum()
    index, distance = np.empty((len(drawn), 2), int), np.empty((len(drawn), 2))
    for block in _blocks(len(drawn)):
        squared = _squared(drawn[block], training)
        first = squared.argmin(1)
        squared[_squared(training[first], training) <= twin] = np.inf
        second = squared.argmin(1)
        if np.isinf(squared.min(1)).any():
            raise ValueError("nearest neighbours need 2 different training pictures; all of these look the same")
        index[block] = np.stack([first, second], 1)
        distance[block] = np.linalg.norm(drawn[block, None] - training[index[block]], axis=2)  # exactly 0 for a copy
    return Neighbours(index, distance)


def copied(neighbours: Neighbours) -> Bool[np.ndarray, "n"]:
    """Whether each drawn picture is a copy: d1 / d2 < 1/3  (arXiv 2505.16959)."""
    return neighbours.distance[:, 0] < COPY * neighbours.distance[:, 1]


# Words.


def r_precision(
    picture_emb: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "m d"], own: Int[np.ndarray, "n"], k: int = 1
) -> Bool[np.ndarray, "n"]:
    """Whether each picture's own caption is among the k of the m nearest to it by cosine  (Xu et al. 2018).

    Another caption as near as its own counts as nearer. Chance is k / m.
    """
    _enough("R-precision", 1, picture_emb=picture_emb)
    _enough(f"R-precision with k = {k}", k + 1, text_emb=text_emb)
    unit_picture, unit_text = (
        emb / np.maximum(np.linalg.norm(emb, axis=1, keepdims=True), 1e-30)
        for emb in (np.asarray(picture_emb, np.float64), np.asarray(text_emb, np.float64))
    )
    return ranks(-unit_picture @ unit_text.T, own) < k


# All pairs.


def _enough(what: str, needed: int, **sets: np.ndarray) -> list[int]:
    """How many each set has; raises ValueError where one has too few or something that is no number."""
    for name, rows in sets.items():
        if len(rows) < needed:
            raise ValueError(f"{what} needs at least {needed} rows of `{name}`, got {len(rows)}")
        if not np.isfinite(rows).all():
            raise ValueError(f"{what}: {(~np.isfinite(rows)).sum()} numbers of `{name}` are infinite or not a number")
    return [len(rows) for rows in sets.values()]


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all pairs; those that are only rounding of |a|² + |b|² - 2 a·b are 0."""
    lengths = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :]
    squared = lengths - 2 * a @ b.T
    return np.where(squared < 1e-12 * lengths, 0, squared)
