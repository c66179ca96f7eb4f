"""The forward process: how a picture turns into noise, and what each prediction says about it.

A noisy picture at step t is a known mixture,

    noisy = alpha_t * image + sigma_t * noise,     alpha_t^2 + sigma_t^2 = 1,

with t = 0 at the image side (alpha = 1) and t = T at the noise side. alpha_bar_t = alpha_t^2 falls along a squared
cosine (Nichol & Dhariwal 2021, Eq. 17), its betas capped at 0.999, so that alpha_T stays above zero, unless the
schedule is stretched to end there. Given `noisy` and t, the noise (ε), the clean image and the velocity
v = alpha * noise - sigma * image (Salimans & Ho 2022) each determine the other two; the functions below are those
identities, and a network may be trained to predict any of them.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from params import Params

NAME = "cosine"  # recorded in every checkpoint
Prediction = Literal["eps", "v", "x0"]  # what the network predicts: the noise, the velocity, the clean image


class Schedule(NamedTuple):
    """Mixing weights of image and noise at t = 0 … T."""

    alpha: Float[Array, "steps"]
    sigma: Float[Array, "steps"]

    @property
    def T(self) -> int:
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> Float[Array, "steps"]:
        """log(alpha_bar / (1 - alpha_bar)), strictly decreasing in t; +inf at t = 0 (Kingma et al. 2021, Eq. 4)."""
        return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))


def cosine(T: int, *, zero_terminal_snr: bool = False) -> Schedule:
    """The cosine schedule, computed in float64 on the host, kept as float32 [T + 1] (Nichol & Dhariwal, Eq. 17).

    zero_terminal_snr: stretched so that step T holds no image at all, step 1 stays (Lin et al. 2024, Algorithm 1).
    """
    offset = 0.008
    curve = np.cos((np.arange(T + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2
    beta = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
    alpha, sigma = np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar))
    if zero_terminal_snr:
        alpha[1:] = (alpha[1:] - alpha[-1]) * alpha[1] / (alpha[1] - alpha[-1])
        sigma[1:] = np.sqrt((1 - alpha[1:]) * (1 + alpha[1:]))
    return Schedule(jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32))


def from_config(config: Params) -> Schedule:
    """The schedule that a configuration asks for."""
    return cosine(config.T, zero_terminal_snr=config.zero_terminal_snr)


def mix_at(schedule: Schedule, t: Int[Array, "b"]) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    """alpha and sigma at each t, shaped to scale a batch of pictures."""
    return schedule.alpha[t][:, None, None, None], schedule.sigma[t][:, None, None, None]


def add_noise(
    schedule: Schedule, image: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Int[Array, "b"]
) -> Float[Array, "b h w c"]:
    """Diffuse an image to step t: alpha * image + sigma * noise  (Ho et al. 2020, Eq. 4)."""
    alpha, sigma = mix_at(schedule, t)
    return alpha * image + sigma * noise


def denoised_from_eps(
    schedule: Schedule, noisy: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The image that `noisy` holds if its noise is eps: (noisy - sigma * eps) / alpha  (Ho et al. 2020, Eq. 15)."""
    alpha, sigma = mix_at(schedule, t)
    return (noisy - sigma * eps) / alpha


def eps_from_denoised(
    schedule: Schedule, noisy: Float[Array, "b h w c"], denoised: Float[Array, "b h w c"], t: Int[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The noise in `noisy` if its image is denoised: (noisy - alpha * denoised) / sigma; t must be above 0."""
    alpha, sigma = mix_at(schedule, t)
    return (noisy - alpha * denoised) / sigma


def v_from_denoised(
    schedule: Schedule, noisy: Float[Array, "b h w c"], denoised: Float[Array, "b h w c"], t: Int[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The velocity (alpha * noisy - denoised) / sigma; t must be above 0  (Salimans & Ho 2022, Appendix D)."""
    alpha, sigma = mix_at(schedule, t)
    return (alpha * noisy - denoised) / sigma


def denoised_from_v(
    schedule: Schedule, noisy: Float[Array, "b h w c"], v: Float[Array, "b h w c"], t: Int[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The image under velocity v: alpha * noisy - sigma * v  (Salimans & Ho 2022, Appendix D)."""
    alpha, sigma = mix_at(schedule, t)
    return alpha * noisy - sigma * v


def target(
    schedule: Schedule,
    image: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    prediction: Prediction,
) -> Float[Array, "b h w c"]:
    """What a network that predicts `prediction` should say about the mixture of image and noise at step t."""
    alpha, sigma = mix_at(schedule, t)
    return {"eps": noise, "v": alpha * noise - sigma * image, "x0": image}[prediction]


def denoised_from(
    schedule: Schedule,
    noisy: Float[Array, "b h w c"],
    predicted: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    prediction: Prediction,
) -> Float[Array, "b h w c"]:
    """The clean image that a network's output stands for."""
    if prediction == "x0":
        return predicted
    convert = {"eps": denoised_from_eps, "v": denoised_from_v}[prediction]
    return convert(schedule, noisy, predicted, t)
