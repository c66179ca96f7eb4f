"""Both ways to convolve, against XLA's convolution with flax's padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels
from kernels import Conv3x3, Upsample
from model import UNet


def plain(layer, x):
    return nnx.Conv.__call__(layer, x)


def doubled(layer, x):
    return nnx.Conv.__call__(layer, x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("few", [1, 32])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 2), (3, 1, 4, 5), (2, 6, 8, 4), (1, 2, 3, 1)], ids=str)
@pytest.mark.parametrize(("kind", "expected"), [(Conv3x3, plain), (Upsample, doubled)])
def test_values_and_gradients_are_those_of_the_convolution(kind, expected, shape, few, monkeypatch):
    monkeypatch.setattr(kernels, "FEW", few)
    layer = kind(shape[-1], 6, nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x = jax.random.normal(jax.random.key(1), shape)
    weight = jax.random.normal(jax.random.key(2), expected(layer, x).shape)

    def value_and_gradients(f):
        def weighed(layer, x):
            return (f(layer, x) * weight).sum(), f(layer, x)

        return jax.tree.leaves(nnx.jit(nnx.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(layer, x))

    for found, right in zip(*map(value_and_gradients, (kind.__call__, expected)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


def operations(function, *arguments, platform="cpu"):
    """Matrix products and convolutions in the program of a function."""
    text = nnx.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")


@pytest.mark.parametrize(("kind", "products"), [(Conv3x3, 16), (Upsample, 9)])
def test_a_cpu_multiplies_matrices_and_a_gpu_convolves(kind, products):
    layer, x = kind(32, 48, nnx.Rngs(0)), jnp.ones((2, 4, 4, 32))
    gradient = nnx.grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=(0, 1))
    assert operations(kind.__call__, layer, x) == (products, 0)
    assert operations(gradient, layer, x) == (3 * products, 0)
    assert operations(kind.__call__, layer, x, platform="cuda") == (0, 1)
    assert operations(gradient, layer, x, platform="cuda") == (0, 3)


def test_half_precision_is_convolved_everywhere():
    layer, x = Conv3x3(32, 48, nnx.Rngs(0)), jnp.ones((2, 4, 4, 32))
    layer, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (layer, x))
    assert operations(Conv3x3.__call__, layer, x) == (0, 1)


@pytest.mark.parametrize("channels", [(31, 48), (48, 31)], ids=str)
def test_few_channels_are_convolved_everywhere(channels):
    x = jnp.ones((2, 4, 4, channels[0]))
    assert operations(Conv3x3.__call__, Conv3x3(*channels, nnx.Rngs(0)), x) == (0, 1)


def test_the_network_is_the_same_function_either_way(tiny, monkeypatch):
    config = dataclasses.replace(tiny, H=10, self_attention=(), cross_attention=())  # 5 rows below
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(keys[0], (2, 10, 12, 3)), jnp.array([3, 40]), jax.random.normal(keys[1], (2, 5, 6))
    model = UNet(config, 6, nnx.Rngs(keys[2]))
    model.exit.kernel[...] = jax.random.normal(keys[3], model.exit.kernel.shape)  # it starts as zeros

    def value_and_gradients(few):
        monkeypatch.setattr(kernels, "FEW", few)

        def squared(model):
            drawn = model(*inputs, jnp.ones((2, 5), bool))
            return (drawn**2).mean(), drawn

        return jax.tree.leaves(nnx.jit(nnx.value_and_grad(squared, has_aux=True))(model))

    for products, library in zip(value_and_gradients(1), value_and_gradients(1000), strict=True):
        np.testing.assert_allclose(products, library, rtol=2e-3, atol=2e-4)
