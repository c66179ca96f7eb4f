"""The jitted functions that sample a batch: from seeds and encoded prompts to images.

`begin` makes the noise and `go_on` takes some of the solver's steps, so that whoever calls may look at the images in
between; the same compiled function takes all steps at once, however many. In it the network is wrapped by guidance.py,
and a solver of samplers.py calls the result. Arrays may change from call to call; what is not an array, and whether an
optional array is there, is compiled in.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

import schedule as schedules
from guidance import classifier_free, inpaint, limit_to_interval, threshold
from images import to_bytes, to_float
from model import network
from params import Params
from samplers import FreshNoise, Images, State, Step, initial_state, take_steps


class Request(NamedTuple):
    """What each image of a batch is sampled from: one prompt and seed, or two of them to interpolate between."""

    seeds: Int[Array, "b s"]
    text_emb: Float[Array, "b k l d"]  # of the prompts, and at the end of the negative prompt
    text_mask: Bool[Array, "b k l"]
    share: Float[Array, "b"] | None = None  # 0 … 1, the way from the first prompt and seed to the second


class Controls(NamedTuple):
    """What all images of a batch have in common; what is None costs nothing."""

    steps: Step  # all of the solver
    guidance: Float[Array, ""] | None
    rescale: Float[Array, ""]
    interval: Int[Array, "2"] | None  # first and last step that are guided
    percentile: Float[Array, ""] | None
    eta: Float[Array, ""]
    temperature: Float[Array, ""]
    image: UInt8[Array, "h w c"] | None = None  # to start from, at the noise level of the first timestep …
    mask: Bool[Array, "h w 1"] | None = None  # … and to keep where this is False


class Sampler(NamedTuple):
    """begin(request, controls) -> state before the first step;
    go_on(weights, guide_weights, request, controls, state, done, until, take=…) -> state after the steps from number
    `done` up to, but not including, `until`, and its estimate of the images, which is at last the images. `take` is
    that of a Solver.
    """

    begin: Callable[..., State]
    go_on: Callable[..., tuple[State, UInt8[Array, "b h w c"]]]


@cache
def build_sampler(config: Params, guide: Params | None = None) -> Sampler:
    """The functions that sample a batch; `go_on` is compiled once per batch size, `take` and kind of guidance.

    Guidance evaluates the network on one enlarged batch, or, where there is a `guide`, a worse network to steer away
    from (autoguidance), that one beside it.
    """
    schedule = schedules.from_config(config)

    def keys_of(seeds: Int[Array, "b s"]) -> Key[Array, "b s 2"]:
        """Of each seed, the key of its noise and that of its fresh noise."""
        return jax.vmap(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))))(seeds)

    @jax.jit
    def begin(request: Request, controls: Controls) -> State:
        shape = (config.H, config.W, config.CHANNELS)
        noisy = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, shape)))(keys_of(request.seeds)[:, :, 0])
        noisy = noisy[:, 0] if request.share is None else jax.vmap(slerp)(noisy[:, 0], noisy[:, -1], request.share)
        if controls.image is not None:
            image = jnp.broadcast_to(to_float(controls.image), noisy.shape)
            noisy = schedules.add_noise(schedule, image, noisy, jnp.full(len(noisy), controls.steps.t[0]))
        return initial_state(noisy)

    @partial(jax.jit, static_argnames="take")
    def go_on(weights, guide_weights, request, controls, state, done, until, *, take):
        seeds, text_emb, text_mask, share = request

        def estimates(config, weights, noisy, t, prompts: slice) -> Float[Array, "b k h w c"]:
            """The clean image that a network sees in `noisy` under each of some prompts."""
            emb, mask = text_emb[:, prompts], text_mask[:, prompts]
            k = mask.shape[1]
            rows, ts = jnp.repeat(noisy, k, axis=0), jnp.repeat(t, k)  # [b * k, h, w, c]
            emb, mask = emb.reshape(-1, *emb.shape[2:]), mask.reshape(-1, *mask.shape[2:])  # [b * k, l, d]
            prediction = network(config, weights)(rows, ts, emb, mask)
            denoised = schedules.denoised_from(schedule, rows, prediction, ts, config.prediction)
            return denoised.reshape(-1, k, *noisy.shape[1:])

        def mix(each: Float[Array, "b k h w c"]) -> Images:
            first, last = each[:, 0], each[:, -1]
            return first if share is None else first + share[:, None, None, None] * (last - first)

        def positive(noisy: Images, t: Int[Array, "b"]) -> Images:
            return mix(estimates(config, weights, noisy, t, slice(-1)))

        def both(noisy: Images, t: Int[Array, "b"]) -> tuple[Images, Images]:
            if guide is not None:
                return positive(noisy, t), mix(estimates(guide, guide_weights, noisy, t, slice(-1)))
            each = estimates(config, weights, noisy, t, slice(None))
            return mix(each[:, :-1]), each[:, -1]

        denoise = positive
        if controls.guidance is not None:
            denoise = classifier_free(both, controls.guidance, controls.rescale)
            if controls.interval is not None:
                denoise = limit_to_interval(controls.interval, denoise, positive)
        denoise = threshold(denoise, controls.percentile)

        if controls.mask is not None:
            denoise = inpaint(denoise, to_float(controls.image)[None], controls.mask[None])

        fresh = FreshNoise(keys_of(seeds)[:, 0, 1], controls.eta, controls.temperature)
        state = take_steps(partial(take, denoise, fresh), controls.steps, state, done, until)
        return state, to_bytes(state.denoised)

    return Sampler(begin, go_on)


def slerp(a: Float[Array, "h w c"], b: Float[Array, "h w c"], share: Float[Array, ""]) -> Float[Array, "h w c"]:
    """From a (share 0) to b (share 1) along the sphere, so that noise stays as large as noise is  (Shoemake 1985)."""
    angle = jnp.arccos(jnp.clip((a * b).sum() / jnp.sqrt((a**2).sum() * (b**2).sum()), -1, 1))

    def part(share):  # sin(share * angle) / sin(angle), also where the angle is 0
        return share * jnp.sinc(share * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    return part(1 - share) * a + part(share) * b
