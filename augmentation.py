"""Augmentation that the network is told of, so that sampling shows none of it (Karras et al. 2022, Appendix F.2).

A small dataset is soon memorised. Training therefore moves, scales and recolours images a little, each change with a
given probability, and the network receives the amounts as its `augmentation` input, so that it learns what each does.
Sampling leaves the input out, which means no change. Nothing is mirrored or rotated: a left arrow stays a left arrow.

Where an image is moved away, the background appears: white, or transparent where there are 4 channels.
A colour in [0, 1], multiplied by alpha (1 without transparency), becomes, clipped to [0, alpha],
    contrast * rotation(hue) saturation (colour - alpha / 2) + (1 / 2 + brightness) alpha.
Grey images know brightness and contrast only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

STDS = {  # standard deviation of each change
    "right": 0.06,  # share of the width
    "down": 0.06,  # share of the height
    "scale": 0.1,  # log
    "brightness": 0.1,  # of [0, 1]
    "contrast": 0.2,  # log
    "saturation": 0.3,  # log
    "hue": 0.5,  # radians
}
LABELS = tuple(STDS)
LIMIT = 2.0  # standard deviations at which the normal distribution is truncated
GREY = np.full((3, 3), 1 / 3, np.float32)  # projects a colour onto the grey axis (1, 1, 1) / √3

Image = Float[Array, "h w c"]
Scalar = Float[Array, ""]


def augment(
    image: Float[Array, "b h w c"], key: Key[Array, ""], probability: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b labels"]]:
    """Images changed at random, and the labels: the amount of each of LABELS, in standard deviations, 0 for none."""
    amount_key, occurs_key = jax.random.split(key)
    shape = (len(image), len(LABELS))
    amounts = jax.random.truncated_normal(amount_key, -LIMIT, LIMIT, shape)
    occurs = jax.random.bernoulli(occurs_key, probability, shape)
    if image.shape[-1] == 1:
        occurs = occurs & (jnp.arange(len(LABELS)) < LABELS.index("saturation"))[None]
    labels = jnp.where(occurs, amounts, 0.0)
    return jax.vmap(apply)(image, labels), labels


def apply(image: Image, labels: Float[Array, "labels"]) -> Image:
    """One image in [-1, 1], changed by these amounts."""
    right, down, scale, *colour = labels * jnp.array(list(STDS.values()))
    moved = move(image, right, down, jnp.exp(scale))
    image = jnp.where((labels[:3] != 0).any(), moved, image)  # no change is exact: resampling would round
    return jnp.where((labels[3:] != 0).any(), recolour(image, *colour), image)


def move(image: Image, right: Scalar, down: Scalar, scale: Scalar) -> Image:
    """Scale an image about its centre and shift it by shares of its sides, with linear interpolation."""
    background = -1.0 if image.shape[-1] == 4 else 1.0
    shift = jnp.array(image.shape[:2]) * (0.5 + jnp.stack([down, right]) - 0.5 * scale)
    scales = jnp.stack([scale, scale])
    moved = jax.image.scale_and_translate(image - background, image.shape, (0, 1), scales, shift, "linear")
    return background + moved


def recolour(image: Image, brightness: Scalar, contrast: Scalar, saturation: Scalar, hue: Scalar) -> Image:
    """Change an image's brightness, contrast, saturation and hue by the module's formula; its transparency stays."""
    channels = image.shape[-1]
    unit = (image + 1) / 2  # [-1, 1] to [0, 1]
    colour, alpha = (unit[..., :3], unit[..., 3:]) if channels == 4 else (unit, jnp.ones((1, 1, 1)))
    centred = (colour - alpha / 2) * jnp.exp(contrast)
    if channels > 1:
        saturate = jnp.exp(saturation) * (jnp.eye(3) - GREY) + GREY
        centred = jnp.einsum("hwc,dc->hwd", centred, hue_rotation(hue) @ saturate)
    colour = jnp.clip(centred + (0.5 + brightness) * alpha, 0, alpha) * 2 - 1
    return jnp.concatenate([colour, image[..., 3:]], axis=-1) if channels == 4 else colour


def hue_rotation(angle: Scalar) -> Float[Array, "3 3"]:
    """The rotation about the grey axis, by Rodrigues' formula."""
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / jnp.sqrt(3.0)
    return jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * GREY
