"""From a dataset to batches: pictures and encoded captions live on the device, a batch is a function of the step.

The whole set stays on the device as uint8 pictures and token embeddings, encoded once by the frozen text encoder. A
batch takes three steps, so that `stream` can do the second one from the disk:

    choices    which pictures and which of their captions a step shows, from the seed and the step alone
    gather     these pictures and captions
    finish     some captions replaced by the empty one, pictures as floats

An epoch is one pass over the concepts, the rows of the CSV, in an order of its own. The order is never laid out: which
concept comes at a place costs as much in a set of a hundred as in one of a million. Where several vendors draw a
concept they take turns from pass to pass, so that each is seen equally often, and a concept that all of them draw no
oftener than one that a single one draws. Nothing has to be saved to go on where a run stopped.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32

import dataset
from dataset import Pictures
from files import cached
from images import to_float
from params import Params
from text_encoder import TextEncoder

ROUNDS = 32  # of a shuffle: a place takes part in no swap with probability 2^-32; after one it may be anywhere
NO_PASS = 2**32 - 1  # folded into the order's key for what is not the order of a pass


class Index(NamedTuple):
    """Which rows belong together; what has fewer than the most is filled up with -1."""

    pictures: Int[Array, "concepts vendors"]  # of each concept
    captions: Int[Array, "n texts"]  # of each picture: its own one, then the variants


class Data(NamedTuple):
    """A dataset on the device."""

    images: UInt8[Array, "n h w c"]
    text_emb: Float[Array, "m l d"]
    text_mask: Bool[Array, "m l"]
    null_emb: Float[Array, "l d"]  # the empty caption: what guidance steers away from
    null_mask: Bool[Array, "l"]
    index: Index


class Picked(NamedTuple):
    """The pictures and captions of one step."""

    images: UInt8[Array, "b h w c"]
    text_emb: Float[Array, "b l d"]
    text_mask: Bool[Array, "b l"]
    null_emb: Float[Array, "l d"]
    null_mask: Bool[Array, "l"]


class Batch(NamedTuple):
    image: Float[Array, "b h w c"]
    text_emb: Float[Array, "b l d"]
    text_mask: Bool[Array, "b l"]


def encode(
    encoder: TextEncoder, texts: list[str], length: int
) -> tuple[Float[np.ndarray, "n l d"], Bool[np.ndarray, "n l"]]:
    """Token embeddings and masks of many captions, computed once and kept on disk under a hash of all that matters."""
    recipe = json.dumps([encoder.identity, length, texts])
    arrays = cached("captions", recipe, lambda: dict(zip(("emb", "mask"), encoder(texts, length), strict=True)))
    return arrays["emb"], arrays["mask"]


def load(pictures: Pictures, encoder: TextEncoder, config: Params) -> Data:
    """Put pictures and their encoded captions on the device, cut to the tokens that the longest caption has."""
    texts, index = captions(pictures, config.caption_variants)
    text_emb, text_mask = encode(encoder, ["", *texts], config.TEXT_LEN)
    length = enough(text_mask)
    text_emb, text_mask = text_emb[:, :length], text_mask[:, :length]
    captioned = jax.tree.map(jnp.asarray, (text_emb[1:], text_mask[1:], text_emb[0], text_mask[0], index))
    return Data(jax.device_put(pictures.images), *captioned)  # on a CPU not copied, if `dataset.load` laid them out


def captions(pictures: Pictures, caption_variants: float) -> tuple[list[str], Index]:
    """Every caption that training may show, and the tables that say whose it is; raises as `dataset.variants`."""
    texts, own = list(pictures.names), [[row] for row in range(len(pictures.names))]
    if caption_variants:
        for row, others in zip(own, dataset.variants(pictures), strict=True):
            row += range(len(texts), len(texts) + len(others))
            texts += others
    concepts = {}
    for row, index in enumerate(pictures.indexes):
        concepts.setdefault(index, []).append(row)
    return texts, Index(_table(concepts.values()), _table(own))


def _table(rows) -> Int[np.ndarray, "n most"]:
    most = max(map(len, rows))
    return np.array([[*row, *[-1] * (most - len(row))] for row in rows], np.int32)


def one_each(n: int) -> Index:
    """The tables of n pictures that have a concept and a caption each."""
    return Index(jnp.arange(n)[:, None], jnp.arange(n)[:, None])


def enough(text_mask: Bool[np.ndarray, "n l"]) -> int:
    """Tokens that hold every caption, a multiple of 8 for speed; what is masked changes nothing but takes time."""
    longest = int(text_mask.any(0).nonzero()[0][-1]) + 1
    return min(text_mask.shape[1], -(-longest // 8) * 8)


# Which pictures and captions a step shows.


def order(key: Key[Array, ""], step: Int[Array, ""], *, n: int, B: int) -> Int[Array, "B"]:
    """Which B of n concepts a step sees: each once per pass, every pass shuffled anew."""
    place = step * B + jnp.arange(B)
    return jax.vmap(lambda e, place: shuffled(jax.random.fold_in(key, e), place, n))(place // n, place % n)


def shuffled(key: Key[Array, ""], place: Int[Array, ""], n: int) -> Int[Array, ""]:
    """Where a random permutation of 0 … n - 1 takes one of them, without the others (swap or not: Hoang et al. 2012).

    Each round mirrors all places about a random centre; a place and its image are swapped if the coin of the higher
    one says so.
    """
    centre_key, coin_key = jax.random.split(key)
    centres = jax.random.randint(centre_key, (ROUNDS,), 0, n)
    coins = jax.random.bits(coin_key, (ROUNDS,))
    for r in range(ROUNDS):
        image = (centres[r] - place) % n
        coin = fmix32(jnp.maximum(place, image).astype(jnp.uint32) ^ coins[r]) >> 31
        place = jnp.where(coin == 1, image, place)
    return place


def fmix32(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Every bit of the result depends on all of them (of MurmurHash3, Appleby 2011)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def choices(
    index: Index, key: Key[Array, ""], step: Int[Array, ""], *, B: int, caption_variants: float
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The pictures and the captions that a step shows, as rows.

    The vendors of a concept take turns from pass to pass; with probability caption_variants one of a picture's other
    captions is taken, if it has any.
    """
    n = len(index.pictures)
    concepts, passes = order(key, step, n=n, B=B), (step * B + jnp.arange(B)) // n
    drawn = index.pictures[concepts]
    turn = (concepts + passes) % (drawn >= 0).sum(axis=1)  # half of the concepts begin with the other one of two
    rows = jnp.take_along_axis(drawn, turn[:, None], axis=1)[:, 0]
    texts = index.captions[rows]
    if not caption_variants:
        return rows, texts[:, 0]
    others = (texts >= 0).sum(axis=1) - 1
    chance_key, which_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, NO_PASS), step))
    varied = jax.random.bernoulli(chance_key, caption_variants, others.shape) & (others > 0)
    which = 1 + jax.random.randint(which_key, others.shape, 0, jnp.maximum(others, 1))
    return rows, jnp.take_along_axis(texts, jnp.where(varied, which, 0)[:, None], axis=1)[:, 0]


# The batch of a step.


def gather(data: Data, rows: Int[Array, "B"], texts: Int[Array, "B"]) -> Picked:
    return Picked(data.images[rows], data.text_emb[texts], data.text_mask[texts], data.null_emb, data.null_mask)


def finish(picked: Picked, key: Key[Array, ""], step: Int[Array, ""], *, embedding_dropout: float) -> Batch:
    """Pictures as floats; with probability embedding_dropout a caption is replaced by the empty one."""
    dropped = jax.random.bernoulli(jax.random.fold_in(key, step), embedding_dropout, (len(picked.images),))
    return Batch(
        image=to_float(picked.images),
        text_emb=jnp.where(dropped[:, None, None], picked.null_emb[None], picked.text_emb),
        text_mask=jnp.where(dropped[:, None], picked.null_mask[None], picked.text_mask),
    )


def sample_batch(
    data: Data,
    order_key: Key[Array, ""],
    dropout_key: Key[Array, ""],
    step: Int[Array, ""],
    *,
    B: int,
    embedding_dropout: float,
    caption_variants: float = 0.0,
) -> Batch:
    """The batch of a step, from data on the device."""
    rows, texts = choices(data.index, order_key, step, B=B, caption_variants=caption_variants)
    return finish(gather(data, rows, texts), dropout_key, step, embedding_dropout=embedding_dropout)


def batch_of(
    source: Data | Picked, order_key: Key[Array, ""], dropout_key: Key[Array, ""], step: Int[Array, ""], config: Params
) -> Batch:
    """The batch of a step: from data on the device, or from what was picked for this step beforehand."""
    if isinstance(source, Picked):
        return finish(source, dropout_key, step, embedding_dropout=config.embedding_dropout)
    rates = {"embedding_dropout": config.embedding_dropout, "caption_variants": config.caption_variants}
    return sample_batch(source, order_key, dropout_key, step, B=config.B, **rates)
