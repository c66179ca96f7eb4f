"""What happens to an estimate between the network and the solver: wrappers around `denoise`.

Each returns a `denoise(noisy, t)`, so they nest, and no solver knows of them. Each has a setting that changes nothing:
guidance 1, rescale 0, the interval from 0 to 1, a mask that is True everywhere.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from samplers import Denoise, Images

Both = Callable[[Images, Int[Array, "b"]], tuple[Images, Images]]


def classifier_free(both: Both, guidance: Float[Array, ""], rescale: Float[Array, ""]) -> Denoise:
    """Guided estimate: negative + guidance * (positive - negative)  (Ho & Salimans 2022, Eq. 6; guidance = 1 + w).

    both(noisy, t) returns the positive and the negative estimate: with the caption, and with the empty caption or a
    negative prompt; or both with the caption, the negative one by a worse network (autoguidance, Karras et al. 2024b,
    Eq. 3). rescale (0 … 1) takes back the contrast that guidance adds to the positive estimate (Lin et al. 2024,
    Eq. 15 and 16), here about each image's mean, so that no image turns darker.
    """

    def denoise(noisy: Images, t: Int[Array, "b"]) -> Images:
        positive, negative = both(noisy, t)
        guided = negative + guidance * (positive - negative)
        mean, contrast, wanted = (
            statistic(image, axis=(1, 2, 3), keepdims=True)
            for statistic, image in ((jnp.mean, guided), (jnp.std, guided), (jnp.std, positive))
        )
        ratio = wanted / jnp.maximum(contrast, 1e-6)
        return guided + rescale * (ratio - 1) * (guided - mean)

    return denoise


def steps_within(interval: tuple[float, float], T: int) -> Int[np.ndarray, "2"]:
    """The first and the last step whose noise level t / T lies in an interval, ends included.

    0.7 * 1000 may come out beside 700, so a bound that close to a whole step means that step.
    """
    low, high = interval
    return np.array([math.ceil(low * T - 1e-9), math.floor(high * T + 1e-9)], np.int32)


def limit_to_interval(steps: Int[Array, "2"], inside: Denoise, outside: Denoise) -> Denoise:
    """`inside` from the first to the last of these steps, `outside` elsewhere; only the one in use is evaluated.

    Guidance helps in the middle of the noise levels (Kynkäänniemi et al. 2024).
    """

    def denoise(noisy: Images, t: Int[Array, "b"]) -> Images:
        guided = (steps[0] <= t[0]) & (t[0] <= steps[1])  # a solver passes the same t for the whole batch
        return jax.lax.cond(guided, inside, outside, noisy, t)

    return denoise


def threshold(denoise: Denoise, percentile: Float[Array, ""] | None = None) -> Denoise:
    """Bring estimates back into [-1, 1] at every step  (Saharia et al. 2022, Section 2.3).

    Static, without a percentile: clip. Dynamic: divide each image by that percentile (0 … 1) of its absolute values,
    where it is above 1, and clip.
    """

    def thresholded(noisy: Images, t: Int[Array, "b"]) -> Images:
        denoised = denoise(noisy, t)
        if percentile is None:
            return jnp.clip(denoised, -1, 1)
        bound = jnp.maximum(jnp.quantile(jnp.abs(denoised), percentile, axis=(1, 2, 3), keepdims=True), 1)
        return jnp.clip(denoised, -bound, bound) / bound

    return thresholded


def inpaint(denoise: Denoise, image: Images, mask: Bool[Array, "#b h w 1"]) -> Denoise:
    """Sample where the mask is True and keep `image` elsewhere, exactly: the last step, to t = 0, returns the estimate.

    As the estimate is the known image at every step, the solver carries that part along under its own noise, and the
    network always sees it at the noise level of the rest.
    """
    return lambda noisy, t: jnp.where(mask, denoise(noisy, t), image)
