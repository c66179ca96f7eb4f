"""The batches of `dataloader`, read from the disk as training goes: for sets that do not fit in memory.

A step shows exactly what it would show from memory: the same order and choices, from the seed and the step alone,
computed on the host; so a run goes on at any step, and nothing but the step has to be saved. Threads of grain decode
the pictures a few batches ahead. Encoded captions lie in one file in .cache, which is mapped into memory and read
where it is needed.

Nothing decodes every picture beforehand. A picture whose header reads but whose pixels do not ends the run when its
turn comes, with a DatasetError that names its file.
"""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import jax
import numpy as np
from jaxtyping import Array, Key

import dataloader
import files
from dataloader import Index, Picked
from dataset import DatasetError, Pictures, decoded
from files import replacing
from params import Params
from text_encoder import CHUNK, TextEncoder

AHEAD = 4  # batches that are read before they are asked for
PART = 64 * CHUNK  # captions encoded together

_choices = jax.jit(dataloader.choices, static_argnames=("B", "caption_variants"))


class Stream(NamedTuple):
    """A dataset on the disk."""

    file: Callable[[SupportsIndex], Path]  # of a row
    shape: tuple[int, int, int]  # height, width, channels
    captions: np.ndarray  # [1 + m] of `emb` and `mask`, mapped into memory; the empty caption first
    index: Index


def load(pictures: Pictures, encoder: TextEncoder, config: Params) -> Stream:
    """What `dataloader.load` puts on the device, left on the disk; raises DatasetError where that cannot be."""
    texts, index = dataloader.captions(pictures, config.caption_variants)
    captions = encoded(encoder, ["", *texts], config.TEXT_LEN)
    return Stream(pictures.file, (config.H, config.W, config.CHANNELS), captions, index)


def encoded(encoder: TextEncoder, texts: list[str], length: int) -> np.ndarray:
    """Token embeddings `emb` and masks `mask` of many captions, in a file that is mapped into memory.

    They are cut to the tokens that the longest has. The file is made once, a part at a time.
    """
    recipe = hashlib.sha256(json.dumps([encoder.identity, length, texts]).encode()).hexdigest()
    file = files.CACHE / "captions" / f"{recipe}.npy"
    with suppress(OSError, ValueError):  # not there, or cut short
        return np.load(file, mmap_mode="r")
    parts = [slice(start, start + PART) for start in range(0, len(texts), PART)]
    kept = max(dataloader.enough(encoder.tokenize(texts[part], length)[1]) for part in parts)
    kind = np.dtype([("emb", np.float32, (kept, encoder.dim)), ("mask", bool, (kept,))])
    try:
        with replacing(file) as beside, beside.open("wb") as stream:  # not mapped: a full disk would end the process
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(texts),)}
            np.lib.format.write_array_header_2_0(stream, header)
            for part in parts:
                text_emb, text_mask = encoder(texts[part], length)
                rows = np.empty(len(text_emb), kind)
                rows["emb"], rows["mask"] = text_emb[:, :kept], text_mask[:, :kept]
                stream.write(rows.tobytes())
        return np.load(file, mmap_mode="r")
    except OSError as error:
        size = len(texts) * kind.itemsize / 2**20
        raise DatasetError(
            f"{file.parent} cannot hold the {size:.0f} MiB of encoded captions that --stream reads from there "
            f"({error.strerror or error}); make room, or train without --stream"
        ) from error


def batches(
    source: Stream, order_key: Key[Array, ""], step: int, config: Params, *, share: slice | None = None
) -> Iterator[Picked]:
    """The pictures and captions of a step, of the next one, and so on without end.

    Of several processes each reads its `share` of every batch, such as slice(0, B // 2) and slice(B // 2, B).
    """
    try:
        import grain
    except ImportError:
        raise DatasetError("--stream needs the package grain: pip install grain, or train without --stream") from None
    chosen, numbers = chooser(source, order_key, config), range(config.B)[share or slice(None)]

    def read(place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, texts = chosen(place // len(numbers))
        number = numbers[place % len(numbers)]
        caption = source.captions[1 + texts[number]]
        return decoded(source.file(rows[number]), source.shape), caption["emb"], caption["mask"]

    warnings.filterwarnings("ignore", module=r"PIL\.")  # advice about odd files; filters are not of a thread
    threads = min(16, 2 * (os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, AHEAD * len(numbers)))
    places = grain.MapDataset.range(step * len(numbers), 2**62)
    running = iter(places.map(read).to_iter_dataset(options).batch(len(numbers)))
    null_emb, null_mask = source.captions[0]["emb"], source.captions[0]["mask"]
    try:
        for images, text_emb, text_mask in running:
            yield Picked(images, text_emb, text_mask, null_emb, null_mask)
    finally:
        running.close()


def chooser(
    source: Stream, order_key: Key[Array, ""], config: Params
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """step -> the rows of the pictures and of the captions that it shows, for threads to ask."""
    host = jax.local_devices(backend="cpu")[0]  # the other device is busy
    index, key = jax.device_put((source.index, order_key), host)
    lock = threading.Lock()

    @lru_cache(AHEAD + 20)
    def chosen(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = _choices(index, key, step, B=config.B, caption_variants=config.caption_variants)
        return tuple(map(np.asarray, rows))

    def asked(step: int) -> tuple[np.ndarray, np.ndarray]:
        with lock:
            return chosen(step)

    return asked
