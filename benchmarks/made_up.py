"""What the benchmarks train and draw: random pictures and captions of a preset's sizes; speed sees no difference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import samplers
import schedule
from dataloader import Data, one_each
from params import Params
from sampling import Controls, Request, build_draw

TEXT_DIM = 384  # numbers per token, as of MiniLM and bge-small-en


def data(config: Params, pictures: int) -> Data:
    random = np.random.default_rng(0)
    return Data(
        jnp.asarray(random.integers(0, 256, (pictures, config.H, config.W, config.CHANNELS)), jnp.uint8),
        jnp.asarray(random.normal(size=(pictures, config.TEXT_LEN, TEXT_DIM)), jnp.float32),
        jnp.ones((pictures, config.TEXT_LEN), bool),
        jnp.zeros((config.TEXT_LEN, TEXT_DIM)),
        jnp.ones(config.TEXT_LEN, bool),
        one_each(pictures),
    )


def drawer(
    config: Params, graphdef: nnx.GraphDef, data: Data, *, pictures: int, sampler: str, steps: int
) -> Callable[[dict], jax.Array]:
    """weights -> pictures: this project's sampler on a guided batch."""
    draw = build_draw(config, graphdef)
    along = tuple(samplers.timesteps(schedule.from_config(config), "trailing", steps).tolist())
    noise = jax.random.normal(jax.random.key(0), (pictures, config.H, config.W, config.CHANNELS))
    captions = (data.text_emb[:pictures, None], data.text_mask[:pictures, None])
    request = Request(noise, jnp.arange(pictures), *captions, jnp.ones((pictures, 1)))
    zero, one = jnp.zeros(()), jnp.ones(())
    controls = Controls(jnp.float32(7), zero, None, None, zero, one, data.null_emb, data.null_mask)
    return lambda weights: draw(weights, None, request, controls, sampler=sampler, along=along)[0]
