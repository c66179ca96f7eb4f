"""The schedule against an independent transcription in float64, and its conversions against each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import schedule as schedules

SHAPE = (5, 3, 2, 1)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def mixture(T, seed=0):
    """A schedule, a noisy batch at random steps above 0, and what it was mixed from."""
    image_key, noise_key, t_key = jax.random.split(jax.random.key(seed), 3)
    schedule = schedules.cosine(T)
    image, noise = jax.random.normal(image_key, SHAPE), jax.random.normal(noise_key, SHAPE)
    t = jax.random.randint(t_key, SHAPE[:1], 1, T)
    return schedule, image, noise, t, schedules.add_noise(schedule, image, noise, t)


@pytest.mark.parametrize("T", [2, 7, 50, 1000])
def test_cosine_is_equation_17_with_capped_betas(T):
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = [1.0]
    for t in range(1, T + 1):
        alpha_bar.append(alpha_bar[-1] * (1 - min(0.999, 1 - f(t) / f(t - 1))))
    schedule = schedules.cosine(T)
    np.testing.assert_allclose(schedule.alpha, np.sqrt(alpha_bar), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma, np.sqrt(1 - np.array(alpha_bar)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("T", [2, 50, 1000])
def test_steps_run_from_image_to_noise(T):
    schedule = schedules.cosine(T)
    assert schedule.alpha.shape == schedule.sigma.shape == (T + 1,)
    assert (schedule.alpha[0], schedule.sigma[0]) == (1, 0)
    assert schedule.alpha[-1] > 0
    assert (np.diff(schedule.alpha / np.maximum(schedule.sigma, 1e-30)) < 0).all()
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)


@pytest.mark.parametrize("T", [2, 7, 1000])
def test_zero_terminal_snr_is_algorithm_1(T):
    """Lin et al. 2024: alpha of steps 1 … T is shifted so that the last is 0, and scaled so that the first stays."""
    plain, schedule = schedules.cosine(T), schedules.cosine(T, zero_terminal_snr=True)
    root = np.asarray(plain.alpha[1:], np.float64)
    shifted = root - root[-1]
    np.testing.assert_allclose(schedule.alpha[1:], shifted * root[0] / (root[0] - root[-1]), rtol=1e-5, atol=1e-7)
    assert (schedule.alpha[0], schedule.sigma[0], schedule.alpha[-1], schedule.sigma[-1]) == (1, 0, 0, 1)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma[1], plain.sigma[1], rtol=1e-6)
    assert (np.diff(schedule.alpha / np.maximum(schedule.sigma, 1e-30)) < 0).all()


def test_noising_keeps_unit_variance_and_ends_are_pure():
    schedule, image, noise, _, _ = mixture(1000)
    at = lambda t: schedules.add_noise(schedule, image, noise, jnp.full(SHAPE[:1], t))  # noqa: E731
    np.testing.assert_array_equal(at(0), image)
    np.testing.assert_allclose(at(1000), noise, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_right_prediction_gives_back_the_image(prediction, seed):
    schedule, image, noise, t, noisy = mixture(100, seed)
    right = schedules.target(schedule, image, noise, t, prediction)
    alpha, sigma = schedules.mix_at(schedule, t)
    known = {"eps": noise, "v": alpha * noise - sigma * image, "x0": image}[prediction]
    np.testing.assert_array_equal(right, known)
    close = {"rtol": 1e-3, "atol": 1e-2} if prediction == "eps" else {"rtol": 2e-4, "atol": 2e-4}  # over a small alpha
    np.testing.assert_allclose(schedules.denoised_from(schedule, noisy, right, t, prediction), image, **close)
