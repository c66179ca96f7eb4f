"""Samplers against the closed form: for data N(0, s²) the best denoiser and the whole flow are known exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import schedule as schedules
from samplers import ddim, guide, threshold, trailing

S = 0.5  # standard deviation of the data
SCHEDULE = schedules.cosine(1000)


def gaussian_denoiser(noisy, t):
    """E[image | noisy] for image ~ N(0, S²)."""
    alpha, sigma = schedules.mix_at(SCHEDULE, t)
    return alpha * S**2 / (alpha**2 * S**2 + sigma**2) * noisy


def error(steps):
    noise = jnp.full((1, 1, 1, 1), 1.0)
    exact = S / jnp.sqrt(SCHEDULE.alpha[-1] ** 2 * S**2 + SCHEDULE.sigma[-1] ** 2)  # variances match at both ends
    return abs(float(ddim(gaussian_denoiser, SCHEDULE, noise, trailing(1000, steps))[0, 0, 0, 0] - exact))


def test_ddim_is_first_order():
    errors = [error(steps) for steps in (25, 50, 100, 200)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 1, atol=0.15)
    assert errors[-1] < 0.01


def test_ddim_follows_equation_12_step_by_step():
    noise = jax.random.normal(jax.random.key(0), (2, 3, 5, 1))
    timesteps = trailing(1000, 7)
    x = np.asarray(noise, np.float64)
    alpha_bar = np.asarray(SCHEDULE.alpha, np.float64) ** 2
    for t, s in itertools.pairwise(timesteps):
        denoised = np.sqrt(alpha_bar[t]) * S**2 / (alpha_bar[t] * S**2 + 1 - alpha_bar[t]) * x
        eps = (x - np.sqrt(alpha_bar[t]) * denoised) / np.sqrt(1 - alpha_bar[t])
        x = np.sqrt(alpha_bar[s]) * denoised + np.sqrt(1 - alpha_bar[s]) * eps
    np.testing.assert_allclose(ddim(gaussian_denoiser, SCHEDULE, noise, timesteps), x, rtol=1e-4, atol=1e-5)


def test_a_perfect_denoiser_is_reached_in_one_step_and_in_many():
    image = jax.random.uniform(jax.random.key(1), (2, 4, 3, 1), minval=-1)
    noise = jax.random.normal(jax.random.key(2), image.shape)
    for steps in (1, 2, 13):
        np.testing.assert_allclose(ddim(lambda *_: image, SCHEDULE, noise, trailing(1000, steps)), image, atol=1e-6)


@pytest.mark.parametrize(("T", "steps"), [(1000, 1), (1000, 25), (1000, 1000), (7, 5)])
def test_timesteps_run_from_T_to_0(T, steps):
    timesteps = trailing(T, steps)
    assert len(timesteps) == steps + 1
    assert (timesteps[0], timesteps[-1]) == (T, 0)
    assert (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps}.*from 1 to the 10"):
        trailing(10, steps)


def test_guidance_0_1_and_beyond():
    conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 3))
    np.testing.assert_allclose(guide(conditional, unconditional, jnp.float32(1)), conditional, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(guide(conditional, unconditional, jnp.float32(0)), unconditional)
    np.testing.assert_allclose(
        guide(conditional, unconditional, jnp.float32(3)), 3 * conditional - 2 * unconditional, rtol=1e-5, atol=1e-5
    )


def test_threshold_leaves_pictures_in_range_alone_and_brings_others_back():
    inside = jax.random.uniform(jax.random.key(0), (3, 5, 7, 3), minval=-1)
    np.testing.assert_array_equal(threshold(inside), inside)
    np.testing.assert_array_equal(threshold(jnp.array([[[[-3.0], [0.5], [7.0]]]])), [[[[-1], [0.5], [1]]]])
