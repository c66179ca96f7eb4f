"""Small changes to training pictures that never show in drawings, because the network is told of them.

A small set is soon learned by heart. Each picture that training sees may be moved, scaled and recoloured a little,
each change happening with one chance. The network receives the amounts as its `augmentation` input and so learns what
each of them does; drawing leaves that input out, which means none at all (Karras et al. 2022, Appendix F.2, whose list
is longer). Nothing here mirrors or turns: a left arrow stays one.

What a picture is moved away from is filled with its background: white, or transparent where there are 4 channels.
Colours, in 0 … 1 and times alpha, go through one matrix and one shift

    colour' = contrast (rotation about grey by hue) (saturation) (colour - alpha / 2) + (1 / 2 + brightness) alpha

and are clipped to 0 … alpha. Grey pictures know brightness and contrast only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

LABELS = ("right", "down", "scale", "brightness", "contrast", "saturation", "hue")
SHIFT = 0.06  # standard deviations: share of the picture's side
SCALE = 0.1  # of the logarithm of the size
BRIGHTNESS = 0.1  # of the range
CONTRAST = 0.2  # of the logarithm
SATURATION = 0.3  # of the logarithm
HUE = 0.5  # radians
SIZES = (SHIFT, SHIFT, SCALE, BRIGHTNESS, CONTRAST, SATURATION, HUE)
LIMIT = 2.0  # standard deviations at which the draws are cut


def augment(
    image: Float[Array, "b h w c"], key: Key[Array, ""], chance: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b labels"]]:
    """Pictures changed at random, and how much of each change (of LABELS, in standard deviations) each of them got."""
    amount_key, whether_key = jax.random.split(key)
    shape = (len(image), len(LABELS))
    amounts = jax.random.truncated_normal(amount_key, -LIMIT, LIMIT, shape)
    happens = jax.random.bernoulli(whether_key, chance, shape)
    if image.shape[-1] == 1:
        happens = happens & (jnp.arange(len(LABELS)) < LABELS.index("saturation"))[None]
    labels = jnp.where(happens, amounts, 0.0)
    return jax.vmap(changed)(image, labels), labels


def changed(image: Float[Array, "h w c"], labels: Float[Array, "labels"]) -> Float[Array, "h w c"]:
    """One picture in [-1, 1] with the given amounts of each change."""
    right, down, scale, *of_colour = labels * jnp.array(SIZES)
    moved = placed(image, right, down, jnp.exp(scale))
    image = jnp.where((labels[:3] != 0).any(), moved, image)  # resampling by nothing may still round
    return jnp.where((labels[3:] != 0).any(), recoloured(image, *of_colour), image)


def placed(
    image: Float[Array, "h w c"], right: Float[Array, ""], down: Float[Array, ""], scale: Float[Array, ""]
) -> Float[Array, "h w c"]:
    """Scaled about its centre and moved by shares of its sides, linearly resampled."""
    h, w, c = image.shape
    background = -1.0 if c == 4 else 1.0
    size = jnp.array([h, w])
    shift = size * (0.5 + jnp.stack([down, right]) - 0.5 * scale)
    scales = jnp.stack([scale, scale])
    return background + jax.image.scale_and_translate(
        image - background, image.shape, (0, 1), scales, shift, "linear", antialias=True
    )


def recoloured(
    image: Float[Array, "h w c"],
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    saturation: Float[Array, ""],
    hue: Float[Array, ""],
) -> Float[Array, "h w c"]:
    """Colours through the matrix and shift of the module's docstring; transparency stays."""
    colour, rest = (image + 1) / 2, None
    alpha = jnp.ones((1, 1, 1))
    if image.shape[-1] == 4:
        colour, alpha, rest = colour[..., :3], colour[..., 3:], image[..., 3:]
    centred = (colour - alpha / 2) * jnp.exp(contrast)
    if image.shape[-1] > 1:
        centred = jnp.einsum("hwc,dc->hwd", centred, hue_rotation(hue) @ saturate(jnp.exp(saturation)))
    colour = jnp.clip(centred + (0.5 + brightness) * alpha, 0, alpha) * 2 - 1
    return colour if rest is None else jnp.concatenate([colour, rest], axis=-1)


def saturate(factor: Float[Array, ""]) -> Float[Array, "3 3"]:
    """Colours moved away from (above 1) or towards the grey that has the same mean."""
    grey = jnp.full((3, 3), 1 / 3)
    return factor * (jnp.eye(3) - grey) + grey


def hue_rotation(angle: Float[Array, ""]) -> Float[Array, "3 3"]:
    """A rotation about the axis of greys (Rodrigues' formula with the unit axis (1, 1, 1) / √3)."""
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / jnp.sqrt(3.0)
    grey = jnp.full((3, 3), 1 / 3)
    return jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * grey
