"""Arrays that take a while to make and can be made again: kept in .cache under a hash of all that they depend on."""

import hashlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np

import packages
from files import replacing


def cached(kind: str, recipe: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` returns, from the disk where it was made before under the same `recipe`.

    A file that cannot be read is made again, one that cannot be written is made again next time: no cache is an error.
    """
    file = packages.CACHE / kind / f"{hashlib.sha256(recipe.encode()).hexdigest()}.npz"
    # a damaged archive raises nearly anything
    with suppress(Exception), file.open("rb") as stream, np.load(stream) as saved:
        return {name: saved[name] for name in saved.files}
    arrays = make()
    with suppress(OSError), replacing(file) as beside, beside.open("wb") as stream:  # a full disk costs only time
        np.savez(stream, **arrays)
    return arrays
