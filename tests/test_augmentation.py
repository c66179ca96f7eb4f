import jax
import jax.numpy as jnp
import numpy as np
import pytest

import augmentation
from augmentation import LABELS, STDS

augment = jax.jit(augmentation.augment, static_argnums=2)
apply = jax.jit(augmentation.apply)


def images(b=64, channels=3):
    """A dark box in the middle of a white (or transparent) ground."""
    image = np.ones((b, 16, 24, channels), np.float32)
    if channels == 4:
        image[...] = -1
        image[..., 3] = -1
    image[:, 5:11, 8:16] = np.linspace(-0.8, 0.4, channels)
    if channels == 4:
        image[:, 5:11, 8:16, 3] = 1
    return jnp.asarray(image)


def one(channels=3, **amounts):
    labels = jnp.array([amounts.get(name, 0.0) for name in LABELS])
    return apply(images(1, channels)[0], labels)


def test_probability_0_is_no_change_bit_for_bit():
    image, labels = augment(images(), jax.random.key(0), 0.0)
    np.testing.assert_array_equal(image, images())
    assert not labels.any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_labels_say_which_images_were_changed_and_each_change_comes_with_its_probability(channels):
    image, labels = augment(images(400, channels), jax.random.key(1), 0.3)
    changed = (image != images(400, channels)).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, labels.any(axis=1))
    known = 5 if channels == 1 else len(LABELS)
    rates = (np.asarray(labels) != 0).mean(axis=0)
    np.testing.assert_allclose(rates[:known], 0.3, atol=4 * np.sqrt(0.3 * 0.7 / 400))
    assert not rates[known:].any()
    assert abs(labels).max() <= augmentation.LIMIT
    assert jnp.isfinite(image).all()


def centre(image):
    dark = 1 - np.asarray(image).mean(axis=-1)
    rows, columns = np.indices(dark.shape)
    return np.array([(dark * rows).sum(), (dark * columns).sum()]) / dark.sum()


def test_an_image_moves_as_far_as_the_labels_say_onto_its_own_background():
    moved = one(right=1.0, down=-1.0)
    shift = np.array([-16 * STDS["down"], 24 * STDS["right"]])
    np.testing.assert_allclose(centre(moved) - centre(one()), shift, atol=1e-3)
    np.testing.assert_array_equal(moved[0], 1)
    assert (one(4, right=2.0)[:, 0] == -1).all()  # transparent
    bigger = one(scale=1.0)
    np.testing.assert_allclose((1 - bigger).sum() / (1 - one()).sum(), np.exp(2 * STDS["scale"]), rtol=2e-2)
    np.testing.assert_allclose(centre(bigger), centre(one()), atol=1e-3)


def test_colours_turn_about_grey_and_stay_in_range():
    turned, plain = one(hue=1.0)[8, 12], one()[8, 12]
    np.testing.assert_allclose(turned.mean(), plain.mean(), atol=1e-5)  # as light as before
    np.testing.assert_allclose(
        jnp.linalg.norm(turned - turned.mean()), jnp.linalg.norm(plain - plain.mean()), rtol=1e-4
    )
    third = augmentation.hue_rotation(jnp.float32(2 * np.pi / 3))
    np.testing.assert_allclose(third @ jnp.eye(3), np.roll(np.eye(3), 1, axis=0), atol=1e-6)  # red to green to blue
    grey = one(saturation=-2.0)[8, 12]
    factor = np.exp(-2 * STDS["saturation"])
    np.testing.assert_allclose(grey - grey.mean(), factor * (plain - plain.mean()), atol=1e-5)
    np.testing.assert_array_equal(one(hue=1.5, saturation=1.0)[0, 0], 1)  # white stays white
    np.testing.assert_allclose(one(brightness=-1.0)[0, 0], 1 - 2 * STDS["brightness"], atol=1e-6)
    for extreme in (-2.0, 2.0):
        changed = one(4, brightness=extreme, contrast=extreme, saturation=extreme, hue=extreme)
        assert (changed[..., :3] <= changed[..., 3:] + 1e-6).all()  # colour times alpha
        assert abs(changed).max() <= 1
        np.testing.assert_array_equal(changed[..., 3], one(4)[..., 3])
