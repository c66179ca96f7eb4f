"""The machine under JAX: its memory, its kind, and compiled programs kept between processes."""

import os

from packages import CACHE


def reserve_memory() -> None:
    """Let JAX take 90 % of a GPU's memory, unless the user has said otherwise; call before its first use."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")


def keep_compiled() -> None:
    """Keep compiled programs in .cache/xla, unless the user has chosen a folder of their own."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def on_accelerator() -> bool:
    """Whether JAX computes on something faster than the CPU."""
    import jax

    return jax.default_backend() != "cpu"
