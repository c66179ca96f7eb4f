"""Measures of a generative model: arrays in, numbers out.

Caption accuracy asks whether the words steered the picture: among all training pictures, is the one that belongs to
the caption the nearest to the sample? Chance is 1 / (number of training pictures).

The other measures compare sets of features, one row per picture, of real pictures and of samples:

    kid                  how far apart the two distributions are, unbiased and with a standard error
    frechet              the same between Gaussian fits; biased upwards for small sets, so only for equal sizes
    neighbours           which training picture is nearest, and whether the sample is a copy of it
    r_precision          whether a sample is nearer to its own caption than to the others
    texture              how much fine detail a picture has, in its flat regions and at its edges
    border_steps         whether the borders of the network's patches show in it

None means much alone: `scores` puts it beside that of shuffled captions or of real pictures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real, UInt8

BLOCK = 1024  # rows of a table of all pairs in memory at once
Z = 1.959963984540054  # a normal variable lies within ± Z in 95 % of cases
COPY = 1 / 3  # of the distance to the second nearest training picture (arXiv 2505.16959)
EDGE = 32  # grey levels by which the pixels around one at an edge differ
TWIN = 0.1  # of the spread: training pictures as near as this to each other count as one


class Interval(NamedTuple):
    value: float
    low: float | None = None  # of the 95 % confidence interval; None where no error is known
    high: float | None = None

    @classmethod
    def around(cls, value: float, error: float) -> "Interval":
        """The interval of a normal variable with this standard error."""
        return cls(float(value), float(value - Z * error), float(value + Z * error))

    @property
    def error(self) -> float | None:
        """The standard error that the interval stands for."""
        return None if self.low is None else (self.high - self.low) / (2 * Z)


class Neighbours(NamedTuple):
    index: Int[np.ndarray, "n 2"]  # of the nearest training picture, and of the nearest one that differs from it
    distance: Float[np.ndarray, "n 2"]

    @property
    def ratio(self) -> Float[np.ndarray, "n"]:
        """d1 / d2: 0 for a copy of a training picture, near 1 for what is no nearer to one than to others."""
        return self.distance[:, 0] / self.distance[:, 1]

    @property
    def copied(self) -> Bool[np.ndarray, "n"]:
        """Whether each sample is a copy of a training picture: d1 / d2 < 1/3  (arXiv 2505.16959)."""
        return self.ratio < COPY


def distances(a: Real[np.ndarray, "n *shape"], b: Real[np.ndarray, "m *shape"]) -> Float[np.ndarray, "n m"]:
    """Root mean squared difference of every row of a (a picture, or its features) to every one of b."""
    a, b = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (a, b))
    return np.sqrt(squared_distances(a, b) / a.shape[1])


def ranks(distance: Float[np.ndarray, "n m"], own: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """How many of the m pictures are nearer than each sample's own one, or as near (0: its own is the nearest)."""
    mine = np.take_along_axis(distance, own[:, None], axis=1)
    return (distance <= mine).sum(axis=1) - 1


def top(rank: Int[np.ndarray, "n"], k: int) -> float:
    """Share of the samples whose own picture is among the k nearest."""
    return float((rank < k).mean())


def share(hits: Bool[np.ndarray, "n"]) -> Interval:
    """Share of hits with its 95 % interval, which stays within [0, 1] (Wilson 1927)."""
    (n,) = _check_rows("a share", 1, hits=hits)
    p = float(np.mean(hits))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Interval(p, min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


def kid(real: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"]) -> Interval:
    """Kernel Inception distance: unbiased MMD² with the kernel (x·y / d + 1)³  (Bińkowski et al. 2018, §4).

    The published recipe averages the estimate over random subsets. Over all subsets, that average is the estimate from
    the full sets, computed here. The error is the root of the U-statistic's exact variance, with the moments of
    Hoeffding's decomposition k(x, y) = mean + row + column + rest put in:

        4 var(g_x) / n + 4 var(g_y) / m  +  2 r_xx / n(n-1) + 2 r_yy / m(m-1) + 4 r_xy / nm

    where g_x = E k(x, X) - E k(x, Y) is what a picture contributes by itself and r is the variance of a rest. The first
    two vanish where the distributions agree and are never taken as negative. So the error is right for sets that differ
    and 10 to 40 % too large for sets of one distribution, where the interval holds 0 in 98 % of cases.
    """
    n, m = _check_rows("KID", 4, real=real, samples=samples)
    xx, yy, xy = _kernel(real), _kernel(samples), _kernel(real, samples)
    own_x = np.var(xx.rows - xy.rows, ddof=1) - xx.rest / (n - 1) - xy.rest / m  # less the noise in the means
    own_y = np.var(yy.rows - xy.columns, ddof=1) - yy.rest / (m - 1) - xy.rest / n
    pairs = 2 * xx.rest / (n * (n - 1)) + 2 * yy.rest / (m * (m - 1)) + 4 * xy.rest / (n * m)
    variance = max(4 * own_x / n + 4 * own_y / m, 0) + max(pairs, 0)
    return Interval.around(xx.mean + yy.mean - 2 * xy.mean, np.sqrt(variance))


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
    rest = (squares - mean**2 - rows.var() - columns.var()) * n / (n - 1) * m / (m - 1)
    if same:
        rest = (squares - mean**2 - 2 * rows.var() * (n - 1) / (n - 2)) * (n - 1) / (n - 3)
    return _Kernel(rows, columns, mean, rest)


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|μ_a - μ_b|² + tr(A + B - 2 (A^½ B A^½)^½) of the means and covariances  (Dowson & Landau 1982).

    With A = XᵀX the trace is the sum of the roots of the eigenvalues of X B Xᵀ, so that it is right with fewer pictures
    than features too. The estimate is biased upwards by about 1 / n, and steeply where n < d: compare only values from
    equally many pictures.
    """
    _check_rows("the Fréchet distance", 2, a=a, b=b)
    mean_a, mean_b = np.mean(a, 0, np.float64), np.mean(b, 0, np.float64)
    root_a, root_b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    if len(root_a) > root_a.shape[1]:
        root_a = np.linalg.qr(root_a, mode="r")
    cross = root_a @ root_b.T
    eigenvalues = np.linalg.eigvalsh(cross @ cross.T)
    trace = (root_a**2).sum() + (root_b**2).sum() - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def neighbours(samples: Real[np.ndarray, "n *shape"], training: Real[np.ndarray, "m *shape"]) -> Neighbours:
    """The nearest training picture of each sample, and the nearest of those that differ from that.

    A picture that is twice in the training set (the flags of France and St. Martin) would hide every copy of itself
    behind d1 / d2 = 1. So training pictures no further from the first neighbour than TWIN times the spread (the root
    mean squared distance from the mean) are passed over.
    """
    _check_rows("nearest neighbours", 1, samples=samples)
    _check_rows("nearest neighbours", 2, training=training)
    samples, training = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (samples, training))
    twin = TWIN**2 * training.var(0).sum()
    index, distance = np.empty((len(samples), 2), int), np.empty((len(samples), 2))
    for block in _blocks(len(samples)):
        squared = squared_distances(samples[block], training)
        first = squared.argmin(1)
        squared[squared_distances(training[first], training) <= twin] = np.inf
        second = squared.argmin(1)
        if np.isinf(squared.min(1)).any():
            raise ValueError("nearest neighbours need 2 different training pictures; all of these look the same")
        index[block] = np.stack([first, second], 1)
        distance[block] = np.linalg.norm(samples[block, None] - training[index[block]], axis=2)  # exactly 0 for a copy
    return Neighbours(index, distance)


def r_precision(
    picture_emb: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "m d"], own: Int[np.ndarray, "n"], k: int = 1
) -> Bool[np.ndarray, "n"]:
    """Whether each picture's own caption is among the k of the m nearest to it by cosine  (Xu et al. 2018).

    Another caption as near as its own counts as nearer. Chance is k / m.
    """
    _check_rows("R-precision", 1, picture_emb=picture_emb)
    _check_rows(f"R-precision with k = {k}", k + 1, text_emb=text_emb)
    return ranks(-unit(picture_emb) @ unit(text_emb).T, own) < k


def texture(images: UInt8[np.ndarray, "n h w c"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The finest detail of each picture, in its flat regions and at its edges; NaN where it has none of these.

    It is the mean of |4 p - left - right - up - down| over grey levels p. A pixel is at an edge where the 3 × 3 pixels
    around it differ by more than EDGE.
    """
    _check_rows("texture", 1, images=images)
    around = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64).mean(3), (3, 3), (1, 2))
    middle, beside = around[..., 1, 1], around[..., 0, 1] + around[..., 2, 1] + around[..., 1, 0] + around[..., 1, 2]
    detail, edge = np.abs(4 * middle - beside), np.ptp(around, (3, 4)) > EDGE
    with np.errstate(invalid="ignore"):
        flat, sharp = (np.where(part, detail, 0).sum((1, 2)) / part.sum((1, 2)) for part in (~edge, edge))
    return flat, sharp


def border_steps(images: UInt8[np.ndarray, "n h w c"], patch: int) -> Float[np.ndarray, "n"]:
    """Mean step between neighbouring pixels across the borders of patches, over that inside them; 1: none shows."""
    images, across, inside = images.astype(np.float64), 0, 0
    for axis in (1, 2):
        step = np.abs(np.diff(images, axis=axis)).swapaxes(1, axis).mean((2, 3))  # [n, pixels - 1]
        border = np.arange(1, images.shape[axis]) % patch == 0
        across, inside = across + step[:, border].mean(1), inside + step[:, ~border].mean(1)
    with np.errstate(invalid="ignore"):
        return across / inside


def unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows in float64, scaled to length 1."""
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Squared distances of all pairs; those that are only rounding of |a|² + |b|² - 2 a·b are 0."""
    lengths = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :]
    squared = lengths - 2 * a @ b.T
    return np.where(squared < 1e-12 * lengths, 0, squared)


def _check_rows(what: str, needed: int, **sets: np.ndarray) -> list[int]:
    """The rows of each set; raises ValueError where one has too few, or numbers that are not finite."""
    for name, rows in sets.items():
        if len(rows) < needed:
            raise ValueError(f"{what} needs at least {needed} rows of `{name}`, got {len(rows)}")
        if not np.isfinite(rows).all():
            raise ValueError(f"{what}: {(~np.isfinite(rows)).sum()} numbers of `{name}` are infinite or not a number")
    return [len(rows) for rows in sets.values()]


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))
