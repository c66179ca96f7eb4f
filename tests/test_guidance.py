import jax
import jax.numpy as jnp
import numpy as np
import pytest

import schedule as schedules
from guidance import classifier_free, inpaint, limit_to_interval, steps_within, threshold
from samplers import SOLVERS, FreshNoise, timesteps

POSITIVE, NEGATIVE = jax.random.normal(jax.random.key(0), (2, 2, 4, 3, 3))
NOISY, TS = jnp.zeros((2, 4, 3, 3)), jnp.full(2, 500)


def ask(denoise, noisy=NOISY, t=TS):
    return denoise(noisy, t)


def both(noisy, t):
    return POSITIVE, NEGATIVE


def guided(guidance, rescale=0.0):
    return ask(classifier_free(both, jnp.float32(guidance), jnp.float32(rescale)))


def test_guidance_0_1_and_beyond():
    np.testing.assert_allclose(guided(1), POSITIVE, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(guided(0), NEGATIVE)
    np.testing.assert_allclose(guided(3), 3 * POSITIVE - 2 * NEGATIVE, rtol=1e-5, atol=1e-5)


def test_rescaling_brings_back_the_contrast_and_keeps_the_mean():
    plain, whole, half = (guided(5, share) for share in (0.0, 1.0, 0.5))
    axes = (1, 2, 3)
    np.testing.assert_allclose(whole.std(axes), POSITIVE.std(axes), rtol=1e-5)
    np.testing.assert_allclose(whole.mean(axes), plain.mean(axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=1e-5, atol=1e-5)


def test_rescaling_a_picture_of_one_colour_gives_no_nan():
    flat = classifier_free(lambda *_: (jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))), jnp.float32(7), jnp.float32(1))
    assert np.isfinite(flat(jnp.zeros((1, 2, 2, 3)), jnp.full(1, 3))).all()


def test_outside_of_the_interval_only_the_other_estimate_is_asked_for():
    asked = []

    def noting(name, value):
        def denoise(noisy, t):
            jax.debug.callback(lambda: asked.append(name))
            return value

        return denoise

    denoise = jax.jit(limit_to_interval(jnp.array([200, 800]), noting("in", POSITIVE), noting("out", NEGATIVE)))
    for t, value in ((199, NEGATIVE), (200, POSITIVE), (800, POSITIVE), (801, NEGATIVE)):
        np.testing.assert_array_equal(denoise(NOISY, jnp.full(2, t)), value)
    jax.effects_barrier()
    assert asked == ["out", "in", "in", "out"]


@pytest.mark.parametrize("T", [2, 3, 7, 50, 1000, 1024, 99_991, 100_000])
def test_an_interval_holds_exactly_the_steps_whose_noise_level_lies_in_it(T):
    """For every step, against exact fractions of the numbers as a user writes them."""
    for low, high in zip(range(101), range(100, -1, -1), strict=True):  # per cent; crossed, it holds nothing
        first, last = steps_within((float(f"{low / 100:.2f}"), float(f"{high / 100:.2f}")), T)
        t = np.arange(T + 1)
        np.testing.assert_array_equal((first <= t) & (t <= last), (low * T <= 100 * t) & (100 * t <= high * T))
    for t in range(0, T + 1, max(1, T // 1000)):
        assert steps_within((t / T, t / T), T).tolist() == [t, t]


def test_thresholds_leave_pictures_in_range_alone_and_bring_others_back():
    def brought_back(image, percentile):
        return threshold(lambda noisy, t: noisy, percentile)(image, jnp.full(len(image), 5))

    inside = jax.random.uniform(jax.random.key(0), (3, 5, 7, 3), minval=-1)
    for percentile in (None, jnp.float32(0.9)):
        np.testing.assert_array_equal(brought_back(inside, percentile), inside)
    far = jnp.array([[[[-3.0], [0.5], [7.0]]]])
    np.testing.assert_array_equal(brought_back(far, None), [[[[-1], [0.5], [1]]]])
    np.testing.assert_allclose(brought_back(far, jnp.float32(1)), far / 7, rtol=1e-6)
    np.testing.assert_allclose(brought_back(far, jnp.float32(0.5)), [[[[-1], [0.5 / 3], [1]]]], rtol=1e-6)


def test_a_mask_that_is_true_everywhere_changes_nothing():
    everywhere = jnp.ones((2, 4, 3, 1), bool)
    np.testing.assert_array_equal(ask(inpaint(lambda *_: POSITIVE, NEGATIVE, everywhere)), POSITIVE)


@pytest.mark.parametrize("name", SOLVERS)
def test_known_pixels_come_back_exactly_and_travel_under_their_own_noise(name):
    schedule = schedules.cosine(1000)
    image = jax.random.uniform(jax.random.key(1), (2, 4, 3, 3), minval=-1)
    drawn = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 4, 3, 1))
    noise = jax.random.normal(jax.random.key(3), image.shape)
    seen = []

    def network(noisy, t):
        jax.debug.callback(lambda noisy, t: seen.append((noisy, int(t))), noisy, t[0])
        return 0.1 * noisy

    along = timesteps(schedule, 6)
    start = schedules.add_noise(schedule, image, noise, jnp.full(2, 1000))
    fresh = FreshNoise(jax.vmap(jax.random.key)(jnp.arange(2)), jnp.float32(0), jnp.float32(1))
    result = SOLVERS[name].solve(inpaint(network, image, drawn), schedule, start, along, fresh).noisy
    known = ~np.broadcast_to(drawn, image.shape)
    np.testing.assert_array_equal(np.asarray(result)[known], np.asarray(image)[known])
    jax.effects_barrier()
    for noisy, t in seen:
        expected = schedules.add_noise(schedule, image, noise, jnp.full(2, t))
        np.testing.assert_allclose(noisy[known], np.asarray(expected)[known], atol=1e-4)
