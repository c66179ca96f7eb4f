"""Fast versions of three layers and of a loop. To understand the model, skip this file: each is what stands beside it.

    Conv(c, out, rngs)(x)          nnx.Conv(c, out, (3, 3)): a 3 × 3 convolution with zero padding
    Upsample(c, out, rngs)(x)      the same, after each pixel of x is repeated to 2 × 2
    GroupNorm(c)(x, scale, shift)  group_norm(x) * (1 + scale) + shift, then SiLU where silu=True
    scan(body, carry, xs)          jax.lax.scan

Norm, scale and shift amount to one factor and one offset per image and channel, so that x is read only twice: for its
moments and for the result. The gradients are written out, because JAX's own read it more often.

Convolutions are XLA's, except on a CPU in float32 with many channels, where XLA multiplies matrices faster than it
convolves. Winograd's F(2×2, 3×3) makes each tile of 2 × 2 outputs from matrix products, with 16 multiplications instead
of 36 (Lavin & Gray 2016, Section 4.1), 9 after upsampling. Along one axis, of pixels d, taps g and outputs y:

    m₀ = (d₀ − d₂) g₀                            y₀ = m₀ + m₁ + m₂ = d₀ g₀ + d₁ g₁ + d₂ g₂
    m₁ = (d₁ + d₂) (g₀ + g₁ + g₂) / 2            y₁ = m₁ − m₂ − m₃ = d₁ g₀ + d₂ g₁ + d₃ g₂
    m₂ = (d₂ − d₁) (g₀ − g₁ + g₂) / 2
    m₃ = (d₁ − d₃) g₂

After upsampling d₁ = d₂, so that m₂ = 0. In bfloat16 the rounding error would be three times the convolution's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

MIN_CHANNELS = 32  # of input and output, below which Winograd's sums cost more than its products save
EPSILON = 1e-6  # added to the variance

Features = Float[Array, "b h w c"]
PerChannel = Float[Array, "b 1 1 c"]
Kernel = Float[Array, "3 3 c out"]
Convolved = Float[Array, "b h_out w_out out"]


def scan(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """jax.lax.scan, its rounds written out on a CPU, where XLA is up to twice as slow on what stood in one."""
    if jax.default_backend() != "cpu":
        return jax.lax.scan(body, carry, xs)
    ys = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *ys)


def pixel_sums(x: Features, axis: int) -> tuple[Array, ...]:
    """The sums of pixels in m₀ … m₃, for all tiles along an axis of a padded image.

    Even and odd pixels are parted by reshape and split, because the gradient of a slice with a stride is slow.
    """
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (part.squeeze(axis + 1) for part in jax.lax.split(pairs, (1, 1), axis + 1))
    d0, d2, d1, d3 = (jax.lax.slice_in_dim(y, i, y.shape[axis] - 1 + i, 1, axis) for y in (even, odd) for i in (0, 1))
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def upsampled_pixel_sums(x: Features, axis: int) -> tuple[Array, ...]:
    """The same after upsampling, from the image before it; without m₂, and m₁ with (d₁ + d₂) / 2."""
    before, here, after = (jax.lax.slice_in_dim(x, i, x.shape[axis] - 2 + i, 1, axis) for i in range(3))
    return before - here, here, here - after


PLAIN = (  # the sums of pixels, of taps and of products along one axis
    pixel_sums,
    lambda g0, g1, g2: (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2),
    lambda m0, m1, m2, m3: (m0 + m1 + m2, m1 - m2 - m3),
)
UPSAMPLED = upsampled_pixel_sums, lambda g0, g1, g2: (g0, g0 + g1 + g2, g2), lambda m0, m1, m3: (m0 + m1, m1 - m3)


@partial(jax.jit, static_argnums=0)  # traced once for all layers of a size
@partial(jax.checkpoint, static_argnums=0)  # the sums are cheaper to compute again than to keep for the gradient
def winograd(sums: tuple, x: Features, kernel: Kernel) -> Convolved:
    """The convolution of x, or of x upsampled, with the sums of PLAIN or UPSAMPLED (Lavin & Gray 2016, Eq. 8)."""
    of_pixels, of_taps, outputs = sums
    b, h, w, _ = x.shape
    odd = (h % 2, w % 2) if sums == PLAIN else (0, 0)  # a tile is two pixels wide
    x = jnp.pad(x, ((0, 0), (1, 1 + odd[0]), (1, 1 + odd[1]), (0, 0)))
    tiles = [of_pixels(row, 2) for row in of_pixels(x, 1)]  # 4 × 4 of [b, tiles down, tiles across, c], or 3 × 3
    kernels = [of_taps(*jnp.unstack(row)) for row in of_taps(*jnp.unstack(kernel))]  # as many of [c, out]
    products = [[d @ g for d, g in zip(*row, strict=True)] for row in zip(tiles, kernels, strict=True)]
    rows = zip(*(outputs(*column) for column in zip(*products, strict=True)), strict=True)  # the upper, the lower
    y = jnp.stack([jnp.stack(outputs(*row), axis=3) for row in rows], axis=2)
    height, width, out = 2 * y.shape[1], 2 * y.shape[3], y.shape[5]
    return y.reshape(b, height, width, out)[:, : height - odd[0], : width - odd[1]]


def convolve(x: Features, kernel: Kernel) -> Convolved:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.checkpoint  # the upsampled image is not worth keeping for the gradient
def upsample_and_convolve(x: Features, kernel: Kernel) -> Convolved:
    return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


class Conv(nnx.Conv):
    """A 3 × 3 convolution that keeps height and width; zero: initialise the kernel to zero."""

    by_xla, by_winograd = staticmethod(convolve), staticmethod(partial(winograd, PLAIN))

    def __init__(self, channels: int, out: int, rngs: nnx.Rngs, *, zero: bool = False):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        super().__init__(channels, out, (3, 3), kernel_init=init, rngs=rngs)

    def __call__(self, x: Features) -> Convolved:
        kernel, bias = self.kernel[...], self.bias[...].reshape(1, 1, 1, -1)
        if min(kernel.shape[2:]) < MIN_CHANNELS or x.dtype != jnp.float32:
            return self.by_xla(x, kernel) + bias
        return jax.lax.platform_dependent(x, kernel, cpu=self.by_winograd, default=self.by_xla) + bias


class Upsample(Conv):
    """Nearest-neighbour upsampling by two, then a 3 × 3 convolution."""

    by_xla, by_winograd = staticmethod(upsample_and_convolve), staticmethod(partial(winograd, UPSAMPLED))


@jax.custom_vjp
def channel_moments(x: Features) -> tuple[PerChannel, PerChannel]:
    """Means of x and x² over each image, per channel, float32."""
    x = x.astype(jnp.float32)
    return x.mean((1, 2), keepdims=True), (x * x).mean((1, 2), keepdims=True)


def _channel_moments_backward(x: Array, gradient: tuple[Array, Array]) -> tuple[Array]:
    mean, square = (part / (x.shape[1] * x.shape[2]) for part in gradient)
    return ((mean + 2 * square * x).astype(x.dtype),)


channel_moments.defvjp(lambda x: (channel_moments(x), x), _channel_moments_backward)


@jax.custom_vjp
def affine_silu(x: Features, factor: PerChannel, offset: PerChannel) -> Features:
    """SiLU of y = factor * x + offset: y sigmoid(y)."""
    return nnx.silu(factor * x + offset).astype(x.dtype)


def _affine_silu_backward(inputs: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, factor, offset = inputs
    y = factor * x + offset
    gate = nnx.sigmoid(y)
    slope = gradient * gate * (1 + y * (1 - gate))  # d loss / dy
    factor_gradient, offset_gradient = (part.sum((1, 2), keepdims=True) for part in (slope * x, slope))
    return (slope * factor).astype(x.dtype), factor_gradient, offset_gradient


affine_silu.defvjp(lambda *inputs: (affine_silu(*inputs), inputs), _affine_silu_backward)


class GroupNorm(nnx.Module):
    """Group norm (Wu & He 2018), optionally with the scale and shift of adaptive group norm, and with SiLU."""

    def __init__(self, channels: int, *, silu: bool = False):
        self.groups, self.silu = math.gcd(32, channels), silu
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Features, scale: PerChannel | None = None, shift: PerChannel | None = None) -> Features:
        def over_group(moment: PerChannel) -> PerChannel:
            size = x.shape[-1] // self.groups
            return moment.reshape(-1, 1, 1, self.groups, size).mean(axis=4).repeat(size, axis=3)

        mean, square = map(over_group, channel_moments(x))
        weight, bias = (part[...].reshape(1, 1, 1, -1) for part in (self.scale, self.bias))
        factor = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + EPSILON) * weight
        offset = bias - mean * factor
        if scale is not None:
            factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
        return affine_silu(x, factor, offset) if self.silu else (factor * x + offset).astype(x.dtype)
