"""Loss on pictures that training never saw, by noise level: whether a run still learns or only memorizes.

The loss that training reports is of random pictures at random steps, so two of its numbers differ by chance alone. Here
every picture is diffused once within each level, the equal stretches of 1 … T of `training.LEVELS`, to a step and by
noise that follow from the picture's place and the level. All checkpoints, and both averages of their weights, are thus
measured on the very same noisy pictures: what is left of the standard error is the variety of the pictures, and that
too cancels in the difference of two checkpoints.

The loss of as many training pictures beside it shows the gap that memorization opens: first at low noise, where a
single picture is still recognisable.
"""

from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

import dataloader
import schedule as schedules
from dataloader import Batch
from dataset import Pictures, decoded
from images import to_float
from model import network
from params import Params
from text_encoder import TextEncoder
from training import LEVELS, squared_error

BATCH = 8  # pictures per call of the network
MONITORED = 64  # held-out pictures whose loss training measures beside each sample grid
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, spread evenly however many are taken


def questions(n: int, T: int) -> Int[np.ndarray, "n levels"]:
    """The step t that each of n pictures is diffused to within each level; 0 in a level that has no step (T < 10)."""
    level = np.arange(T) * LEVELS // T
    steps = np.zeros((n, LEVELS), np.int32)
    for i in np.unique(level):
        within = 1 + np.flatnonzero(level == i)
        place = ((np.arange(n) + 0.5) * GOLDEN + i / LEVELS) % 1
        steps[:, i] = within[(place * len(within)).astype(int)]
    return steps


@cache
def build_losses(config: Params) -> Callable[..., Float[Array, "b"]]:
    """The jitted function losses(weights, images, text_emb, text_mask, t, seeds) -> loss of each picture.

    The seeds are those of the noise. The loss is that of training: mean squared error of the prediction.
    """
    schedule = schedules.from_config(config)

    @jax.jit
    def losses(weights, images, text_emb, text_mask, t, seeds):
        image = to_float(images)
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), image.shape[1:]))(seeds)
        model, batch = network(config, weights), Batch(image, text_emb, text_mask)
        return squared_error(model, batch, noise, t, schedule, config.prediction)

    return losses


def loss_per_level(
    losses: Callable,
    weights: dict,
    images: UInt8[np.ndarray, "n h w c"],
    text_emb: Float[np.ndarray, "n l d"],
    text_mask: np.ndarray,
    *,
    T: int,
    progress: bool = False,
) -> Float[np.ndarray, "n levels"]:
    """Loss of each picture at each level; NaN where a level has no step."""
    n = len(images)
    steps = questions(n, T).ravel()
    seeds = np.flatnonzero(steps)  # picture * LEVELS + level: which loss, and the seed of its noise
    found = np.full(n * LEVELS, np.nan)
    starts = range(0, len(seeds), BATCH)
    for start in tqdm(starts, unit=" batches", leave=False, disable=None if progress else True):
        rows = np.resize(seeds[start : start + BATCH], BATCH)
        pictures = rows // LEVELS
        batch = jax.device_put((images[pictures], text_emb[pictures], text_mask[pictures], steps[rows], rows))
        found[rows] = jax.device_get(losses(weights, *batch))
    return found.reshape(n, LEVELS)


def build_measure(
    config: Params, images: UInt8[np.ndarray, "n h w c"], names: list[str], encoder: TextEncoder
) -> Callable[..., Float[np.ndarray, "n levels"]]:
    """The function measure(weights, progress=False) -> loss of each of these captioned pictures at each level."""
    text = dataloader.encode(encoder, names, config.TEXT_LEN)
    losses = build_losses(config)
    return lambda weights, **progress: loss_per_level(losses, weights, images, *text, T=config.T, **progress)


def build_monitor(config: Params, unseen: Pictures, encoder: TextEncoder) -> Callable[[dict], dict[str, float | list]]:
    """The function monitor(weights) -> loss on MONITORED of these pictures, as fields for metrics.jsonl."""
    n = min(MONITORED, len(unseen.names))
    if not n:
        return lambda weights: {}
    rows = np.linspace(0, len(unseen.names), n, endpoint=False).astype(int)
    shape = (config.H, config.W, config.CHANNELS)
    in_memory = unseen.images is not None
    images = unseen.images[rows] if in_memory else np.stack([decoded(unseen.file(row), shape) for row in rows])
    measure = build_measure(config, images, [unseen.names[row] for row in rows], encoder)

    def monitor(weights: dict) -> dict[str, float | list]:
        each = measure(weights)
        levels = [None if np.isnan(loss) else float(loss) for loss in each.mean(axis=0)]
        return {"heldout_loss": float(per_picture(each, config.T).mean()), "heldout_loss_per_level": levels}

    return monitor


def in_velocity(losses: Float[np.ndarray, "n levels"], config: Params) -> Float[np.ndarray, "n levels"]:
    """Losses of loss_per_level, of whatever prediction, as the error of the velocity that the prediction stands for.

    At step t the same error is SNR times as large in the noise as in the clean image, SNR + 1 times in the velocity.
    """
    schedule, t = schedules.from_config(config), questions(len(losses), config.T)
    alpha, sigma = (np.asarray(part, np.float64)[t] for part in schedule)
    with np.errstate(divide="ignore"):
        return losses * {"eps": 1 / alpha**2, "v": np.ones_like(alpha), "x0": 1 / sigma**2}[config.prediction]


def per_picture(losses: Float[np.ndarray, "n levels"], T: int) -> Float[np.ndarray, "n"]:
    """Mean over the levels, each counted for as many steps as it has: an estimate of the training loss of a picture."""
    weight = np.bincount(np.arange(T) * LEVELS // T, minlength=LEVELS) / T
    return losses[:, weight > 0] @ weight[weight > 0]  # NaN where a loss is, but for levels without a step
