"""The forward process: how an image turns into noise, and what each kind of prediction says about it.

At step t a noisy image is the mixture

    noisy = alpha * image + sigma * noise,        alpha² + sigma² = 1,        noise ~ N(0, I).

Step 0 is the image (alpha = 1), step T is the noise side. alpha_bar = alpha² falls along a squared cosine (Nichol &
Dhariwal 2021, Eq. 17); betas are capped at 0.999, so alpha stays above 0 at T, unless the schedule is rescaled to zero
terminal SNR. Given noisy and t, each of the image, the noise (eps) and the velocity v = alpha * noise - sigma * image
(Salimans & Ho 2022) determines the other two, so a network may be trained to predict any of them.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from params import Params

NAME = "cosine"  # recorded in every checkpoint
Prediction = Literal["eps", "v", "x0"]  # what the network predicts: the noise, the velocity, the clean image

Image = Float[Array, "b h w c"]
Steps = Int[Array, "b"]  # t of each image, 0 to T
Weight = Float[Array, "b 1 1 1"]


class Schedule(NamedTuple):
    """The weights of image and noise at each step from 0 to T."""

    alpha: Float[Array, "steps"]
    sigma: Float[Array, "steps"]

    @property
    def T(self) -> int:
        return len(self.alpha) - 1


def cosine(T: int, *, zero_terminal_snr: bool = False) -> Schedule:
    """The cosine schedule (Nichol & Dhariwal 2021, Eq. 17), computed in float64 and stored as float32.

    zero_terminal_snr: rescale alpha to 0 at step T, leaving step 1 as it is (Lin et al. 2024, Algorithm 1).
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
    """The schedule of a configuration."""
    return cosine(config.T, zero_terminal_snr=config.zero_terminal_snr)


def mix_at(schedule: Schedule, t: Steps) -> tuple[Weight, Weight]:
    """alpha and sigma at step t, shaped to multiply a batch of images."""
    return schedule.alpha[t][:, None, None, None], schedule.sigma[t][:, None, None, None]


def add_noise(schedule: Schedule, image: Image, noise: Image, t: Steps) -> Image:
    """Diffuse an image to step t: alpha * image + sigma * noise  (Ho et al. 2020, Eq. 4)."""
    alpha, sigma = mix_at(schedule, t)
    return alpha * image + sigma * noise


def target(schedule: Schedule, image: Image, noise: Image, t: Steps, prediction: Prediction) -> Image:
    """What a network that predicts `prediction` should return for add_noise(schedule, image, noise, t)."""
    alpha, sigma = mix_at(schedule, t)
    return {"eps": noise, "v": alpha * noise - sigma * image, "x0": image}[prediction]


def denoised_from(schedule: Schedule, noisy: Image, predicted: Image, t: Steps, prediction: Prediction) -> Image:
    """The clean image that the network's output stands for; the inverse of `target`."""
    alpha, sigma = mix_at(schedule, t)
    if prediction == "eps":
        return (noisy - sigma * predicted) / alpha  # Ho et al. 2020, Eq. 15
    if prediction == "v":
        return alpha * noisy - sigma * predicted  # Salimans & Ho 2022, Appendix D
    return predicted
