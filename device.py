"""The machine under JAX: its memory, its kind, and compiled programs kept between processes."""

import ctypes
import os
import sys

from packages import CACHE

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h>
KEPT = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # all from one heap, which never shrinks


def reserve_memory() -> None:
    """Let JAX take 90 % of a GPU's memory, unless the user has said otherwise, and keep what it took of the CPU's.

    Call before its first use. glibc gives large arrays back to the system as soon as they are freed, so that every
    training step would ask for its memory anew, a page at a time and each of them zeroed: a tenth of a step.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in KEPT.items() if mallopt else ():
        mallopt(option, value)


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
