"""The reverse process: from noise to an image, seen only through a `denoise` function.

A solver goes down a list of timesteps t_0 > t_1 > … > t_n. All it knows of network, caption and guidance is
`denoise(noisy, t)`, the estimate of the clean image. In λ = log(alpha / sigma) the probability-flow ODE is solved by

    noisy' = (sigma' / sigma) noisy + sigma' ∫ e^λ denoised(λ) dλ        (Lu et al. 2022b, Eq. 8; λ over the step)

so a step needs only the mean of denoised over it, weighted by e^λ. The solvers differ in how they estimate that mean:

    ddim       the estimate at the start of the step                       order 1
    heun       a line through the estimates at start and end               order 2, two evaluations per step
    dpmpp_2m   a line through the last two estimates, at half a step       order 2
    dpmpp_3m   a parabola through the last three, averaged exactly         order 3

Each mean is a sum of estimates, with weights that depend on the lengths of the steps alone. So a solver has two parts:
the weights of all steps, which NumPy computes beforehand in float64, and a function that takes a step, `multistep` or
`heun`, both by `step_towards`. eta = 0 solves the ODE, with the orders above. eta = 1 replaces as much noise in each
step as ancestral sampling does: `ddpm` is ddim with it, `dpmpp_2m_sde` is dpmpp_2m with it.

`take_steps` takes all steps at once, or some, to look at the images first.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from schedule import Schedule

Images = Float[Array, "b h w c"]
Denoise = Callable[[Images, Int[Array, "b"]], Images]
Lengths = Float[np.ndarray, "n"]  # of the steps, in λ; infinite from pure noise and to t = 0
Weights = Float[np.ndarray, "n 2"]


class State(NamedTuple):
    """How far a solver has come; at the end, `noisy` and `denoised` are the image."""

    noisy: Images
    denoised: Images  # the last estimate of the image
    before: Images  # the estimate before that one


def initial_state(noisy: Images) -> State:
    """Before the first step: noise, and no estimates yet."""
    return State(noisy, *jnp.zeros((2, *noisy.shape)))


class FreshNoise(NamedTuple):
    """The noise of stochastic sampling: a key for each image, so that none depends on the others in its batch."""

    keys: Key[Array, "b"]
    eta: Float[Array, ""]  # 0: none; 1: as much as ancestral sampling
    temperature: Float[Array, ""]  # size of the fresh noise; 1 is what the theory asks for


class Step(NamedTuple):
    """A step from t to t_next; a solver loops over a Step that holds arrays of all n of them."""

    number: Int[Array, "*n"]
    t: Int[Array, "*n"]
    t_next: Int[Array, "*n"]
    alpha: Float[Array, "*n"]
    sigma: Float[Array, "*n"]
    alpha_next: Float[Array, "*n"]
    sigma_next: Float[Array, "*n"]
    weights: Float[Array, "*n 2"]  # of differences of estimates, in the mean over the step


# How a step is taken, from noise at t to less noise at t_next


def step_towards(noisy: Images, denoised: Images, step: Step, fresh: FreshNoise) -> Images:
    """One step towards `denoised`, with eta times the fresh noise of ancestral sampling  (Song et al. 2021a, Eq. 16).

    `denoised` is a solver's estimate of its mean over the step. `new` is the size of the fresh noise, `remaining` the
    share of the old noise that stays, sqrt(sigma_next² - new²) / sigma, written so that no digits are lost at eta = 1.
    """
    decay = (step.alpha * step.sigma_next) / (step.alpha_next * step.sigma)  # e^-h
    new = fresh.eta * step.sigma_next * jnp.sqrt((1 - decay) * (1 + decay))
    remaining = step.sigma_next / step.sigma * jnp.sqrt((1 - fresh.eta) * (1 + fresh.eta) + (fresh.eta * decay) ** 2)
    mean = remaining * noisy + (step.alpha_next - remaining * step.alpha) * denoised
    keys = jax.vmap(jax.random.fold_in, (0, None))(fresh.keys, step.number)
    noise = jax.vmap(lambda key: jax.random.normal(key, noisy.shape[1:]))(keys)
    return mean + fresh.temperature * new * noise


def multistep(denoise: Denoise, fresh: FreshNoise, state: State, step: Step) -> State:
    """From the estimates D, D₁, D₂, this one and the last two, take D + a (D - D₁) + b (D₁ - D₂)."""
    noisy, d1, d2 = state
    d = denoise(noisy, jnp.full(len(noisy), step.t))
    a, b = step.weights
    mean = d + a * (d - d1) + b * (d1 - d2)
    return State(step_towards(noisy, mean, step, fresh), d, d1)


def heun(denoise: Denoise, fresh: FreshNoise, state: State, step: Step) -> State:
    """Heun's rule: try the step, estimate again at its end, take it with a weighted mean of the two.

    That is Karras et al. 2022, Algorithm 1, on the exponential form above (Cox & Matthews 2002, ETD2RK) instead of a
    straight line in sigma / alpha, which no step from pure noise could follow. A step to t = 0 is not corrected, so n
    steps take 2 n - 1 evaluations.
    """
    (noisy, before, _), (share, _) = state, step.weights
    without_noise = fresh._replace(eta=jnp.zeros(()))
    start = denoise(noisy, jnp.full(len(noisy), step.t))
    end = jax.lax.cond(
        step.sigma_next > 0,
        lambda: denoise(step_towards(noisy, start, step, without_noise), jnp.full(len(noisy), step.t_next)),
        lambda: start,
    )
    return State(step_towards(noisy, start + share * (end - start), step, fresh), start, before)


# Which steps there are, and their weights


def timesteps(schedule: Schedule, steps: int) -> Int[np.ndarray, "n"]:
    """steps + 1 evenly spaced timesteps, T the first ("trailing", Lin et al. 2024, Table 2) and 0 the last."""
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps = {steps}: allowed are whole numbers from 1 to the {schedule.T} steps of the schedule")
    return np.round(np.linspace(schedule.T, 0, steps + 1)).astype(np.int32)


def ddim(h: Lengths) -> Weights:
    """Keep the estimated noise at a lower level (Song et al. 2021a, Eq. 12); eta = 1 is ancestral sampling (DDPM)."""
    return np.zeros((len(h), 2))


def heun_weights(h: Lengths) -> Weights:
    """A line from start to end, averaged exactly; of an infinite step the end alone counts."""
    weights, finite = np.ones((len(h), 2)), np.isfinite(h)
    weights[finite, 0] = means_of_u(h[finite])[0] / h[finite]
    return weights


def dpmpp_2m(h: Lengths) -> Weights:
    """DPM-Solver++(2M)  (Lu et al. 2022b, Algorithm 2); with eta = 1, its SDE variant (Appendix B)."""
    weights, may = np.zeros((len(h), 2)), may_extrapolate(h)
    weights[may, 0] = h[may] / (2 * np.roll(h, 1)[may])  # (1 + 1/2r) D - 1/2r D₁, line 8
    return weights


def dpmpp_3m(h: Lengths) -> Weights:
    """DPM-Solver++(3M): a parabola through the last three estimates D, D₁, D₂, in Newton's form over u = λ - λ_now,

        denoised(u) = D + u [D, D₁] + u (u + h₁) [D, D₁, D₂]                  h₁, h₂: the steps before
        [D, D₁] = (D - D₁) / h₁        [D, D₁, D₂] = ([D, D₁] - [D₁, D₂]) / (h₁ + h₂)

    and its mean under e^u over the step. One order lower where there are only two estimates.
    """
    weights, may = np.zeros((len(h), 2)), may_extrapolate(h)
    weights[may, 0] = means_of_u(h[may])[0] / np.roll(h, 1)[may]
    may[:2] = False
    h1, h2, (u, u2) = np.roll(h, 1)[may], np.roll(h, 2)[may], means_of_u(h[may])
    parabola = (u2 + h1 * u) / (h1 + h2)
    weights[may, 0] += parabola / h1
    weights[may, 1] = -parabola / h2
    return weights


def may_extrapolate(h: Lengths) -> Bool[np.ndarray, "n"]:
    """Whether a solver may use earlier estimates in each step, given the lengths of the steps in λ: not in the first,
    not in one to t = 0, whose length is infinite, and not in one over twice as long as the step before.
    """
    return np.isfinite(h) & (h <= 2 * np.append(0, h[:-1]))


def means_of_u(h: Lengths) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The means of u and of u² over 0 … h, weighted by e^u."""
    return h / -np.expm1(-h) - 1, (h**2 - 2 * h - 2 * np.expm1(-h)) / -np.expm1(-h)


class Solver(NamedTuple):
    take: Callable[[Denoise, FreshNoise, State, Step], State]  # takes a step
    weights: Callable[[Lengths], Weights]
    eta: float  # unless the user says otherwise

    def plan(self, schedule: Schedule, timesteps: Int[np.ndarray, "n"]) -> Step:
        """The steps from each timestep to the next; filled up to T, so that one compiled loop takes any number."""
        alpha, sigma = (part[timesteps] for part in jax.device_get(schedule))
        with np.errstate(divide="ignore"):
            h = np.diff(np.log(alpha.astype(np.float64)) - np.log(sigma.astype(np.float64)))
        number, t, t_next = np.arange(len(h)), timesteps[:-1], timesteps[1:]
        steps = Step(number, t, t_next, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], self.weights(h))
        return jax.device_put(jax.tree.map(lambda each: np.resize(each, (schedule.T, *each.shape[1:])), steps))

    def solve(
        self, denoise: Denoise, schedule: Schedule, noisy: Images, timesteps: Int[np.ndarray, "n"], fresh: FreshNoise
    ) -> State:
        """From `noisy` at timesteps[0] to the image at the last timestep."""
        take, steps = partial(self.take, denoise, fresh), self.plan(schedule, timesteps)
        return take_steps(take, steps, initial_state(noisy), 0, len(timesteps) - 1)


def take_steps(
    take: Callable[[State, Step], State], steps: Step, state: State, done: Int[Array, ""] | int,
    until: Int[Array, ""] | int,
) -> State:  # fmt: skip
    """Take the steps from number `done` up to, but not including, `until`."""
    return jax.lax.fori_loop(
        done, until, lambda number, state: take(state, jax.tree.map(lambda each: each[number], steps)), state
    )


SOLVERS = {  # a new one also needs its name in params.SolverName
    "ddim": Solver(multistep, ddim, eta=0.0),
    "ddpm": Solver(multistep, ddim, eta=1.0),
    "heun": Solver(heun, heun_weights, eta=0.0),
    "dpmpp_2m": Solver(multistep, dpmpp_2m, eta=0.0),
    "dpmpp_2m_sde": Solver(multistep, dpmpp_2m, eta=1.0),
    "dpmpp_3m": Solver(multistep, dpmpp_3m, eta=0.0),
}
