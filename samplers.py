"""The reverse process: from noise to an image, seen only through a `denoise` function.

A solver goes down a list of timesteps t_0 > t_1 > … > t_n. All it knows of network, caption and guidance is
`denoise(noisy, t)`, the estimate of the clean image. In λ = log(alpha / sigma) the probability-flow ODE is solved by

    noisy' = (sigma' / sigma) noisy + sigma' ∫ e^λ denoised(λ) dλ        (Lu et al. 2022b, Eq. 8; λ over the step)

so a step needs only the mean of denoised over it, weighted by e^λ. The solvers differ in how they estimate that mean:

    ddim       the estimate at the start of the step                       order 1
    heun       a line through the estimates at start and end               order 2, two evaluations per step
    dpmpp_2m   a line through the last two estimates, at half a step       order 2
    dpmpp_3m   a parabola through the last three, averaged exactly         order 3

All have one signature, and all take `step_towards`. eta = 0 solves the ODE, with the orders above. eta = 1 replaces as
much noise in each step as ancestral sampling does: `ddpm` is ddim with it, `dpmpp_2m_sde` is dpmpp_2m with it.

A solver returns the body of its loop, which `take_steps` runs: all steps at once, or some, to look at the images first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from schedule import Schedule

Images = Float[Array, "b h w c"]
Denoise = Callable[[Images, Int[Array, "b"]], Images]
Times = Int[np.ndarray, "n"]


class State(NamedTuple):
    """How far a solver has come; at the end, `noisy` and `denoised` are the image."""

    noisy: Images
    denoised: Images  # the last estimate of the image
    before: Images  # the estimate before that one


def initial_state(noisy: Images) -> State:
    """Before the first step: noise, and no estimates yet."""
    return State(noisy, *jnp.zeros((2, *noisy.shape)))


Loop = tuple[Callable[[State, tuple], State], tuple]  # the next state, given what is known of a step; that of all steps


def step_towards(noisy: Images, denoised: Images, step: "Step", fresh: "FreshNoise") -> Images:
    """One step towards `denoised`, with eta times the fresh noise of ancestral sampling  (Song et al. 2021a, Eq. 16).

    Every solver calls it with its own estimate of the mean of `denoised` over the step. `remaining` is
    sqrt(sigma_next² - new²) / sigma, written so that it loses no digits at eta = 1.
    """
    decay = (step.alpha * step.sigma_next) / (step.alpha_next * step.sigma)  # e^-h
    new = fresh.eta * step.sigma_next * jnp.sqrt((1 - decay) * (1 + decay))
    remaining = step.sigma_next / step.sigma * jnp.sqrt((1 - fresh.eta) * (1 + fresh.eta) + (fresh.eta * decay) ** 2)
    mean = remaining * noisy + (step.alpha_next - remaining * step.alpha) * denoised
    keys = jax.vmap(jax.random.fold_in, (0, None))(fresh.keys, step.number)
    noise = jax.vmap(lambda key: jax.random.normal(key, noisy.shape[1:]))(keys)
    return mean + fresh.temperature * new * noise


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


def timesteps(schedule: Schedule, steps: int) -> Int[np.ndarray, "n"]:
    """steps + 1 evenly spaced timesteps, T the first ("trailing", Lin et al. 2024, Table 2) and 0 the last."""
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps = {steps}: allowed are whole numbers from 1 to the {schedule.T} steps of the schedule")
    return np.round(np.linspace(schedule.T, 0, steps + 1)).astype(np.int32)


def steps_between(schedule: Schedule, timesteps: Times) -> tuple[Step, Float[np.ndarray, "n-1"]]:
    """The steps from each timestep to the next, and their lengths h in λ, infinite where a step ends at t = 0."""
    t, t_next = jnp.asarray(timesteps[:-1]), jnp.asarray(timesteps[1:])
    mixes = (part[index] for index in (t, t_next) for part in (schedule.alpha, schedule.sigma))
    alpha, sigma = (np.asarray(part, np.float64)[timesteps] for part in schedule)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    return Step(jnp.arange(len(t)), t, t_next, *mixes), h


# Solvers, from noise at timesteps[0] to the image at the last timestep


def ddim(denoise: Denoise, schedule: Schedule, timesteps: Times, fresh: FreshNoise) -> Loop:
    """Keep the estimated noise at a lower level (Song et al. 2021a, Eq. 12); eta = 1 is ancestral sampling (DDPM)."""
    steps, _ = steps_between(schedule, timesteps)

    def body(state, step):
        noisy, before, _ = state
        denoised = denoise(noisy, jnp.full(len(noisy), step.t))
        return State(step_towards(noisy, denoised, step, fresh), denoised, before)

    return body, steps


def heun(denoise: Denoise, schedule: Schedule, timesteps: Times, fresh: FreshNoise) -> Loop:
    """Heun's rule: try the step, estimate again at its end, take it with a weighted mean of the two.

    That is Karras et al. 2022, Algorithm 1, on the exponential form above (Cox & Matthews 2002, ETD2RK) instead of a
    straight line in sigma / alpha, which no step from pure noise could follow. A step to t = 0 is not corrected, so n
    steps take 2 n - 1 evaluations.
    """
    steps, h = steps_between(schedule, timesteps)
    share, finite = np.ones(len(h), np.float32), np.isfinite(h)
    share[finite] = means_of_u(h[finite])[0] / h[finite]  # of the estimate at the end
    without_noise = fresh._replace(eta=jnp.zeros(()))

    def body(state, now):
        (noisy, before, _), (step, share) = state, now
        start = denoise(noisy, jnp.full(len(noisy), step.t))
        end = jax.lax.cond(
            step.sigma_next > 0,
            lambda: denoise(step_towards(noisy, start, step, without_noise), jnp.full(len(noisy), step.t_next)),
            lambda: start,
        )
        return State(step_towards(noisy, start + share * (end - start), step, fresh), start, before)

    return body, (steps, jnp.asarray(share))


def dpmpp_2m(denoise: Denoise, schedule: Schedule, timesteps: Times, fresh: FreshNoise) -> Loop:
    """DPM-Solver++(2M)  (Lu et al. 2022b, Algorithm 2); with eta = 1, its SDE variant (Appendix B)."""
    steps, h = steps_between(schedule, timesteps)
    ahead, may = np.zeros(len(h), np.float32), may_extrapolate(h)
    ahead[may] = h[may] / (2 * np.roll(h, 1)[may])  # half a step, in units of the one before: 1 / 2r

    def body(state, now):
        (noisy, before, _), (step, ahead) = state, now
        denoised = denoise(noisy, jnp.full(len(noisy), step.t))
        middle = denoised + ahead * (denoised - before)  # (1 + 1/2r) x_i - 1/2r x_(i-1), line 8
        return State(step_towards(noisy, middle, step, fresh), denoised, before)

    return body, (steps, jnp.asarray(ahead))


def dpmpp_3m(denoise: Denoise, schedule: Schedule, timesteps: Times, fresh: FreshNoise) -> Loop:
    """DPM-Solver++(3M): a parabola through the last three estimates D, D₁, D₂, in Newton's form over u = λ - λ_now,

        denoised(u) = D + u [D, D₁] + u (u + h₁) [D, D₁, D₂]        (divided differences; h₁, h₂ the steps before)

    and its mean under e^u over the step. One order lower where there are only two estimates.
    """
    steps, h = steps_between(schedule, timesteps)
    h1, h2 = np.roll(h, 1), np.roll(h, 2)
    linear, parabolic, may = np.zeros(len(h)), np.zeros(len(h)), may_extrapolate(h)
    linear[may], _ = means_of_u(h[may])
    may[:2] = False
    u, u2 = means_of_u(h[may])
    parabolic[may] = u2 + h1[may] * u

    def body(state, now):
        (noisy, d1, d2), (step, (h1, h2, linear, parabolic)) = state, now
        d = denoise(noisy, jnp.full(len(noisy), step.t))
        slope, slope_before = (d - d1) / h1, (d1 - d2) / h2
        mean = d + linear * slope + parabolic * (slope - slope_before) / (h1 + h2)
        return State(step_towards(noisy, mean, step, fresh), d, d1)

    weights = np.stack([h1, h2, linear, parabolic], axis=1)
    return body, (steps, jnp.asarray(weights, jnp.float32))


def may_extrapolate(h: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether a solver may use earlier estimates in each step, given the lengths of the steps in λ: not in the first,
    not in one to t = 0, whose length is infinite, and not in one over twice as long as the step before.
    """
    return np.isfinite(h) & (h <= 2 * np.append(0, h[:-1]))


def means_of_u(h: Float[np.ndarray, "n"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The means of u and of u² over 0 … h, weighted by e^u."""
    return h / -np.expm1(-h) - 1, (h**2 - 2 * h - 2 * np.expm1(-h)) / -np.expm1(-h)


class Solver(NamedTuple):
    loop: Callable[[Denoise, Schedule, Times, FreshNoise], Loop]
    eta: float  # unless the user says otherwise

    def solve(self, denoise: Denoise, schedule: Schedule, noisy: Images, timesteps: Times, fresh: FreshNoise) -> State:
        """From `noisy` at timesteps[0] to the image at the last timestep."""
        return take_steps(self.loop(denoise, schedule, timesteps, fresh), initial_state(noisy), 0, len(timesteps) - 1)


def take_steps(loop: Loop, state: State, done: Int[Array, ""] | int, until: Int[Array, ""] | int) -> State:
    """Take the steps from number `done` up to, but not including, `until`."""
    body, steps = loop

    def step(number: Int[Array, ""], state: State) -> State:
        return body(state, jax.tree.map(lambda each: each[number], steps))

    return jax.lax.fori_loop(done, until, step, state)


SOLVERS = {  # a new one also needs its name in params.Sampler
    "ddim": Solver(ddim, eta=0.0),
    "ddpm": Solver(ddim, eta=1.0),
    "heun": Solver(heun, eta=0.0),
    "dpmpp_2m": Solver(dpmpp_2m, eta=0.0),
    "dpmpp_2m_sde": Solver(dpmpp_2m, eta=1.0),
    "dpmpp_3m": Solver(dpmpp_3m, eta=0.0),
}
