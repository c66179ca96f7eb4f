"""What one training step of a configuration costs: parameters, FLOPs and memory, without taking it."""

import jax
import jax.numpy as jnp

import dataloader
import parallel
import training
from params import Params
from text_encoder import EncoderError, TextEncoder


def forecast(config: Params) -> None:
    """Print the configuration, and what one step of it costs."""
    parallel.check_batch_size(config)
    try:
        text_dim = TextEncoder(config.encoder).dim
    except EncoderError:
        text_dim = 384
        print(f"encoder {config.encoder} is not here: counting with {text_dim} numbers per token")
    for field, value in config.to_json().items():
        print(f"{field:18} {value}")

    def arguments(key: jax.Array) -> tuple:
        held = config.B if config.stream else config.MAX_INDEX or 1900  # pictures
        images = jnp.zeros((held, config.H, config.W, config.CHANNELS), jnp.uint8)
        captions = jnp.zeros((held, config.TEXT_LEN, text_dim)), jnp.zeros((held, config.TEXT_LEN), bool)
        rows = jnp.zeros((1, config.B), jnp.int32)
        data, rows = dataloader.Data(images, *captions), None if config.stream else dataloader.Rows(rows, rows)
        return training.init_state(config, text_dim, key), data, rows, key

    state, *others = jax.eval_shape(arguments, jax.eval_shape(lambda: jax.random.key(0)))
    step = training.build_train_step(config, steps=1)
    lowered = step.lower(state, *others)
    memory = lowered.compile().memory_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
    print(f"{'parameters':18} {parameters / 1e6:.2f} M")
    print(f"{'FLOPs per step':18} {lowered.cost_analysis()['flops'] / 1e9:.1f} G ({config.B} pictures)")
    before = memory.argument_size_in_bytes
    print(f"{'memory per step':18} {(before + memory.temp_size_in_bytes) / 2**20:.0f} MiB ({before / 2**20:.0f} held)")
