"""From a dataset to batches: pictures and encoded captions live on the device, a batch is a function of the step.

The whole set stays on the device as uint8 pictures and token embeddings, encoded once by the frozen text encoder.
Which pictures a step sees follows from the seed and the step alone: pass number e over the data runs through
permutation(fold_in(key, e)). So nothing has to be saved to go on where a run stopped.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from cache import cached
from text_encoder import TextEncoder


class Data(NamedTuple):
    """A dataset on the device."""

    images: UInt8[Array, "n h w c"]
    text_emb: Float[Array, "n l d"]
    text_mask: Bool[Array, "n l"]
    null_emb: Float[Array, "l d"]  # the empty caption: what guidance steers away from
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


def load(images: UInt8[np.ndarray, "n h w c"], captions: list[str], encoder: TextEncoder, length: int) -> Data:
    """Put pictures and their encoded captions on the device."""
    text_emb, text_mask = encode(encoder, ["", *captions], length)
    return Data(*map(jnp.asarray, (images, text_emb[1:], text_mask[1:], text_emb[0], text_mask[0])))


def order(key: Key[Array, ""], step: Int[Array, ""], *, n: int, B: int) -> Int[Array, "B"]:
    """Which B of n pictures a step sees: each picture once per pass, every pass shuffled anew."""
    place = step * B + jnp.arange(B)
    first = place[0] // n
    passes = first + jnp.arange((B - 1) // n + 2)  # as many as one batch can touch
    shuffled = jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), n))(passes)
    return shuffled[place // n - first, place % n]


def sample_batch(
    data: Data,
    order_key: Key[Array, ""],
    dropout_key: Key[Array, ""],
    step: Int[Array, ""],
    *,
    B: int,
    embedding_dropout: float,
) -> Batch:
    """The batch of a step; with probability embedding_dropout a caption is replaced by the empty one."""
    rows = order(order_key, step, n=len(data.images), B=B)
    dropped = jax.random.bernoulli(jax.random.fold_in(dropout_key, step), embedding_dropout, (B,))
    return Batch(
        image=to_float(data.images[rows]),
        text_emb=jnp.where(dropped[:, None, None], data.null_emb[None], data.text_emb[rows]),
        text_mask=jnp.where(dropped[:, None], data.null_mask[None], data.text_mask[rows]),
    )


def to_float(images: UInt8[Array, "... c"]) -> Float[Array, "... c"]:
    """Bytes 0 … 255 to [-1, 1]; with transparency, colour times alpha, so that what is hidden has no colour."""
    image = images.astype(jnp.float32) / 127.5 - 1
    if images.shape[-1] != 4:
        return image
    shown = images[..., :3].astype(jnp.float32) / 255 * (images[..., 3:].astype(jnp.float32) / 255)
    return jnp.concatenate([2 * shown - 1, image[..., 3:]], axis=-1)


def to_bytes(image: Float[Array, "... c"]) -> UInt8[Array, "... c"]:
    """[-1, 1] to bytes 0 … 255, rounded; what lies outside is clipped, what is transparent becomes white."""
    whole = (jnp.clip(image, -1, 1) + 1) * 127.5
    if image.shape[-1] == 4:
        alpha = whole[..., 3:]
        colour = jnp.minimum(255 * whole[..., :3] / jnp.maximum(alpha, 1e-6), 255)
        whole = jnp.concatenate([jnp.where(alpha > 0.5, colour, 255), alpha], axis=-1)
    return jnp.round(whole).astype(jnp.uint8)


def on_white(images: UInt8[np.ndarray, "... 4"]) -> UInt8[np.ndarray, "... 3"]:
    """Transparent pictures laid on white."""
    alpha = images[..., 3:].astype(np.float32) / 255
    return np.round(images[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
