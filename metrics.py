"""Numbers for drawn pictures: arrays in, numbers out.

Caption accuracy asks whether the words steered the picture: among all training pictures, is the one that belongs to
the caption the nearest to what was drawn? Chance is 1 / (number of training pictures).
"""

import numpy as np
from jaxtyping import Float, Int, UInt8


def distances(a: UInt8[np.ndarray, "n h w c"], b: UInt8[np.ndarray, "m h w c"]) -> Float[np.ndarray, "n m"]:
    """Root mean squared difference of every picture of a to every one of b, in bytes (0 … 255)."""
    a, b = (pictures.reshape(len(pictures), -1).astype(np.float64) for pictures in (a, b))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


def ranks(distance: Float[np.ndarray, "n m"], own: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """How many of the m pictures are nearer than each drawing's own one, or as near (0: its own is the nearest)."""
    mine = np.take_along_axis(distance, own[:, None], axis=1)
    return (distance <= mine).sum(axis=1) - 1


def top(rank: Int[np.ndarray, "n"], k: int) -> float:
    """Share of the drawings whose own picture is among the k nearest."""
    return float((rank < k).mean())
