"""The fast layers against Flax's plain ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import kernels
from kernels import Conv, GroupNorm, Upsample
from model import UNet


def normal(*shape, seed=0, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, shape), jnp.float32)


def plain(layer, x):
    return nnx.Conv.__call__(layer, x)


def upsampled(layer, x):
    return nnx.Conv.__call__(layer, x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("shape", [(2, 5, 8, 3), (1, 2, 3, 1), (3, 1, 1, 5)], ids=str)
@pytest.mark.parametrize(("kind", "expected"), [(Conv, plain), (Upsample, upsampled)])
def test_values_and_gradients_are_those_of_the_convolution(kind, expected, shape, monkeypatch):
    layer = kind(shape[-1], 6, nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x, factor = normal(*shape), 2 if kind is Upsample else 1
    weight = normal(shape[0], factor * shape[1], factor * shape[2], 6, seed=1)

    def value_and_gradients(function):
        def weighted(layer, x):
            y = function(layer, x)
            return (y * weight).sum(), y

        return jax.tree.leaves(nnx.jit(nnx.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(layer, x))

    right = value_and_gradients(expected)
    for min_channels in (1, 32):  # by Winograd, by XLA
        monkeypatch.setattr(kernels, "MIN_CHANNELS", min_channels)
        for found, value in zip(value_and_gradients(kind.__call__), right, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def operations(function, *arguments, platform="cpu"):
    """Matrix products and convolutions in the program of a function."""
    text = nnx.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")


@pytest.mark.parametrize(("kind", "products"), [(Conv, 16), (Upsample, 9)])
def test_a_cpu_multiplies_matrices_and_a_gpu_convolves(kind, products):
    layer, x = kind(32, 48, nnx.Rngs(0)), jnp.ones((2, 4, 4, 32))
    gradient = nnx.grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=(0, 1))
    assert operations(kind.__call__, layer, x) == (products, 0)
    assert operations(gradient, layer, x) == (3 * products, 0)
    assert operations(kind.__call__, layer, x, platform="cuda") == (0, 1)
    assert operations(gradient, layer, x, platform="cuda") == (0, 3)


def test_half_precision_is_convolved_everywhere():
    layer, x = Conv(32, 48, nnx.Rngs(0)), jnp.ones((2, 4, 4, 32))
    layer, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (layer, x))
    assert operations(Conv.__call__, layer, x) == (0, 1)


@pytest.mark.parametrize("channels", [(31, 48), (48, 31)], ids=str)
def test_few_channels_are_convolved_everywhere(channels):
    x = jnp.ones((2, 4, 4, channels[0]))
    assert operations(Conv.__call__, Conv(*channels, nnx.Rngs(0)), x) == (0, 1)


@pytest.mark.slow
def test_the_network_is_the_same_function_either_way(tiny, monkeypatch):
    config = dataclasses.replace(tiny, H=10, self_attention=(), cross_attention=())  # 5 rows below
    model = UNet(config, 6, nnx.Rngs(0))
    model.exit.kernel[...] = normal(*model.exit.kernel.shape)  # it starts as zeros
    inputs = normal(2, 10, 12, 3), jnp.array([3, 40]), normal(2, 5, 6), jnp.ones((2, 5), bool)

    def value_and_gradients(min_channels):
        monkeypatch.setattr(kernels, "MIN_CHANNELS", min_channels)

        def squared(model):
            prediction = model(*inputs)
            return (prediction**2).mean(), prediction

        return jax.tree.leaves(nnx.jit(nnx.value_and_grad(squared, has_aux=True))(model))

    for winograd, xla in zip(value_and_gradients(1), value_and_gradients(1000), strict=True):
        np.testing.assert_allclose(winograd, xla, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 7, 2, 40), (2, 4, 4, 1), (5, 2, 9, 33)], ids=str)
def test_adaptive_group_norm_with_silu_is_that_of_flax_and_so_are_its_gradients(shape):
    channels = shape[-1]
    ours = GroupNorm(channels, silu=True)
    theirs = nnx.GroupNorm(channels, num_groups=math.gcd(32, channels), rngs=nnx.Rngs(0))
    for layer in (ours, theirs):
        layer.scale[...], layer.bias[...] = normal(channels, seed=1, mean=1), normal(channels, seed=2)
    weight = normal(*shape, seed=3)
    scale, shift = (normal(shape[0], 1, 1, channels, seed=seed) for seed in (4, 5))

    def fast(layer, x, scale, shift):
        y = layer(x, scale, shift)
        return (y * weight).sum(), y

    def slow(layer, x, scale, shift):
        y = nnx.silu(layer(x) * (1 + scale) + shift)
        return (y * weight).sum(), y

    fast, slow = (nnx.jit(nnx.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True)) for f in (fast, slow))
    for mean, std in ((0, 1), (10, 0.5), (0, 1e-4)):
        x = normal(*shape, mean=mean, std=std)
        each = fast(ours, x, scale, shift), slow(theirs, x, scale, shift)
        for found, expected in zip(*map(jax.tree.leaves, each), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * max(1, abs(expected).max()))


def test_group_norm_without_scale_shift_and_silu_is_that_of_flax():
    x, ours, theirs = (
        normal(2, 3, 5, 6, mean=10, std=0.5),
        GroupNorm(6),
        nnx.GroupNorm(6, num_groups=2, rngs=nnx.Rngs(0)),
    )
    for layer in (ours, theirs):
        layer.scale[...], layer.bias[...] = normal(6, seed=1, mean=1), normal(6, seed=2)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_written_gradients_are_those_of_the_functions():
    def on_arrays(function):  # check_grads passes arrays of NumPy too
        return lambda *arrays: function(*map(jnp.asarray, arrays))

    x, factor, offset = normal(2, 3, 4, 5), normal(2, 1, 1, 5, seed=1), normal(2, 1, 1, 5, seed=2)
    tolerance = {"order": 1, "modes": ["rev"], "atol": 2e-2, "rtol": 2e-2}
    check_grads(jax.jit(on_arrays(kernels.affine_silu)), (x, factor, offset), **tolerance)
    check_grads(jax.jit(on_arrays(kernels.channel_moments)), (x,), **tolerance)


def test_bfloat16_images_have_float32_statistics():
    x = normal(2, 64, 64, 4, mean=3.0).astype(jnp.bfloat16)
    mean, square = jax.jit(kernels.channel_moments)(x)
    assert mean.dtype == square.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=(1, 2), keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(square, (exact**2).mean(axis=(1, 2), keepdims=True), rtol=1e-5)
    for silu in (False, True):
        value, backward = jax.vjp(GroupNorm(4, silu=silu), x)
        (gradient,) = backward(x)
        assert value.dtype == gradient.dtype == jnp.bfloat16
