"""Group norm and the activation behind it, as few passes over a picture as they need.

For one picture and channel a group norm is x ↦ factor · x + offset. Seen so, the scale and shift of a condition are two
more numbers in factor and offset, and norm, condition and activation together read x once and write once. The gradients
are written out to be as short: JAX's own keep what lies between and go over it again (a training step on a CPU takes a
tenth longer). Means and variances are float32 whatever x is.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-6  # added to a variance
EACH = {"axis": (1, 2), "keepdims": True}  # picture and channel by itself


class GroupNorm(nnx.Module):
    """Mean 0 and variance 1 in groups of channels, then a learned scale and bias per channel (Wu & He 2018)."""

    def __init__(self, channels: int):
        self.groups = math.gcd(32, channels)
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def affine(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
        """factor and offset, float32: the norm of x is factor · x + offset."""
        size = x.shape[-1] // self.groups

        def of_group(moment: Float[Array, "b 1 1 c"]) -> Float[Array, "b 1 1 c"]:
            return moment.reshape(-1, 1, 1, self.groups, size).mean(axis=4).repeat(size, axis=3)

        mean, square = map(of_group, channel_moments(x))
        scale, bias = (part[...].reshape(1, 1, 1, -1) for part in (self.scale, self.bias))
        factor = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + EPSILON) * scale
        return factor, bias - mean * factor

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        factor, offset = self.affine(x)
        return (factor * x + offset).astype(x.dtype)


@jax.custom_vjp
def channel_moments(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
    """Means of x and x² over each picture, per channel, float32."""
    x = x.astype(jnp.float32)
    return x.mean(**EACH), (x * x).mean(**EACH)


def _channel_moments_backward(x: Array, gradient: tuple[Array, Array]) -> tuple[Array]:
    mean, square = (part / (x.shape[1] * x.shape[2]) for part in gradient)
    return ((mean + 2 * square * x).astype(x.dtype),)


channel_moments.defvjp(lambda x: (channel_moments(x), x), _channel_moments_backward)


@jax.custom_vjp
def affine_silu(
    x: Float[Array, "b h w c"], factor: Float[Array, "b 1 1 c"], offset: Float[Array, "b 1 1 c"]
) -> Float[Array, "b h w c"]:
    """SiLU of factor · x + offset: y sigmoid(y) (Hendrycks & Gimpel 2016)."""
    return nnx.silu(factor * x + offset).astype(x.dtype)


def _affine_silu_backward(inputs: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, factor, offset = inputs
    y = factor * x + offset
    gate = nnx.sigmoid(y)
    slope = gradient * gate * (1 + y * (1 - gate))  # d(loss) / dy
    return (slope * factor).astype(x.dtype), (slope * x).sum(**EACH), slope.sum(**EACH)


affine_silu.defvjp(lambda *inputs: (affine_silu(*inputs), inputs), _affine_silu_backward)
