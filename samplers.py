"""The reverse process: from noise to a picture, seen only through a `denoise` function.

A solver walks down a list of timesteps t_0 > t_1 > … > t_n. All it knows of network, caption and guidance is
`denoise(noisy, t)`, the estimate of the clean image. In λ = log(alpha / sigma) the probability-flow ODE is solved by

    noisy' = (sigma' / sigma) noisy + sigma' ∫ e^λ denoised(λ) dλ        (Lu et al. 2022b, Eq. 8; λ over the step)

so a step needs one thing only: the mean of the estimates over it, under the weight e^λ. Solvers differ in their guess:

    ddim       the estimate at the start of the step                       order 1
    heun       the average of the estimates at start and end               order 2, two evaluations per step
    dpmpp_2m   a line through the last two estimates, at half a step       order 2
    dpmpp_3m   a parabola through the last three, averaged exactly         order 3

Each of them turns stochastic with eta: that share of the noise which a step takes along is forgotten and drawn afresh;
eta = 0 is the ODE, eta = 1 ancestral sampling. To add a solver, write a function and add its line to SOLVERS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from schedule import Schedule

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, "b"]], Float[Array, "b h w c"]]


# Timesteps


def trailing(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """Evenly spaced, the noisiest included (Lin et al. 2024, Table 2)."""
    return np.linspace(schedule.T, 0, steps + 1)[:-1]


def leading(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """Evenly spaced from 1 up; it begins below T, where the picture is not all noise (Lin et al. 2024, Table 2)."""
    return 1 + np.arange(steps)[::-1] * (schedule.T // steps)


def linspace(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """Evenly spaced, both ends included (Lin et al. 2024, Table 2)."""
    return np.linspace(schedule.T, 1, steps)


def log_snr(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """Evenly spaced in log SNR (Lu et al. 2022a, Section 3.4), as far as whole timesteps, each used once, allow."""
    of_t = np.asarray(schedule.log_snr, np.float64)[1:]
    t = 1 + np.abs(of_t[:, None] - np.linspace(of_t[-1], of_t[0], steps)).argmin(axis=0)
    number = np.arange(steps)
    return np.maximum(np.minimum.accumulate(t + number) - number, steps - number)


SPACINGS = {spacing.__name__: spacing for spacing in (trailing, leading, linspace, log_snr)}


def timesteps(schedule: Schedule, spacing: str, steps: int) -> Int[np.ndarray, "n"]:
    """steps + 1 strictly decreasing timesteps, the last of them 0."""
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps = {steps}: allowed are whole numbers from 1 to the {schedule.T} steps of the schedule")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing = {spacing!r}: allowed are {', '.join(SPACINGS)}")
    return np.round(np.append(SPACINGS[spacing](schedule, steps), 0)).astype(np.int32)


# One step


class Stir(NamedTuple):
    """Fresh noise for stochastic solving: a key for each picture, so that none depends on the others in its batch."""

    keys: Key[Array, "b"]
    eta: Float[Array, ""]  # share of the noise that is drawn afresh, 0 … 1
    temperature: Float[Array, ""]  # size of the fresh noise; 1 is the one that the theory asks for


class Steps(NamedTuple):
    """The steps of a walk, one entry each: from t to t_next."""

    number: Int[Array, "n"]
    t: Int[Array, "n"]
    t_next: Int[Array, "n"]
    alpha: Float[Array, "n"]
    sigma: Float[Array, "n"]
    alpha_next: Float[Array, "n"]
    sigma_next: Float[Array, "n"]


def steps_along(schedule: Schedule, timesteps: Int[np.ndarray, "n"]) -> Steps:
    t, t_next = jnp.asarray(timesteps[:-1]), jnp.asarray(timesteps[1:])
    mixes = (part[index] for index in (t, t_next) for part in (schedule.alpha, schedule.sigma))
    return Steps(jnp.arange(len(t)), t, t_next, *mixes)


def widths(schedule: Schedule, timesteps: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n-1"]:
    """Length of each step in λ = log(alpha / sigma); infinite where it ends at t = 0."""
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(np.asarray(schedule.alpha, np.float64)) - np.log(np.asarray(schedule.sigma, np.float64))
    return np.diff(half_log_snr[timesteps])


def advance(
    noisy: Float[Array, "b h w c"], denoised: Float[Array, "b h w c"], step: Steps, stir: Stir
) -> Float[Array, "b h w c"]:
    """One step towards `denoised`, eta of the noise drawn afresh  (Song et al. 2021a, Eq. 12 and 16)."""
    survives = (step.alpha * step.sigma_next) / (step.alpha_next * step.sigma)  # e^-h, h the step's length in λ
    fresh = stir.eta * step.sigma_next * jnp.sqrt(1 - survives**2)
    share = jnp.sqrt(step.sigma_next**2 - fresh**2) / step.sigma
    along = share * noisy + (step.alpha_next - share * step.alpha) * denoised
    keys = jax.vmap(jax.random.fold_in, (0, None))(stir.keys, step.number)
    noise = jax.vmap(lambda key: jax.random.normal(key, noisy.shape[1:]))(keys)
    return along + stir.temperature * fresh * noise


# Solvers: (denoise, schedule, noisy at timesteps[0], timesteps, stir) -> picture, and the estimate at each step


def multistep(
    denoise: Denoise, noisy: Float[Array, "b h w c"], steps: Steps, stir: Stir, weights: Float[np.ndarray, "n k"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "n b h w c"]]:
    """Step towards a weighted sum of the last k estimates, the newest first."""

    def step(carry: tuple, at: tuple[Steps, Float[Array, "k"]]):
        noisy, earlier = carry
        now, weight = at
        estimates = jnp.concatenate([denoise(noisy, jnp.full(len(noisy), now.t))[None], earlier])
        mean = (weight[:, None, None, None, None] * estimates).sum(axis=0)
        return (advance(noisy, mean, now, stir), estimates[:-1]), estimates[0]

    earlier = jnp.zeros((weights.shape[1] - 1, *noisy.shape))
    (image, _), estimates = jax.lax.scan(step, (noisy, earlier), (steps, jnp.asarray(weights, jnp.float32)))
    return image, estimates


def ddim(
    denoise: Denoise, schedule: Schedule, noisy: Float[Array, "b h w c"], timesteps: Int[np.ndarray, "n"], stir: Stir
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """Keep the estimated noise, lower its share (Song et al. 2021a); with eta = 1, DDPM's ancestral sampling."""
    return multistep(denoise, noisy, steps_along(schedule, timesteps), stir, np.ones((len(timesteps) - 1, 1)))


def dpmpp_2m(
    denoise: Denoise, schedule: Schedule, noisy: Float[Array, "b h w c"], timesteps: Int[np.ndarray, "n"], stir: Stir
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """DPM-Solver++(2M)  (Lu et al. 2022b, Algorithm 2); the first step and the one to t = 0 are of first order."""
    h = widths(schedule, timesteps)
    weights = np.zeros((len(h), 2))
    weights[:, 0] = 1
    second = np.flatnonzero(np.isfinite(h[1:])) + 1
    weights[second] += (h[second] / (2 * h[second - 1]))[:, None] * [1, -1]
    return multistep(denoise, noisy, steps_along(schedule, timesteps), stir, weights)


def dpmpp_3m(
    denoise: Denoise, schedule: Schedule, noisy: Float[Array, "b h w c"], timesteps: Int[np.ndarray, "n"], stir: Stir
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """DPM-Solver++(3M): the parabola through the last three estimates, in Newton's form over u = λ - λ_now,

        denoised(u) = D + u f + u (u + h₁) g,     f = [now, before],  g = [now, before, the one before that]

    averaged under e^u over the step: u by its mean m₁, u² by its mean m₂. One order lower at the second step.
    """
    h = widths(schedule, timesteps)
    weights = np.zeros((len(h), 3))
    weights[:, 0] = 1
    for i in np.flatnonzero(np.isfinite(h[1:])) + 1:
        m1 = h[i] / -np.expm1(-h[i]) - 1
        m2 = (h[i] ** 2 - 2 * h[i] - 2 * np.expm1(-h[i])) / -np.expm1(-h[i])
        f = np.array([1, -1, 0]) / h[i - 1]
        weights[i] += m1 * f
        if i > 1:
            g = (f - np.array([0, 1, -1]) / h[i - 2]) / (h[i - 1] + h[i - 2])
            weights[i] += (m2 + h[i - 1] * m1) * g
    return multistep(denoise, noisy, steps_along(schedule, timesteps), stir, weights)


def heun(
    denoise: Denoise, schedule: Schedule, noisy: Float[Array, "b h w c"], timesteps: Int[np.ndarray, "n"], stir: Stir
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """Heun's rule: try the step, estimate again at its end, then take it with the average of both.

    That is Karras et al. 2022, Algorithm 1, on the exponential form above instead of a straight line in sigma / alpha,
    which no step from pure noise could follow. A step to t = 0 is not corrected: 2 steps - 1 evaluations in all.
    """
    still = stir._replace(eta=jnp.zeros(()))

    def step(noisy: Float[Array, "b h w c"], at: Steps):
        start = denoise(noisy, jnp.full(len(noisy), at.t))
        end = jax.lax.cond(
            at.sigma_next > 0,
            lambda: denoise(advance(noisy, start, at, still), jnp.full(len(noisy), at.t_next)),
            lambda: start,
        )
        return advance(noisy, (start + end) / 2, at, stir), start

    return jax.lax.scan(step, noisy, steps_along(schedule, timesteps))


class Solver(NamedTuple):
    solve: Callable
    eta: float  # unless the user says otherwise
    evaluations: Callable[[int], int] = lambda steps: steps  # of `denoise`


SOLVERS = {
    "ddim": Solver(ddim, eta=0.0),
    "ddpm": Solver(ddim, eta=1.0),
    "heun": Solver(heun, eta=0.0, evaluations=lambda steps: 2 * steps - 1),
    "dpmpp_2m": Solver(dpmpp_2m, eta=0.0),
    "dpmpp_2m_sde": Solver(dpmpp_2m, eta=1.0),
    "dpmpp_3m": Solver(dpmpp_3m, eta=0.0),
}


def solver(name: str) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"sampler = {name!r}: allowed are {', '.join(SOLVERS)}")
    return SOLVERS[name]
