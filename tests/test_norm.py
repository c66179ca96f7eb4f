import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import kernels


def numbers(*shape, seed=0, mean=0.0, width=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, width, shape), jnp.float32)


def pair(channels):
    """This group norm and Flax's, with the same scale and bias."""
    ours, theirs = (
        kernels.GroupNorm(channels),
        nnx.GroupNorm(channels, num_groups=math.gcd(32, channels), rngs=nnx.Rngs(0)),
    )
    for each in (ours, theirs):
        each.scale[...], each.bias[...] = numbers(channels, seed=1, mean=1), numbers(channels, seed=2)
    return ours, theirs


SHAPES = [(2, 3, 5, 6), (1, 1, 1, 64), (3, 7, 2, 40), (2, 4, 4, 1), (5, 2, 9, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mean", "width"), [(0, 1), (10, 0.5), (0, 1e-4)])
def test_norm_and_silu_are_those_of_flax_and_so_are_their_gradients(shape, mean, width):
    ours, theirs = pair(shape[-1])
    x, weight = numbers(*shape, mean=mean, width=width), numbers(*shape, seed=3)
    scale, shift = numbers(shape[0], 1, 1, shape[-1], seed=4), numbers(shape[0], 1, 1, shape[-1], seed=5)

    def short(model, x, scale, shift):
        factor, offset = model.affine(x)
        return (kernels.affine_silu(x, factor * (1 + scale), offset * (1 + scale) + shift) * weight).sum()

    def long(model, x, scale, shift):
        return (nnx.silu(model(x) * (1 + scale) + shift) * weight).sum()

    each = (
        nnx.jit(nnx.value_and_grad(f, argnums=(0, 1, 2, 3)))(model, x, scale, shift)
        for f, model in ((short, ours), (long, theirs))
    )
    for found, expected in zip(*map(jax.tree.leaves, each), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * max(1, abs(expected).max()))
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_written_gradients_are_those_of_the_functions():
    x, factor, offset = numbers(2, 3, 4, 5), numbers(2, 1, 1, 5, seed=1), numbers(2, 1, 1, 5, seed=2)
    check_grads(kernels.affine_silu, (x, factor, offset), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    check_grads(kernels.channel_moments, (x,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_bfloat16_pictures_have_float32_statistics():
    x = numbers(2, 64, 64, 4, mean=3.0).astype(jnp.bfloat16)
    mean, square = kernels.channel_moments(x)
    assert mean.dtype == square.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=(1, 2), keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(square, (exact**2).mean(axis=(1, 2), keepdims=True), rtol=1e-5)
    layer = kernels.GroupNorm(4)
    gradient = jax.grad(lambda x: kernels.affine_silu(x, *layer.affine(x)).astype(jnp.float32).sum())(x)
    assert layer(x).dtype == kernels.affine_silu(x, *layer.affine(x)).dtype == gradient.dtype == jnp.bfloat16
