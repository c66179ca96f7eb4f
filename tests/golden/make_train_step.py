"""Losses and weights of a few training steps: with every option at its no-op value they stay what they are.

`python tests/golden/make_train_step.py` writes train_step.npz beside this file. The first one was written before the
options of the recipe were added. It was written anew where only the weights to start from changed, and where only the
order of the pictures did; each time the old one had just been passed.
"""

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import dataloader
import training
from params import Params

FILE = Path(__file__).with_name("train_step.npz")
STEPS, TEXT_DIM = 3, 5
CONFIG = Params(
    TEXT_LEN=7, H=8, W=12, T=50, T_dim=6, T_out=10, BASE_DIM=8, DIM_MULTS=(1, 2), BLOCKS=1, self_attention=(1,),
    cross_attention=(1,), HEAD_DIM=4, B=6, warmup=2, learning_rate=1e-2,
)  # fmt: skip


def data() -> dataloader.Data:
    random = np.random.default_rng(0)
    return dataloader.Data(
        images=jnp.asarray(random.integers(0, 256, (7, 8, 12, 3)), jnp.uint8),
        text_emb=jnp.asarray(random.normal(size=(7, 7, TEXT_DIM)), jnp.float32),
        text_mask=jnp.asarray(np.arange(7)[None, :] <= np.arange(7)[:, None]),
        null_emb=jnp.asarray(random.normal(size=(7, TEXT_DIM)), jnp.float32),
        null_mask=jnp.asarray(np.arange(7) < 2),
        index=dataloader.one_each(7),
    )


def keys() -> training.Keys:
    return training.Keys(*jax.random.split(jax.random.key(7), len(training.Keys._fields)))


def start(config: Params) -> training.TrainState:
    """A network with no layer at zero, each weight drawn for its own name: only the step itself is compared."""

    def drawn(path: tuple, weight: jax.Array) -> jax.Array:
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        return jnp.asarray(np.random.default_rng(seed).normal(0, 0.2, weight.shape), weight.dtype)

    state = training.init(config, TEXT_DIM, jax.random.key(0))
    return state._replace(weights=jax.tree.map_with_path(drawn, state.weights))


def run(config: Params) -> dict[str, np.ndarray]:
    state = start(config)
    step = training.build_train_step(config, training.structure(config, TEXT_DIM))
    losses = []
    for _ in range(STEPS):
        state, loss = step(state, data(), keys())
        losses.append(loss)
    sizes = jax.tree.map(lambda leaf: jnp.sqrt(jnp.mean(leaf**2)), state.weights)
    return {"losses": np.array(losses), "sizes": np.array(jax.tree.leaves(sizes))}


if __name__ == "__main__":
    np.savez(FILE, **run(CONFIG))
