"""Solvers against Gaussian data, for which the denoiser and the whole way from noise to picture are known exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import samplers
import schedule as schedules
from samplers import SOLVERS, FreshNoise, timesteps

M, S = 0.3, 0.5  # mean and standard deviation of the data
SCHEDULE = schedules.cosine(1000)
FINE = schedules.cosine(20_000)
ZERO = schedules.cosine(1000, zero_terminal_snr=True)
NOISE = jax.random.normal(jax.random.key(0), (2, 3, 5, 1))
SIX = timesteps(SCHEDULE, 6)
COMPILED = {}  # most of the time goes into compiling


def denoiser(schedule, S=S):
    """E[image | noisy] for image ~ N(M, S²)."""

    def denoise(noisy, t):
        alpha, sigma = schedules.mix_at(schedule, t)
        return M + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (noisy - alpha * M)

    return denoise


def on_the_curve(schedule, t, z, S=S):
    """Where the ODE's solution through the z-th standard deviation of the data is at t."""
    alpha, sigma = np.float64(schedule.alpha[t]), np.float64(schedule.sigma[t])
    return alpha * M + np.sqrt(alpha**2 * S**2 + sigma**2) * z


def fresh(batch=1, eta=0.0, temperature=1.0, seed=0):
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(batch))
    return FreshNoise(keys, jnp.float32(eta), jnp.float32(temperature))


def state_after(name, noisy, along, schedule=SCHEDULE, denoise=None, **freshness):
    solver, asked = SOLVERS[name].solve, denoise or denoiser(schedule)
    key = (solver, along.tobytes(), id(schedule), denoise)
    if key not in COMPILED:
        COMPILED[key] = jax.jit(lambda noisy, fresh: solver(asked, schedule, noisy, along, fresh)), schedule
    return COMPILED[key][0](noisy, fresh(len(noisy), **freshness))


def solve(*arguments, **freshness):
    return state_after(*arguments, **freshness).noisy


def lambdas(schedule):
    """λ = log(alpha / sigma) at each step, infinite at t = 0."""
    with np.errstate(divide="ignore"):
        return np.subtract(*(np.log(np.asarray(part, np.float64)) for part in schedule))


def error(name, steps):
    """Distance to the exact end of the ODE, for data of several widths, from log SNR -6 to 4 in equal steps."""
    along = np.interp(np.linspace(-3, 2, steps + 1), lambdas(FINE)[:0:-1], np.arange(20_000, 0, -1))
    along = np.round(along).astype(np.int32)
    widths = np.array([[[[0.1, 0.3, 0.6, 1.5]]]])
    noisy = jnp.asarray(on_the_curve(FINE, along[0], 1.0, widths), jnp.float32)
    drawn = solve(name, noisy, along, FINE, denoiser(FINE, jnp.asarray(widths, jnp.float32)))
    return np.linalg.norm(drawn - on_the_curve(FINE, along[-1], 1.0, widths))


@pytest.mark.parametrize(("name", "order", "steps"), [
    ("ddim", 1, (64, 128)), ("dpmpp_2m", 2, (32, 64)), ("heun", 2, (32, 64)), ("dpmpp_3m", 3, (24, 48)),
])  # fmt: skip
def test_halving_the_step_shows_the_order(name, order, steps):
    errors = [error(name, n) for n in steps]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.35)


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO], ids=["", "zero SNR"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_whole_way_from_noise_ends_where_it_should(name, schedule):
    along = timesteps(schedule, 100)
    noisy = jnp.full((1, 1, 1, 1), on_the_curve(schedule, 1000, 1.0), jnp.float32)
    assert abs(float(solve(name, noisy, along, schedule, eta=0.0)[0, 0, 0, 0]) - (M + S)) < (
        0.02 if "dd" in name else 0.005
    )


def test_ddim_follows_equation_12_step_by_step():
    noise, along = NOISE, SIX
    x = np.asarray(noise, np.float64)
    alpha_bar = np.asarray(SCHEDULE.alpha, np.float64) ** 2
    for t, s in itertools.pairwise(along):
        denoised = np.asarray(denoiser(SCHEDULE)(jnp.asarray(x, jnp.float32), jnp.full(2, t)), np.float64)
        eps = (x - np.sqrt(alpha_bar[t]) * denoised) / np.sqrt(1 - alpha_bar[t])
        x = np.sqrt(alpha_bar[s]) * denoised + np.sqrt(1 - alpha_bar[s]) * eps
    np.testing.assert_allclose(solve("ddim", noise, along), x, rtol=1e-4, atol=1e-5)


def test_ddpm_follows_the_posterior_of_ho_et_al_step_by_step():
    """Ho et al. 2020, Eq. 6 and 7, for steps that skip timesteps; the fresh noise is that of each picture's key."""
    noise, along = NOISE, SIX
    keys = fresh(2).keys
    x = np.asarray(noise, np.float64)
    alpha_bar = np.asarray(SCHEDULE.alpha, np.float64) ** 2
    for number, (t, s) in enumerate(itertools.pairwise(along)):
        denoised = np.asarray(denoiser(SCHEDULE)(jnp.asarray(x, jnp.float32), jnp.full(2, t)), np.float64)
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        mean = np.sqrt(alpha_bar[s]) * beta / (1 - alpha_bar[t]) * denoised
        mean += np.sqrt(1 - beta) * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * x
        drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, number), (3, 5, 1)) for key in keys])
        x = mean + np.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]) * beta) * np.asarray(drawn)
    np.testing.assert_allclose(solve("ddpm", noise, along, eta=1.0), x, rtol=1e-3, atol=1e-4)


def test_ddim_with_eta_follows_equation_16_step_by_step():
    noise, along = NOISE, SIX
    keys, eta = fresh(2).keys, 0.6
    x = np.asarray(noise, np.float64)
    alpha_bar = np.asarray(SCHEDULE.alpha, np.float64) ** 2
    for number, (t, s) in enumerate(itertools.pairwise(along)):
        denoised = np.asarray(denoiser(SCHEDULE)(jnp.asarray(x, jnp.float32), jnp.full(2, t)), np.float64)
        eps = (x - np.sqrt(alpha_bar[t]) * denoised) / np.sqrt(1 - alpha_bar[t])
        size = eta * np.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / alpha_bar[s]))
        drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, number), (3, 5, 1)) for key in keys])
        x = np.sqrt(alpha_bar[s]) * denoised + np.sqrt(1 - alpha_bar[s] - size**2) * eps + size * np.asarray(drawn)
    np.testing.assert_allclose(solve("ddim", noise, along, eta=eta), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ode", "sde"])
def test_dpmpp_2m_follows_its_paper_step_by_step(eta):
    """Lu et al. 2022b, Algorithm 2, and the SDE variant of Appendix B."""
    noise, along = NOISE, SIX
    alpha, sigma = (np.asarray(part, np.float64) for part in (SCHEDULE.alpha, SCHEDULE.sigma))
    keys, x, earlier, h_before = fresh(2).keys, np.asarray(noise, np.float64), None, None
    for number, (t, s) in enumerate(itertools.pairwise(along)):
        denoised = np.asarray(denoiser(SCHEDULE)(jnp.asarray(x, jnp.float32), jnp.full(2, t)), np.float64)
        if s == 0:
            x = denoised
            break
        h = np.log(alpha[s] / sigma[s]) - np.log(alpha[t] / sigma[t])
        mean = denoised if earlier is None else (1 + h / h_before / 2) * denoised - h / h_before / 2 * earlier
        if eta:
            drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, number), (3, 5, 1)) for key in keys])
            x = sigma[s] / sigma[t] * np.exp(-h) * x + alpha[s] * (1 - np.exp(-2 * h)) * mean
            x += sigma[s] * np.sqrt(1 - np.exp(-2 * h)) * np.asarray(drawn)
        else:
            x = sigma[s] / sigma[t] * x - alpha[s] * (np.exp(-h) - 1) * mean
        earlier, h_before = denoised, h
    np.testing.assert_allclose(solve("dpmpp_2m", noise, along, eta=eta), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("T", [7, 1000])
def test_ancestral_steps_of_any_length_are_finite(T):
    schedule = schedules.cosine(T)
    steps = SOLVERS["ddpm"].plan(schedule, np.arange(T, -1, -1))
    from_T = samplers.Step(*(jnp.full_like(part, part[0]) for part in steps))._replace(
        alpha_next=steps.alpha_next, sigma_next=steps.sigma_next
    )
    image = jnp.ones((1, 1, 1, 1))
    ends = jax.jit(jax.vmap(lambda step: samplers.step_towards(image, image, step, fresh(eta=1.0))))(from_T)
    assert np.isfinite(ends).all()


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_3m"])
@pytest.mark.parametrize(
    "along", [timesteps(SCHEDULE, 10), np.array([1000, 990, 500, 490, 20, 10, 0], np.int32)], ids=len
)
def test_few_steps_are_no_worse_than_ddim(name, along):
    """A long step after a short one must not be extrapolated over."""
    noisy = jnp.asarray(on_the_curve(SCHEDULE, along[0], np.ones((1, 1, 1, 1))), jnp.float32)
    errors = [abs(float(solve(each, noisy, along)[0, 0, 0, 0]) - M - S) for each in (name, "ddim")]
    assert errors[0] < 1.1 * errors[1]


def test_dpmpp_3m_integrates_a_parabola_exactly():
    """Where denoised is a parabola in λ, the third step is Lu et al. 2022b, Eq. 8, the integral by quadrature."""
    lam = lambdas(SCHEDULE)

    def parabola(noisy, t):
        u = jnp.asarray(lam, jnp.float32)[t][:, None, None, None]
        return 0.3 - 0.2 * u + 0.1 * u**2 + 0 * noisy

    along = np.array([900, 700, 560, 300])
    noisy = jnp.ones((1, 1, 1, 1))
    before, after = (float(solve("dpmpp_3m", noisy, along[:n], denoise=parabola)[0, 0, 0, 0]) for n in (3, 4))
    sigma = np.asarray(SCHEDULE.sigma, np.float64)
    u = np.linspace(lam[560], lam[300], 100_001)
    integral = np.trapezoid(np.exp(u) * (0.3 - 0.2 * u + 0.1 * u**2), u)
    np.testing.assert_allclose(after, sigma[300] / sigma[560] * before + sigma[300] * integral, rtol=1e-5)


@pytest.mark.parametrize(("name", "eta"), [
    ("ddpm", 1.0), ("ddim", 0.5), ("dpmpp_2m_sde", 1.0), ("dpmpp_3m", 0.7), ("heun", 1.0)
])  # fmt: skip
def test_stochastic_solving_reaches_the_mean_and_variance_of_the_data(name, eta):
    along = timesteps(SCHEDULE, 200)
    noise = jax.random.normal(jax.random.key(9), (4, 64, 64, 1))
    noisy = jnp.asarray(on_the_curve(SCHEDULE, 1000, noise), jnp.float32)
    drawn = np.asarray(solve(name, noisy, along, eta=eta))
    np.testing.assert_allclose(drawn.mean(), M, atol=4 * S / np.sqrt(drawn.size) + 0.005)
    np.testing.assert_allclose(drawn.std(), S, rtol=0.03)
    # the fresh noise has replaced the old: eta = 0 would have kept all of it
    assert np.corrcoef(drawn.ravel(), np.asarray(noise).ravel())[0, 1] < 0.95


@pytest.mark.parametrize("name", SOLVERS)
def test_without_eta_no_key_and_no_temperature_matters(name):
    noise, along = NOISE, SIX
    one = solve(name, noise, along, eta=0.0)
    np.testing.assert_array_equal(one, solve(name, noise, along, eta=0.0, temperature=3.0, seed=77))
    other = [solve(name, noise, along, eta=1.0, seed=seed) for seed in (0, 77)]
    assert (other[0] != other[1]).all()


def grey(noisy, t):
    return jnp.full_like(noisy, M)


@pytest.mark.parametrize("name", SOLVERS)
def test_temperature_scales_the_fresh_noise_alone(name):
    """With an estimate that does not look at `noisy`, a picture is linear in the noise that it was given."""
    along = np.array([800, 500, 200, 100])
    cold, mild, hot = (
        solve(name, NOISE, along, denoise=grey, eta=1.0, temperature=temperature) for temperature in (0.0, 1.0, 2.0)
    )
    np.testing.assert_allclose(hot - mild, mild - cold, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(mild - cold).min()) > 0


def perfect(noisy, t):
    return jax.random.uniform(jax.random.key(1), noisy.shape, minval=-1)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_perfect_denoiser_is_reached_in_one_step_and_in_many(name):
    for schedule, steps in ((SCHEDULE, 1), (ZERO, 2), (SCHEDULE, 13)):
        along, eta = timesteps(schedule, steps), SOLVERS[name].eta
        drawn = solve(name, NOISE, along, schedule, perfect, eta=eta)
        np.testing.assert_array_equal(drawn, perfect(NOISE, 0))


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ode", "sde"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_estimate_is_the_picture(name, eta):
    state = state_after(name, NOISE, SIX, eta=eta)
    np.testing.assert_allclose(state.noisy, state.denoised, atol=1e-6)  # compiled twice, rounded differently


@pytest.mark.parametrize("name", SOLVERS)
def test_the_table_knows_how_often_a_solver_asks(name):
    asked = []

    def denoise(noisy, t):
        jax.debug.callback(lambda t: asked.append(int(t)), t[0])
        return noisy

    solve(name, jnp.ones((1, 1, 1, 1)), timesteps(SCHEDULE, 5), denoise=denoise).block_until_ready()
    jax.effects_barrier()
    assert len(asked) == (9 if name == "heun" else 5)
    assert set(asked) == {1000, 800, 600, 400, 200}


def test_trailing_spacing_is_that_of_lin_et_al():
    """Table 2 of Lin et al. 2024, T = 1000, 10 steps."""
    expected = [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    np.testing.assert_array_equal(timesteps(SCHEDULE, 10), expected)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("T", [2, 7, 50])
def test_any_number_of_steps_gives_decreasing_timesteps_down_to_0(T, zero_terminal_snr):
    schedule = schedules.cosine(T, zero_terminal_snr=zero_terminal_snr)
    for steps in range(1, T + 1):
        along = timesteps(schedule, steps)
        assert len(along) == steps + 1
        assert (np.diff(along) < 0).all()
        assert along[-1] == 0
        assert along[0] == T


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps}.*from 1 to the 10"):
        timesteps(schedules.cosine(10), steps)
