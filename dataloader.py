"""From pictures and captions to batches.

Captions are encoded once by the frozen text encoder and kept on the disk. What a step shows is decided on the host,
from the seed and the step alone, so that a run can go on at any step and nothing about the data has to be saved:

    rows      which pictures, and which of their captions; row 0 of the captions is the empty one
    batch     these rows of arrays on the device (`Memory`), or what `Stream` read from files, as floats in [-1, 1]

An epoch is one pass over the concepts, the rows of the CSV, in an order of its own: one NumPy permutation from (seed,
pass). Where several vendors have a picture of a concept, they take turns from pass to pass. A caption may be replaced
by the empty one, which teaches the network to work without a caption, as guidance needs (Ho & Salimans 2022), or by
another one: of a further row of the CSV, or made from keywords.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

import dataset
import files
import parallel
from dataset import DatasetError, Pictures
from images import to_float
from params import Params
from text_encoder import CHUNK, TextEncoder

PASS, STEP = 0, 1  # second word of the seeds: an order of the concepts, the choices of a step
AHEAD = 4  # batches that are read from the disk before they are needed
PART = 64 * CHUNK  # captions encoded and written together


class Table(NamedTuple):
    """Which rows belong together; shorter rows are filled up with -1."""

    pictures: Int[np.ndarray, "concepts vendors"]  # of each concept
    captions: Int[np.ndarray, "n texts"]  # of each picture: its own caption, then the variants


class Data(NamedTuple):
    """Pictures and encoded captions: of the whole set, or of one batch."""

    images: UInt8[Array, "n h w c"]
    text_emb: Float[Array, "m l d"]
    text_mask: Bool[Array, "m l"]


class Rows(NamedTuple):
    """Which pictures and captions of a `Data` each of n steps shows."""

    images: Int[Array, "n B"]
    captions: Int[Array, "n B"]


class Batch(NamedTuple):
    image: Float[Array, "b h w c"]
    text_emb: Float[Array, "b l d"]
    text_mask: Bool[Array, "b l"]


# What a step shows.


def table(pictures: Pictures, caption_variants: float) -> tuple[Table, list[str]]:
    """The table of a set, and all texts, the empty one first; raises as `dataset.variants`."""
    texts, captions = ["", *pictures.names], [[1 + row] for row in range(len(pictures.names))]
    if caption_variants:
        for own, others in zip(captions, dataset.variants(pictures), strict=True):
            own += range(len(texts), len(texts) + len(others))
            texts += others
    concepts = {}
    for row, index in enumerate(pictures.indexes):
        concepts.setdefault(index, []).append(row)

    def filled_up(rows: list[list[int]]) -> Int[np.ndarray, "n most"]:
        most = max(map(len, rows))
        return np.array([[*row, *[-1] * (most - len(row))] for row in rows], np.int32)

    return Table(filled_up(list(concepts.values())), filled_up(captions)), texts


@lru_cache(4)
def permutation(seed: int, number: int, n: int) -> Int[np.ndarray, "n"]:
    """The order of n concepts in one pass."""
    return np.random.default_rng((seed, PASS, number)).permutation(n)


def rows_at(table: Table, step: int, config: Params) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """The pictures and the captions of one step, as rows."""
    n = len(table.pictures)
    passes, places = np.divmod(step * config.B + np.arange(config.B), n)
    concepts = np.empty(config.B, int)
    for number in np.unique(passes):
        concepts[passes == number] = permutation(config.seed, int(number), n)[places[passes == number]]
    candidates = table.pictures[concepts]  # [B, vendors]
    turn = (concepts + passes) % (candidates >= 0).sum(axis=1)  # half of the concepts begin with the other vendor
    images = np.take_along_axis(candidates, turn[:, None], axis=1)[:, 0]

    random = np.random.default_rng((config.seed, STEP, step))
    texts = table.captions[images]  # [B, texts]
    variants = (texts >= 0).sum(axis=1) - 1
    varied = random.random(config.B) < config.caption_variants
    which = np.where(varied & (variants > 0), 1 + np.floor(random.random(config.B) * variants).astype(int), 0)
    captions = np.take_along_axis(texts, which[:, None], axis=1)[:, 0]
    dropped = random.random(config.B) < config.embedding_dropout
    return images, np.where(dropped, 0, captions).astype(np.int32)


def rows(table: Table, step: int, n: int, config: Params) -> Rows:
    """The rows of n steps from `step` on."""
    images, captions = zip(*(rows_at(table, step + i, config) for i in range(n)), strict=True)
    return Rows(np.stack(images), np.stack(captions))


def batch(data: Data, rows: Rows | None = None) -> Batch:
    """What one step is computed from: these rows of the data, or all; pictures as floats in [-1, 1]."""
    if rows is not None:
        data = Data(data.images[rows.images], data.text_emb[rows.captions], data.text_mask[rows.captions])
    return Batch(to_float(data.images), data.text_emb, data.text_mask)


# Where pictures and captions lie.


def encode(
    encoder: TextEncoder, texts: list[str], length: int
) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
    """Token embeddings and masks of many captions, cut to the tokens that the longest has.

    They are computed once, a part at a time, into a file that is mapped into memory, named by a hash of all that they
    depend on. Where no file can be written they are kept in memory.
    """
    texts = encoder.spelled(texts)  # so that emoji encoded under another spelling are not taken for these
    recipe = hashlib.sha256(json.dumps([encoder.identity, length, texts]).encode()).hexdigest()
    file = files.CACHE / "captions" / f"{recipe}.npy"
    with suppress(OSError, ValueError):  # not there, or damaged
        saved = np.load(file, mmap_mode="r")
        return saved["emb"], saved["mask"]
    parts = [texts[start : start + PART] for start in range(0, len(texts), PART)]
    longest = max(int(encoder.tokenize(part, length)[1].sum(axis=1).max()) for part in parts)
    l = min(length, -(-longest // 8) * 8)  # noqa: E741  (a multiple of 8 is faster, and what is masked changes nothing)
    kind = np.dtype([("emb", np.float32, (l, encoder.dim)), ("mask", bool, (l,))])

    def encoded(part: list[str]) -> np.ndarray:
        found = np.empty(len(part), kind)
        text_emb, text_mask = encoder(part, length)
        found["emb"], found["mask"] = text_emb[:, :l], text_mask[:, :l]
        return found

    try:
        with files.replacing(file) as beside, beside.open("wb") as stream:  # not mapped: a full disk would be fatal
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(texts),)}
            np.lib.format.write_array_header_2_0(stream, header)
            for part in parts:
                stream.write(encoded(part).tobytes())
        saved = np.load(file, mmap_mode="r")
    except OSError as error:
        print(f"{file.parent} cannot hold the encoded captions ({error.strerror or error}): they stay in memory")
        saved = np.concatenate([encoded(part) for part in parts])
    return saved["emb"], saved["mask"]


def captions_of(pictures: Pictures, encoder: TextEncoder, config: Params) -> tuple[Table, np.ndarray, np.ndarray]:
    """The table of a set and all of its encoded captions; warns of words that the encoder does not know."""
    found, texts = table(pictures, config.caption_variants)
    encoder.name_unknown(encoder.spelled(texts))  # also where `encode` finds them on the disk
    return found, *encode(encoder, texts, config.TEXT_LEN)


class Memory:
    """A set that lies on the device, whole on each."""

    def __init__(self, pictures: Pictures, encoder: TextEncoder, config: Params):
        self.config = config
        self.table, *captions = captions_of(pictures, encoder, config)
        captions = map(np.ascontiguousarray, captions)
        # On a CPU the pictures are not copied, where `dataset` laid them out as JAX needs them.
        self.data = parallel.replicate(Data(jax.device_put(pictures.images), *captions))

    def at(self, step: int, n: int) -> tuple[Data, Rows]:
        """What n steps from `step` on are computed from."""
        return self.data, parallel.replicate(rows(self.table, step, n, self.config))

    def close(self) -> None:
        pass


class Stream:
    """A set that stays on the disk: threads of grain decode its pictures a few batches ahead.

    A picture that cannot be decoded ends the run when it is needed, with a DatasetError that names its file.
    """

    def __init__(self, pictures: Pictures, encoder: TextEncoder, config: Params):
        self.config, self.pictures = config, pictures
        self.table, *self.captions = captions_of(pictures, encoder, config)
        self.next, self.batches = None, None

    def at(self, step: int, n: int) -> tuple[Data, None]:
        """The batch of a step; of several processes each reads its rows of it."""
        assert n == 1, "what is streamed is picked step by step"
        if step != self.next:
            self.close()
            self.batches = self.read_from(step)
        self.next = step + 1
        return parallel.global_batch(next(self.batches)), None

    def read_from(self, step: int) -> Iterator[Data]:
        """The batches of this step, of the next one, and so on without end."""
        try:
            import grain
        except ImportError:
            raise DatasetError(
                "--stream needs the package grain: pip install grain, or train without --stream"
            ) from None
        local = range(self.config.B)[parallel.local_rows(self.config.B)]
        at = lru_cache(AHEAD + 20)(lambda step: rows_at(self.table, step, self.config))
        shape = (self.config.H, self.config.W, self.config.CHANNELS)
        text_emb, text_mask = self.captions

        def read(place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            images, captions = at(place // len(local))
            row = local[place % len(local)]
            image = dataset.decoded(self.pictures.file(images[row]), shape)
            return image, text_emb[captions[row]], text_mask[captions[row]]

        warnings.filterwarnings("ignore", module=r"PIL\.")  # advice about odd files; filters are per process
        threads = min(16, 2 * (os.cpu_count() or 1))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, AHEAD * len(local)))
        places = grain.MapDataset.range(step * len(local), 2**62)
        running = iter(places.map(read).to_iter_dataset(options).batch(len(local)))
        try:
            yield from (Data(*arrays) for arrays in running)
        finally:
            running.close()

    def close(self) -> None:
        """Stop reading."""
        if self.batches is not None:
            self.batches.close()


def load(pictures: Pictures, encoder: TextEncoder, config: Params) -> Memory | Stream:
    """The source of a run's batches, in memory or on the disk as the configuration says."""
    return (Stream if config.stream else Memory)(pictures, encoder, config)
