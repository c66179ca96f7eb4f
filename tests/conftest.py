"""Strict arithmetic for every test: no silent broadcasting, no random key used twice, shapes checked at each call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

TYPED = "dataloader dataset metrics model samplers schedule text_encoder training".split()
jaxtyping.install_import_hook(TYPED, "beartype.beartype")
