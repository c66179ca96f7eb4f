"""The jitted function that draws a batch: from noise and encoded captions to pictures.

Around the network stand the wrappers of guidance.py, around those a solver of samplers.py. What is an array may change
from call to call; what is not an array, or whether an array is there at all, is compiled in.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

import guidance as guiding
import schedule as schedules
from images import to_bytes
from model import network
from params import Params
from samplers import FreshNoise, solver


class Request(NamedTuple):
    """What is asked of each picture of a batch."""

    noisy: Float[Array, "b h w c"]  # where the walk begins
    seeds: Int[Array, "b"]  # of the fresh noise on the way
    text_emb: Float[Array, "b k l d"]  # k captions, whose estimates are mixed
    text_mask: Bool[Array, "b k l"]
    mix: Float[Array, "b k"]  # share of each caption
    known: Float[Array, "b h w c"] | None = None  # a picture to keep …
    drawn: Bool[Array, "b h w 1"] | None = None  # … where this is False


class Controls(NamedTuple):
    """Numbers that may change without recompilation; what is None costs nothing."""

    guidance: Float[Array, ""] | None
    rescale: Float[Array, ""]
    interval: Float[Array, "2"] | None
    percentile: Float[Array, ""] | None
    eta: Float[Array, ""]
    temperature: Float[Array, ""]
    negative_emb: Float[Array, "l d"]
    negative_mask: Bool[Array, "l"]


@cache
def build_draw(
    config: Params, graphdef: nnx.GraphDef, guide: tuple[Params, nnx.GraphDef] | None = None
) -> Callable[..., tuple[UInt8[Array, "b h w c"], UInt8[Array, "b n h w c"] | None]]:
    """The jitted function that draws a batch; compiled once per batch size, sampler, steps and kind of guidance.

    draw(weights, guide_weights, request, controls, sampler=…, along=…, trace=…) -> pictures, and with trace=True the
    estimate of each picture at each of the n steps. `along` are the timesteps. Guidance evaluates the network on one
    enlarged batch, or where there is a guide (configuration and structure of a worse network), that one beside it.
    """
    schedule = schedules.from_config(config)

    def estimates(config: Params, graphdef: nnx.GraphDef, weights: dict, text_emb: Array, text_mask: Array) -> Callable:
        """Clean images [b, k, h, w, c] that a network sees in `noisy` under each of k captions."""
        model = network(config, graphdef, weights)
        k = text_emb.shape[1]
        text_emb, text_mask = (part.reshape(-1, *part.shape[2:]) for part in (text_emb, text_mask))

        def of(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b k h w c"]:
            rows, ts = jnp.repeat(noisy, k, axis=0), jnp.repeat(t, k)
            predicted = model(rows, ts, text_emb, text_mask)
            denoised = schedules.denoised_from(schedule, rows, predicted, ts, config.prediction)
            return denoised.reshape(-1, k, *noisy.shape[1:])

        return of

    @partial(jax.jit, static_argnames=("sampler", "along", "trace"))
    def draw(
        weights: dict,
        guide_weights: dict | None,
        request: Request,
        controls: Controls,
        *,
        sampler: str,
        along: tuple[int, ...],
        trace: bool = False,
    ):
        captions = (request.text_emb, request.text_mask)
        under = partial(estimates, config, graphdef, weights)

        def mixed(each: Float[Array, "b k h w c"]) -> Float[Array, "b h w c"]:
            return (request.mix[:, :, None, None, None] * each).sum(axis=1)

        def positive(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
            return mixed(under(*captions)(noisy, t))

        def both(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]):
            if guide is not None:
                return positive(noisy, t), mixed(estimates(*guide, guide_weights, *captions)(noisy, t))
            negative = (
                jnp.broadcast_to(part[None, None], (len(noisy), 1, *part.shape))
                for part in (controls.negative_emb, controls.negative_mask)
            )
            beside = (jnp.concatenate(pair, axis=1) for pair in zip(captions, negative, strict=True))
            each = under(*beside)(noisy, t)
            return mixed(each[:, :-1]), each[:, -1]

        denoise = positive
        if controls.guidance is not None:
            denoise = guiding.guided(both, controls.guidance, controls.rescale)
            if controls.interval is not None:
                denoise = guiding.within(controls.interval, config.T, denoise, positive)
        denoise = guiding.thresholded(denoise, controls.percentile)
        if request.drawn is not None:
            denoise = guiding.keeping(denoise, request.known, request.drawn)

        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[1])(request.seeds)
        fresh = FreshNoise(keys, controls.eta, controls.temperature)
        image, on_the_way = solver(sampler).solve(denoise, schedule, request.noisy, np.array(along), fresh)
        return to_bytes(image), to_bytes(jnp.moveaxis(on_the_way, 0, 1)) if trace else None

    return draw


@partial(jax.jit, static_argnames="shape")
def noise_of(seed: Int[Array, ""], shape: tuple[int, int, int]) -> Float[Array, "h w c"]:
    """The noise that a seed's picture starts from."""
    return jax.random.normal(jax.random.split(jax.random.key(seed))[0], shape)


def slerp(
    a: Float[np.ndarray, "h w c"], b: Float[np.ndarray, "h w c"], share: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n h w c"]:
    """From a (share 0) to b (share 1) along the sphere, which keeps noise as large as noise is (Shoemake 1985)."""
    share = share[:, None, None, None]
    angle = np.arccos(np.clip((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()), -1, 1))
    if np.sin(angle) < 1e-3:
        return (1 - share) * a + share * b
    return np.sin((1 - share) * angle) / np.sin(angle) * a + np.sin(share * angle) / np.sin(angle) * b
