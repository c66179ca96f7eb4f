"""The reverse process: from noise to a picture, seen only through a `denoise` function.

A solver walks down a list of timesteps t_0 > t_1 > … > t_n. All it knows of network, caption and guidance is
`denoise(noisy, t)`, the estimate of the clean image. In λ = log(alpha / sigma) the probability-flow ODE is solved by

    noisy' = (sigma' / sigma) noisy + sigma' ∫ e^λ denoised(λ) dλ        (Lu et al. 2022b, Eq. 8; λ over the step)

so a step needs one thing only: the mean of the estimates over it, under the weight e^λ. Solvers differ in their guess:

    ddim       the estimate at the start of the step                       order 1
    heun       a line through the estimates at start and end               order 2, two evaluations per step
    dpmpp_2m   a line through the last two estimates, at half a step       order 2
    dpmpp_3m   a parabola through the last three, averaged exactly         order 3

Each of them turns stochastic with eta: 0 solves the ODE, from the same noise to the same picture; 1 forgets as much of
the noise at each step, and draws it afresh, as ancestral sampling does. The orders are those of the ODE.

To add a solver, write a function and add its line to SOLVERS.
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
    """Evenly spaced from 1 up; it begins below T, where a picture is not all noise (Lin et al. 2024, Table 2)."""
    return 1 + np.arange(steps)[::-1] * schedule.T / steps


def linspace(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """Evenly spaced, both ends included (Lin et al. 2024, Table 2)."""
    return np.linspace(schedule.T, 1, steps)


def log_snr(schedule: Schedule, steps: int) -> Num[np.ndarray, "n"]:
    """From T, then evenly spaced in log SNR (Lu et al. 2022a, Section 3.4), as far as whole timesteps allow.

    It counts from -10 up: below that a picture is nothing but noise.
    """
    of_t = np.asarray(schedule.log_snr, np.float64)[1:]
    wanted = np.linspace(max(of_t[-1], -10), of_t[0], steps)
    t = 1 + np.abs(of_t[:, None] - wanted).argmin(axis=0)
    t[0], number = schedule.T, np.arange(steps)
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


class FreshNoise(NamedTuple):
    """Noise for stochastic solving: a key for each picture, so that none depends on the others in its batch."""

    keys: Key[Array, "b"]
    eta: Float[Array, ""]  # 0: none; 1: as much as ancestral sampling
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
    noisy: Float[Array, "b h w c"], denoised: Float[Array, "b h w c"], step: Steps, fresh: FreshNoise
) -> Float[Array, "b h w c"]:
    """One step towards `denoised`, eta times the noise of ancestral sampling drawn afresh  (Song et al. 2021a, Eq. 16).

    The share of `noisy` that is left is sqrt(sigma'² - new²) / sigma, here in a form that loses no digits at eta = 1.
    """
    survives = (step.alpha * step.sigma_next) / (step.alpha_next * step.sigma)  # e^-h, h the step's length in λ
    new = fresh.eta * step.sigma_next * jnp.sqrt((1 - survives) * (1 + survives))
    left = step.sigma_next / step.sigma * jnp.sqrt((1 - fresh.eta) * (1 + fresh.eta) + (fresh.eta * survives) ** 2)
    along = left * noisy + (step.alpha_next - left * step.alpha) * denoised
    keys = jax.vmap(jax.random.fold_in, (0, None))(fresh.keys, step.number)
    noise = jax.vmap(lambda key: jax.random.normal(key, noisy.shape[1:]))(keys)
    return along + fresh.temperature * new * noise


# Solvers: (denoise, schedule, noisy at timesteps[0], timesteps, fresh) -> picture, and the estimate at each step


def multistep(
    denoise: Denoise, noisy: Float[Array, "b h w c"], steps: Steps, fresh: FreshNoise, weights: Float[np.ndarray, "n k"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "n b h w c"]]:
    """Step towards a weighted sum of the last k estimates, the newest first."""

    def step(carry: tuple, at: tuple[Steps, Float[Array, "k"]]):
        noisy, earlier = carry
        now, weight = at
        estimates = jnp.concatenate([denoise(noisy, jnp.full(len(noisy), now.t))[None], earlier])
        mean = (weight[:, None, None, None, None] * estimates).sum(axis=0)
        return (advance(noisy, mean, now, fresh), estimates[:-1]), estimates[0]

    earlier = jnp.zeros((weights.shape[1] - 1, *noisy.shape))
    (image, _), estimates = jax.lax.scan(step, (noisy, earlier), (steps, jnp.asarray(weights, jnp.float32)))
    return image, estimates


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, "n"],
    fresh: FreshNoise,
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """Keep the estimated noise, lower its share (Song et al. 2021a); with eta = 1, DDPM's ancestral sampling."""
    return multistep(denoise, noisy, steps_along(schedule, timesteps), fresh, np.ones((len(timesteps) - 1, 1)))


def extrapolated(h: Float[np.ndarray, "n"]) -> list[int]:
    """The steps that may look ahead: not the first, not one to t = 0, none over twice as long as the one before it."""
    return [i for i in range(1, len(h)) if h[i] <= 2 * h[i - 1] and np.isfinite(h[i])]


def dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, "n"],
    fresh: FreshNoise,
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """DPM-Solver++(2M)  (Lu et al. 2022b, Algorithm 2); with eta = 1, its SDE variant (Appendix B)."""
    h = widths(schedule, timesteps)
    weights = np.zeros((len(h), 2))
    weights[:, 0] = 1
    for i in extrapolated(h):
        weights[i] += h[i] / (2 * h[i - 1]) * np.array([1, -1])
    return multistep(denoise, noisy, steps_along(schedule, timesteps), fresh, weights)


def mean_under_exp(h: float) -> float:
    """The mean of u over 0 … h under the weight e^u."""
    return h / -np.expm1(-h) - 1


def dpmpp_3m(
    denoise: Denoise,
    schedule: Schedule,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, "n"],
    fresh: FreshNoise,
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """DPM-Solver++(3M): the parabola through the last three estimates, in Newton's form over u = λ - λ_now,

        denoised(u) = D + u f + u (u + h₁) g,     f = [now, before],  g = [now, before, the one before that]

    averaged under e^u over the step, as the ODE asks: u by its mean m₁, u² by its mean m₂. One order lower where there
    are only two estimates.
    """
    h = widths(schedule, timesteps)
    weights = np.zeros((len(h), 3))
    weights[:, 0] = 1
    for i in extrapolated(h):
        m1 = mean_under_exp(h[i])
        f = np.array([1, -1, 0]) / h[i - 1]
        weights[i] += m1 * f
        if i > 1:
            m2 = (h[i] ** 2 - 2 * h[i] - 2 * np.expm1(-h[i])) / -np.expm1(-h[i])
            g = (f - np.array([0, 1, -1]) / h[i - 2]) / (h[i - 1] + h[i - 2])
            weights[i] += (m2 + h[i - 1] * m1) * g
    return multistep(denoise, noisy, steps_along(schedule, timesteps), fresh, weights)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[np.ndarray, "n"],
    fresh: FreshNoise,
) -> tuple[Float[Array, "b h w c"], Float[Array, "n-1 b h w c"]]:
    """Heun's rule: try the step, estimate again at its end, then take it with the mean of the line between the two.

    That is Karras et al. 2022, Algorithm 1, on the exponential form above (Cox & Matthews 2002, ETD2RK) instead of a
    straight line in sigma / alpha, which no step from pure noise could follow. A step to t = 0 is not corrected, so n
    steps take 2 n - 1 evaluations.
    """
    h = widths(schedule, timesteps)
    at_end = jnp.asarray([mean_under_exp(each) / each if np.isfinite(each) else 1.0 for each in h], jnp.float32)
    still = fresh._replace(eta=jnp.zeros(()))

    def step(noisy: Float[Array, "b h w c"], at: tuple[Steps, Float[Array, ""]]):
        now, share = at
        start = denoise(noisy, jnp.full(len(noisy), now.t))
        end = jax.lax.cond(
            now.sigma_next > 0,
            lambda: denoise(advance(noisy, start, now, still), jnp.full(len(noisy), now.t_next)),
            lambda: start,
        )
        return advance(noisy, start + share * (end - start), now, fresh), start

    return jax.lax.scan(step, noisy, (steps_along(schedule, timesteps), at_end))


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
