"""Both ways to convolve, against XLA's convolution with flax's padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv
from conv import Conv3x3, Upsample


@pytest.fixture
def few(monkeypatch, request):
    """How many channels are too few for products."""
    monkeypatch.setattr(conv, "FEW", request.param)


def plain(layer, x):
    return nnx.Conv.__call__(layer, x)


def doubled(layer, x):
    return nnx.Conv.__call__(layer, x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("few", [1, 32], indirect=True)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 2), (3, 1, 4, 5), (2, 6, 8, 4), (1, 2, 3, 1)], ids=str)
@pytest.mark.parametrize(("kind", "expected"), [(Conv3x3, plain), (Upsample, doubled)])
def test_values_and_gradients_are_those_of_the_convolution(kind, expected, shape, few):
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


@pytest.mark.parametrize(("kind", "products"), [(Conv3x3, 16), (Upsample, 9)])
def test_a_cpu_multiplies_matrices_and_a_gpu_convolves(kind, products):
    layer, x = kind(32, 48, nnx.Rngs(0)), jnp.ones((2, 4, 4, 32))
    traced = nnx.jit(kind.__call__).trace(layer, x)
    programs = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    counts = {
        platform: (text.count("stablehlo.dot_general"), text.count("stablehlo.convolution"))
        for platform, text in programs.items()
    }
    assert counts == {"cpu": (products, 0), "cuda": (0, 1)}


@pytest.mark.parametrize("channels", [(31, 48), (48, 31)], ids=str)
def test_few_channels_are_convolved_everywhere(channels):
    x = jnp.ones((2, 4, 4, channels[0]))
    text = nnx.jit(Conv3x3.__call__).trace(Conv3x3(*channels, nnx.Rngs(0)), x).lower().as_text()
    assert (text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")) == (0, 1)
