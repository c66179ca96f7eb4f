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
from sampling import Controls, Request, build_sampler

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
    sample = build_sampler(config, graphdef)
    along = tuple(samplers.timesteps(schedule.from_config(config), "trailing", steps).tolist())
    text_emb, text_mask = (
        jnp.stack([part[:pictures], jnp.broadcast_to(null, part[:pictures].shape)], axis=1)
        for part, null in ((data.text_emb, data.null_emb), (data.text_mask, data.null_mask))
    )
    request = Request(jnp.arange(pictures)[:, None], text_emb, text_mask)
    controls = Controls(jnp.float32(7), jnp.zeros(()), None, None, eta=jnp.zeros(()), temperature=jnp.ones(()))
    return lambda weights: sample(weights, None, request, controls, sampler=sampler, timesteps=along)[0]
