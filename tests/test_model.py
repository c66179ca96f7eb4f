import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from augmentation import LABELS
from model import Attention, TimestampNet, UNet, network, patchify, sinusoid, unpatchify
from params import Params

TEXT_DIM = 6
TINY = Params(
    H=12, W=20, CHANNELS=4, PATCH=2, T_dim=4, T_out=10, BASE_DIM=12, DIM_MULTS=(1, 2), BLOCKS=1, HEAD_DIM=4,
    self_attention=(1,), cross_attention=(0, 1), TEXT_LEN=5, B=3, dropout=0.5, augmentation=0.5,
)  # fmt: skip
VISIBLE = (2, 5, 3)  # tokens of each caption


def unet(config):
    return lambda *batch: UNet(config, TEXT_DIM, nnx.Rngs(0))(*batch)


@pytest.fixture(scope="module")
def model():
    """A network whose zero-initialised layers are not zero."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: UNet(TINY, TEXT_DIM, nnx.Rngs(0))))
    normal = np.random.default_rng(0).normal
    return nnx.merge(graphdef, jax.tree.map(lambda w: jnp.asarray(0.2 * normal(size=w.shape), w.dtype), weights))


@pytest.fixture(scope="module")
def fresh():
    return UNet(TINY, TEXT_DIM, nnx.Rngs(0))


@nnx.jit
def run(model, *batch):
    return model(*batch)


def inputs(config=TINY):
    image_key, text_key = jax.random.split(jax.random.key(1))
    noisy = jax.random.normal(image_key, (config.B, config.H, config.W, config.CHANNELS))
    text = jax.random.normal(text_key, (config.B, config.TEXT_LEN, TEXT_DIM))
    mask = jnp.arange(config.TEXT_LEN)[None, :] < jnp.array(VISIBLE)[:, None]
    return noisy, jnp.array([1, 500, 1000]), text, mask


@pytest.mark.parametrize(
    "change",
    [
        {"CHANNELS": 1, "PATCH": 1},
        {"H": 4, "W": 28},
        {"DIM_MULTS": (3,), "self_attention": (), "cross_attention": ()},
        {"DIM_MULTS": (1, 1, 3), "H": 24, "W": 8, "BLOCKS": 3, "self_attention": (0, 2)},
        {"H": 8, "W": 24, "PATCH": 4, "REFINER": 6, "prediction": "x0"},
        {"BASE_DIM": 20},  # the number of groups of a norm must divide it
    ],
    ids=str,
)
def test_output_has_the_shape_of_the_image(change):
    config = dataclasses.replace(TINY, **change)
    batch = inputs(config)
    assert jax.eval_shape(unet(config), *batch).shape == batch[0].shape


def test_the_network_starts_at_zero_and_ignores_augmentation(model, fresh):
    assert (run(fresh, *inputs()) == 0).all()
    assert run(model, *inputs()).std() > 0.01
    assert not fresh.augmentation.kernel[...].any()


def test_a_refiner_mends_what_the_network_without_it_says_and_sees_nothing_else():
    """It is given the picture that its four layers are to mend, and not the noisy one."""
    config = dataclasses.replace(TINY, H=16, W=24, PATCH=4, REFINER=6, prediction="x0")
    graphdef, weights = nnx.split(UNet(config, TEXT_DIM, nnx.Rngs(0)))
    normal = np.random.default_rng(0).normal
    whole = nnx.merge(graphdef, jax.tree.map(lambda w: jnp.asarray(0.2 * normal(size=w.shape), w.dtype), weights))
    refiner, batch, asked = whole.refiner, inputs(config), []
    refined = whole(*batch)
    whole.refiner = lambda *inputs: asked.append(inputs) or inputs[0]
    coarse = whole(*batch)
    ((_, condition, _),) = asked
    np.testing.assert_allclose(refiner(coarse, condition, None), refined, rtol=1e-4, atol=1e-5)
    assert abs(refined - coarse).max() > 0.1
    assert (UNet(config, TEXT_DIM, nnx.Rngs(0))(*batch) == 0).all()


def test_dropout_is_random_and_needs_a_key(model):
    batch = inputs()
    plain = run(model, *batch)
    one, other = (run(model, *batch, None, jax.random.key(seed)) for seed in (0, 1))
    assert (abs(one - plain).max() > 0.01) & (abs(other - plain).max() > 0.01) & (abs(one - other).max() > 0.01)
    without = dataclasses.replace(TINY, dropout=0.0)
    programs = [str(jax.make_jaxpr(unet(config))(*batch)) for config in (TINY, without)]
    assert programs[0] == programs[1]


def test_the_network_is_told_of_augmentation_and_of_none_by_silence(model):
    batch = inputs()
    none, some = jnp.zeros((TINY.B, len(LABELS))), jnp.eye(TINY.B, len(LABELS))
    np.testing.assert_allclose(run(model, *batch), run(model, *batch, none), atol=1e-5)
    assert abs(run(model, *batch, some) - run(model, *batch)).max() > 1e-3


def products(jaxpr):
    """The types of whatever is multiplied by matrix product or convolution."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (factor.aval.dtype for factor in equation.invars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)


def test_bfloat16_is_inside_only_and_close_to_float32(model):
    weights, batch = nnx.to_pure_dict(nnx.state(model)), inputs()
    half = dataclasses.replace(TINY, compute="bfloat16")
    exact, rounded = run(model, *batch), jax.jit(network(half, weights))(*batch)
    assert exact.dtype == rounded.dtype == jnp.float32
    error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.05  # the mantissa has 8 bits
    factors = list(products(jax.make_jaxpr(network(half, weights))(*batch).jaxpr))
    assert len(factors) > 20
    assert set(factors) == {jnp.dtype("bfloat16")}
    gradient = jax.eval_shape(jax.grad(lambda w: jnp.sum(network(half, w)(*batch) ** 2)), weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_unpatchify_undoes_patchify(size):
    image = jax.random.normal(jax.random.key(0), (2, 3 * size, 7 * size, 3))
    patches = patchify(image, size)
    assert patches.shape == (2, 3, 7, 3 * size**2)
    np.testing.assert_array_equal(patches[1, 2, 4].ravel(), image[1, 2 * size : 3 * size, 4 * size : 5 * size].ravel())
    np.testing.assert_array_equal(unpatchify(patches, size), image)


def test_hidden_tokens_change_nothing_and_visible_ones_do(model):
    noisy, t, text, mask = inputs()
    out = run(model, noisy, t, text, mask)
    hidden = jnp.where(mask[:, :, None], text, 99.0)
    np.testing.assert_allclose(run(model, noisy, t, hidden, mask), out, rtol=1e-5, atol=1e-5)
    assert jnp.abs(run(model, noisy, t, text.at[:, 0].multiply(-1.0), mask) - out).max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other_nor_how_far_a_caption_is_padded(model):
    batch = inputs()
    out = run(model, *batch)
    for i in range(TINY.B):
        noisy, t, text, mask = (part[i : i + 1] for part in batch)
        text, mask = jnp.pad(text, ((0, 0), (0, 3), (0, 0))), jnp.pad(mask, ((0, 0), (0, 3)))
        np.testing.assert_allclose(run(model, noisy, t, text, mask)[0], out[i], rtol=1e-4, atol=1e-5)


def test_every_weight_has_a_gradient(model):
    """More than rounding: groups of one channel would take the gradient from the bias of the convolution before."""
    graphdef, weights = nnx.split(model, nnx.Param)
    batch = *inputs(), jnp.ones((TINY.B, len(LABELS)))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(nnx.merge(graphdef, w)(*batch) ** 2)))(weights)
    dead = [path for path, leaf in jax.tree.leaves_with_path(gradient) if not jnp.abs(leaf).max() > 1e-3]
    assert not dead


def test_cross_attention_is_softmax_attention():
    """Against a transcription of Vaswani et al. 2017, Eq. 1, in numpy, one head at a time."""
    layer = Attention(8, 4, nnx.Rngs(0), context=TEXT_DIM)
    layer.out.kernel[...] = jnp.eye(8)
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 8))
    context = jax.random.normal(jax.random.key(2), (2, 7, TEXT_DIM))
    mask = jnp.arange(7)[None, :] < jnp.array([4, 7])[:, None]
    out = np.asarray(run(layer, x, context, mask) - x).reshape(2, 15, 8)
    query = np.asarray(layer.query(layer.norm(x).reshape(2, 15, 8)))
    keys, values = np.split(np.asarray(layer.key_value(context)), 2, axis=-1)
    for b, visible in enumerate((4, 7)):
        for head in (slice(0, 4), slice(4, 8)):
            logits = query[b, :, head] @ keys[b, :visible, head].T / 2
            share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            np.testing.assert_allclose(out[b, :, head], share @ values[b, :visible, head], rtol=1e-4, atol=1e-5)


def test_timesteps_are_told_apart():
    embedded = sinusoid(jnp.arange(1001), 32)
    assert embedded.shape == (1001, 32)
    np.testing.assert_allclose(embedded[3, 0], np.sin(3), rtol=1e-5)
    np.testing.assert_allclose((embedded**2).sum(1), 16, rtol=1e-5)
    assert np.linalg.norm(np.diff(embedded, axis=0), axis=1).min() > 0.5
    assert TimestampNet(32, 7, nnx.Rngs(0))(jnp.arange(3)).shape == (3, 7)
