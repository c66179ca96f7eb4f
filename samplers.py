"""The reverse process: from noise to a picture, seen only through a `denoise` function.

A sampler walks down a list of timesteps T = t_0 > t_1 > … > t_n = 0. All it knows of network, caption and guidance is
`denoise(noisy, t)`, the estimate of the clean image. Samplers are free functions with one signature; guidance and
thresholding are functions of estimates, applied inside `denoise`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from schedule import Schedule, eps_from_denoised, mix_at

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, "b"]], Float[Array, "b h w c"]]


def trailing(T: int, steps: int) -> Int[np.ndarray, "n"]:
    """steps + 1 timesteps from T down to 0, evenly spaced, the noisiest included (Lin et al. 2024, Table 2)."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps = {steps}: allowed are whole numbers from 1 to the {T} steps of the schedule")
    return np.round(np.linspace(T, 0, steps + 1)).astype(np.int32)


def ddim(
    denoise: Denoise, schedule: Schedule, noise: Float[Array, "b h w c"], timesteps: Int[np.ndarray, "n"]
) -> Float[Array, "b h w c"]:
    """Draw deterministically: keep the estimated noise, lower its share  (Song et al. 2021a, Eq. 12 with sigma = 0)."""

    def step(noisy: Float[Array, "b h w c"], t_and_next: Int[Array, "2"]):
        t, t_next = (jnp.full(len(noisy), each) for each in t_and_next)
        denoised = denoise(noisy, t)
        eps = eps_from_denoised(schedule, noisy, denoised, t)
        alpha, sigma = mix_at(schedule, t_next)
        return alpha * denoised + sigma * eps, None

    pairs = jnp.stack([timesteps[:-1], timesteps[1:]], axis=1)
    return jax.lax.scan(step, noise, pairs)[0]


def guide(
    conditional: Float[Array, "b h w c"], unconditional: Float[Array, "b h w c"], guidance: Float[Array, ""]
) -> Float[Array, "b h w c"]:
    """Move from the unconditional estimate through the conditional one and beyond (Ho & Salimans 2022, Eq. 6).

    guidance 0 is the unconditional estimate, 1 the conditional one.
    """
    return unconditional + guidance * (conditional - unconditional)


def threshold(denoised: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Clip an estimate to the range of pictures: static thresholding  (Saharia et al. 2022, Section 2.3).

    It keeps strong guidance from burning a picture out: what overshoots is held at the border at every step, and the
    next estimate starts from there. The dynamic kind divides each picture by its extremes, which turns the white that
    surrounds an emoji grey.
    """
    return jnp.clip(denoised, -1, 1)
