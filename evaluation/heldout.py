"""Loss on pictures that training never saw, by noise level: whether a run still learns or only memorizes.

The loss that training reports is of random pictures at random steps, so two of its numbers differ by chance alone. Here
every picture is diffused once within each of the LEVELS, equal stretches of 1 … T. The step and the noise follow from
the picture's place and the level. So all checkpoints, and both averages of their weights, are measured on the same
noisy pictures, and the variety of the pictures cancels in the difference of two checkpoints.

The loss of as many training pictures beside it shows the gap that memorization opens: first at low noise, where a
single picture is still recognisable.
"""

from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

import dataloader
import schedule as schedules
from dataloader import Batch
from dataset import Pictures, decoded
from evaluation.scores import spread
from images import to_float
from model import network
from params import Params
from text_encoder import TextEncoder
from training import LEVELS, squared_error

BATCH = 8  # pictures per call of the network
MONITORED = 64  # held-out pictures whose loss training measures beside each sample grid
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, spread evenly however many are taken


def measured_steps(n: int, T: int) -> Int[np.ndarray, "n levels"]:
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


def build_measure(
    config: Params,
    images: UInt8[np.ndarray, "n h w c"],
    text_emb: Float[np.ndarray, "n l d"],
    text_mask: Bool[np.ndarray, "n l"],
) -> Callable[[dict], Float[np.ndarray, "n levels"]]:
    """The function measure(weights) -> loss of each picture at each level; NaN where a level has no step."""
    losses, steps = build_losses(config), measured_steps(len(images), config.T).ravel()
    seeds = np.flatnonzero(steps)  # picture * LEVELS + level: which loss, and the seed of its noise

    def measure(weights: dict) -> Float[np.ndarray, "n levels"]:
        found = np.full(len(steps), np.nan)
        for start in tqdm(range(0, len(seeds), BATCH), unit=" batches", leave=False, disable=None):
            rows = np.resize(seeds[start : start + BATCH], BATCH)
            pictures = rows // LEVELS
            batch = jax.device_put((images[pictures], text_emb[pictures], text_mask[pictures], steps[rows], rows))
            found[rows] = jax.device_get(losses(weights, *batch))
        return found.reshape(-1, LEVELS)

    return measure


def build_monitor(config: Params, unseen: Pictures, encoder: TextEncoder) -> Callable[[dict], dict[str, float | list]]:
    """The function monitor(weights) -> loss on MONITORED of these pictures, as fields for metrics.jsonl."""
    rows = spread(len(unseen.names), MONITORED)
    if not len(rows):
        return lambda weights: {}
    shape = (config.H, config.W, config.CHANNELS)
    in_memory = unseen.images is not None
    images = unseen.images[rows] if in_memory else np.stack([decoded(unseen.file(row), shape) for row in rows])
    text = dataloader.encode(encoder, [unseen.names[row] for row in rows], config.TEXT_LEN)
    measure = build_measure(config, images, *text)

    def monitor(weights: dict) -> dict[str, float | list]:
        each = measure(weights)
        levels = [None if np.isnan(loss) else float(loss) for loss in each.mean(axis=0)]
        return {"heldout_loss": float(per_picture(each, config.T).mean()), "heldout_loss_per_level": levels}

    return monitor


def per_picture(losses: Float[np.ndarray, "n levels"], T: int) -> Float[np.ndarray, "n"]:
    """Mean over the levels, each counted for as many steps as it has: an estimate of the training loss of a picture."""
    weight = np.bincount(np.arange(T) * LEVELS // T, minlength=LEVELS) / T
    return losses[:, weight > 0] @ weight[weight > 0]  # NaN where a loss is, but for levels without a step
