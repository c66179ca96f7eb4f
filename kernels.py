"""Convolutions with kernels of 3 × 3, also of a picture that is first doubled in size.

XLA's own convolution does it, except on a CPU with many channels of float32. There XLA multiplies matrices faster than
it convolves, so a convolution is matrix products, and fewer of them: Winograd's minimal filtering of tiles of 2 × 2
pixels, F(2×2, 3×3), with 16 multiplications for a tile's 36 taps (Lavin & Gray 2016, Section 4.1), 9 where all pixels
are there four times. Both ways are the same function up to rounding, which in bfloat16 would be three times as coarse.
The products are separate ones: XLA runs those side by side.

Along one side, two outputs y of four pixels d and three taps g are sums of products of sums:

    m₀ = (d₀ − d₂) g₀                            y₀ = m₀ + m₁ + m₂ = d₀ g₀ + d₁ g₁ + d₂ g₂
    m₁ = (d₁ + d₂) (g₀ + g₁ + g₂) / 2            y₁ = m₁ − m₂ − m₃ = d₁ g₀ + d₂ g₁ + d₃ g₂
    m₂ = (d₂ − d₁) (g₀ − g₁ + g₂) / 2
    m₃ = (d₁ − d₃) g₂

In a doubled picture d₁ = d₂, so that m₂ = 0. Along two sides the sums are formed of rows first, then of columns.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

FEW = 32  # channels of x or of the result, below which the sums cost more than the products save


class Conv3x3(nnx.Conv):
    """A convolution that keeps height and width: whatever lies outside of a picture is 0."""

    def __init__(self, channels: int, out: int, rngs: nnx.Rngs, *, zero: bool = False):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        super().__init__(channels, out, (3, 3), kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w out"]:
        return self.convolved(x, by_library, partial(by_products, PLAIN))

    def convolved(self, x: Array, library: Callable, products: Callable) -> Array:
        kernel, bias = self.kernel[...], self.bias[...].reshape(1, 1, 1, -1)
        if min(kernel.shape[2:]) < FEW or x.dtype != jnp.float32:
            return library(x, kernel) + bias
        return jax.lax.platform_dependent(x, kernel, cpu=products, default=library) + bias


class Upsample(Conv3x3):
    """Nearest-neighbour upsampling by two, then the convolution."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w out"]:
        @jax.checkpoint  # the doubled picture is not worth keeping
        def library(x: Array, kernel: Array) -> Array:
            return by_library(x.repeat(2, axis=1).repeat(2, axis=2), kernel)

        return self.convolved(x, library, partial(by_products, DOUBLED))


def by_library(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c out"]) -> Float[Array, "b h w out"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Sums(NamedTuple):
    """What is summed along one side of a picture or kernel, which is the axis that is given."""

    pixels: Callable[[Array, int], tuple[Array, ...]]
    taps: Callable[[Array, int], tuple[Array, ...]]
    outputs: Callable[..., tuple[Array, Array]]


@partial(jax.jit, static_argnums=0)  # traced once for all layers of a size
@partial(jax.checkpoint, static_argnums=0)  # the sums are cheaper to form again than to keep for the gradient
def by_products(
    sums: Sums, x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c out"]
) -> Float[Array, "b h_out w_out out"]:
    """The convolution of x, or of x doubled, by minimal filtering (Lavin & Gray 2016, Eq. 8)."""
    b, h, w, _ = x.shape
    cut = (h % 2, w % 2) if sums is PLAIN else (0, 0)  # tiles are two wide
    x = jnp.pad(x, ((0, 0), (1, 1 + cut[0]), (1, 1 + cut[1]), (0, 0)))
    tiles = [sums.pixels(rows, 2) for rows in sums.pixels(x, 1)]
    kernels = [sums.taps(rows, 0) for rows in sums.taps(kernel, 0)]
    products = [[d @ g for d, g in zip(*row, strict=True)] for row in zip(tiles, kernels, strict=True)]
    lines = zip(*(sums.outputs(*column) for column in zip(*products, strict=True)), strict=True)  # upper, lower
    y = jnp.stack([jnp.stack(sums.outputs(*line), axis=3) for line in lines], axis=2)
    rows, columns, out = 2 * y.shape[1], 2 * y.shape[3], y.shape[5]
    return y.reshape(b, rows, columns, out)[:, : rows - cut[0], : columns - cut[1]]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pixels(x: Array, axis: int) -> tuple[Array, ...]:
    d = [jax.lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4)]
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _pixels_backward(axis: int, _: None, m: tuple[Array, ...]) -> tuple[Array]:
    """Written out because JAX's own, sums of arrays with gaps, takes three times as long."""

    def with_zero(array: Array, *, before: int) -> Array:
        return jnp.pad(array, [(before, 1 - before) if i == axis else (0, 0) for i in range(array.ndim)])

    even = with_zero(m[0], before=0) + with_zero(m[1] + m[2] - m[0], before=1)  # as d0 of one tile, d2 of the last
    odd = with_zero(m[1] - m[2] + m[3], before=0) - with_zero(m[3], before=1)  # as d1 of one tile, d3 of the last
    pairs = jnp.stack([even, odd], axis + 1)
    return (pairs.reshape(*even.shape[:axis], 2 * even.shape[axis], *even.shape[axis + 1 :]),)


_pixels.defvjp(lambda x, axis: (_pixels(x, axis), None), _pixels_backward)


def _pixels_of_doubled(x: Array, axis: int) -> tuple[Array, ...]:
    before, here, after = (jax.lax.slice_in_dim(x, i, x.shape[axis] - 2 + i, 1, axis) for i in range(3))
    return before - here, here, here - after


def _taps(kernel: Array, axis: int) -> tuple[Array, ...]:
    g = [jax.lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _taps_of_doubled(kernel: Array, axis: int) -> tuple[Array, ...]:
    g = [jax.lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
    return g[0], g[0] + g[1] + g[2], g[2]  # the half of the sum is here with the pixel: (d1 + d2) / 2


PLAIN = Sums(_pixels, _taps, lambda m0, m1, m2, m3: (m0 + m1 + m2, m1 - m2 - m3))
DOUBLED = Sums(_pixels_of_doubled, _taps_of_doubled, lambda m0, m1, m3: (m0 + m1, m1 - m3))


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
