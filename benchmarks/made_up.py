"""What the benchmarks train and sample: random pictures and captions of a preset's sizes; speed sees no difference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import parallel
import samplers
import schedule
import training
from dataloader import Data, Rows
from model import abstract, network
from params import Params
from sampling import Controls, Request, build_sampler

TEXT_DIM = 384  # numbers per token, as of MiniLM and bge-small-en


def data(config: Params, pictures: int) -> Data:
    """So many pictures with a caption each, after the empty one."""
    random = np.random.default_rng(0)
    return Data(
        jnp.asarray(random.integers(0, 256, (pictures, config.H, config.W, config.CHANNELS)), jnp.uint8),
        jnp.asarray(random.normal(size=(1 + pictures, config.TEXT_LEN, TEXT_DIM)), jnp.float32),
        jnp.ones((1 + pictures, config.TEXT_LEN), bool),
    )


def arguments(config: Params, pictures: int, steps: int = 1) -> tuple:
    """What a training step takes: state, data, rows of so many steps, key."""
    chosen = np.random.default_rng(1).integers(pictures, size=(steps, config.B), dtype=np.int32)
    state, key = training.start(config, TEXT_DIM)
    return state, *parallel.replicate((data(config, pictures), Rows(chosen, 1 + chosen))), key


def forward(config: Params) -> tuple[Callable, tuple]:
    """The network on one picture, as a function, and the shapes of what that takes."""

    def predict(weights: dict, *inputs: jax.Array) -> jax.Array:
        return network(config, weights)(*inputs)

    text = jax.ShapeDtypeStruct((1, config.TEXT_LEN, TEXT_DIM), jnp.float32)
    image = jax.ShapeDtypeStruct((1, config.H, config.W, config.CHANNELS), jnp.float32)
    t, mask = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct(text.shape[:2], bool)
    return predict, (abstract(config, TEXT_DIM)[1], image, t, text, mask)


def shapes(config: Params, pictures: int) -> tuple:
    """The same as shapes without arrays."""
    rows = jax.ShapeDtypeStruct((1, config.B), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: training.init_state(config, TEXT_DIM, key), key)
    return state, jax.eval_shape(lambda: data(config, pictures)), Rows(rows, rows), key


def drawer(config: Params, data: Data, *, pictures: int, sampler: str, steps: int) -> Callable[[dict], jax.Array]:
    """weights -> pictures: this project's sampler on a guided batch."""
    begin, go_on = build_sampler(config)
    levels, solver = schedule.from_config(config), samplers.SOLVERS[sampler]
    text_emb, text_mask = (
        jnp.stack([part[1 : 1 + pictures], jnp.broadcast_to(part[0], part[1 : 1 + pictures].shape)], axis=1)
        for part in (data.text_emb, data.text_mask)
    )
    request = Request(jnp.arange(pictures)[:, None], text_emb, text_mask)
    plan = solver.plan(levels, samplers.timesteps(levels, steps))
    controls = Controls(plan, jnp.float32(7), jnp.zeros(()), None, None, eta=jnp.zeros(()), temperature=jnp.ones(()))

    def draw(weights: dict) -> jax.Array:
        state = begin(request, controls)
        return go_on(weights, None, request, controls, state, 0, steps, take=solver.take)[1]

    return draw
