"""What is done to the estimates on their way from the network to the solver: wrappers around `denoise`.

Each gives a `denoise(noisy, t)`, so they nest, and no solver knows of them. Each has a value at which it changes
nothing: guidance 1, rescale 0, the interval from 0 to 1, a mask that is True everywhere; thresholds leave alone what
is in range.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from samplers import Denoise

Both = Callable[[Float[Array, "b h w c"], Int[Array, "b"]], tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]]


def guided(both: Both, guidance: Float[Array, ""], rescale: Float[Array, ""]) -> Denoise:
    """From the negative estimate through the positive one and beyond (Ho & Salimans 2022, Eq. 6).

    both(noisy, t) gives the positive and the negative estimate: with the caption and without it, or with a negative
    prompt; or both with it, the negative by a worse network (autoguidance, Karras et al. 2024, Eq. 3). guidance 0 is
    the negative estimate, 1 the positive one. rescale (0 … 1) brings the contrast that guidance adds back to that of
    the positive estimate (Lin et al. 2024, Eq. 15 and 16), here about each picture's mean, so that none turns darker.
    """

    def denoise(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
        positive, negative = both(noisy, t)
        estimate = negative + guidance * (positive - negative)
        mean, contrast, wanted = (
            statistic(picture, axis=(1, 2, 3), keepdims=True)
            for statistic, picture in ((jnp.mean, estimate), (jnp.std, estimate), (jnp.std, positive))
        )
        ratio = wanted / jnp.maximum(contrast, 1e-6)
        return estimate + rescale * (ratio - 1) * (estimate - mean)

    return denoise


def within(interval: Float[Array, "2"], T: int, inside: Denoise, outside: Denoise) -> Denoise:
    """`inside` where t / T lies within the interval, elsewhere `outside`, and only that one is evaluated.

    Guidance helps in the middle of the noise levels (Kynkäänniemi et al. 2024).
    """

    def denoise(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
        level = t[0] / T  # a solver asks for the same t for the whole batch
        return jax.lax.cond((interval[0] <= level) & (level <= interval[1]), inside, outside, noisy, t)

    return denoise


def thresholded(inner: Denoise, percentile: Float[Array, ""] | None = None) -> Denoise:
    """Bring estimates back into the range of pictures (Saharia et al. 2022, Section 2.3).

    Static, without a percentile: clip to [-1, 1]. What guidance makes overshoot is held at the border at every step,
    and the next estimate starts from there. Dynamic: divide each picture by the percentile (0 … 1) of its absolute
    values, where that is above 1, and clip.
    """

    def denoise(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
        estimate = inner(noisy, t)
        if percentile is None:
            return jnp.clip(estimate, -1, 1)
        largest = jnp.quantile(jnp.abs(estimate), percentile, axis=(1, 2, 3), keepdims=True)
        bound = jnp.maximum(largest, 1)
        return jnp.clip(estimate, -bound, bound) / bound

    return denoise


def keeping(inner: Denoise, image: Float[Array, "b h w c"], drawn: Bool[Array, "b h w 1"]) -> Denoise:
    """Draw where `drawn` is True and keep `image` elsewhere, exactly: a last step that ends at t = 0 returns it.

    Where the estimate is the known image at every step, the solver carries that image under its own noise, so the
    network always sees the known part at the noise level of the rest.
    """

    def denoise(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
        return jnp.where(drawn, inner(noisy, t), image)

    return denoise
