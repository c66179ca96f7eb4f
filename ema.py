"""Moving averages of the weights, which sampling uses instead of the last weights.

The weights of step t count in proportion to t^γ, so an average always covers the same share of the run: the
power-function average of Karras et al. 2024a, Eq. 4. Its length is the relative standard deviation of that weighting.
From step s to step t the old average keeps the share

    (s / t)^(γ + 1)

whatever lies between, so updates need not be evenly spaced, and a second one at the same step changes nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import parallel
from params import Params

EVERY = 10  # steps between two updates; an update at each step would make steps 7 % longer


class Averages(NamedTuple):
    """Two averages of different lengths."""

    short: dict
    long: dict
    step: Int[Array, ""]  # whose weights entered last


def start(weights: dict) -> Averages:
    """The averages before the first step, in buffers of their own."""
    return Averages(jax.tree.map(jnp.copy, weights), jax.tree.map(jnp.copy, weights), jnp.zeros((), jnp.int32))


def gamma(length: float) -> float:
    """The exponent of an average of this length (Karras et al. 2024a, Algorithm 2)."""
    return np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()


def entering(before: Int[Array, ""], step: Int[Array, ""], length: float) -> Float[Array, ""]:
    """The share that the weights of `step` take, 1 - (before / step)^(γ + 1), without loss of digits."""
    return -jnp.expm1((gamma(length) + 1) * jnp.log1p(-(step - before) / jnp.maximum(step, 1)))


def update(averages: Averages, weights: dict, step: Int[Array, ""], config: Params) -> Averages:
    """Both averages with the weights of this step in them."""

    def updated(average: dict, length: float) -> dict:
        share = entering(averages.step, step, length)
        return jax.tree.map(lambda old, new: (1 - share) * old + share * new, average, weights)

    return Averages(updated(averages.short, config.ema_short), updated(averages.long, config.ema_long), step)


def build_update(config: Params) -> Callable[[Averages, dict, Int[Array, ""]], Averages]:
    """`update`, jitted; the averages are donated."""
    return jax.jit(partial(update, config=config), donate_argnums=0, out_shardings=parallel.replicated())
