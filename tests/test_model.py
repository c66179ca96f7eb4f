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
    H=12, W=20, CHANNELS=3, T_dim=4, T_out=10, BASE_DIM=8, DIM_MULTS=(1, 2), BLOCKS=1, HEAD_DIM=4,
    self_attention=(1,), cross_attention=(0, 1), TEXT_LEN=5, B=3,
)  # fmt: skip


def awake(config, seed=0):
    """A network whose zero-initialised layers are not zero."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: UNet(config, TEXT_DIM, nnx.Rngs(0))))
    draw = np.random.default_rng(seed).normal
    return nnx.merge(graphdef, jax.tree.map(lambda w: jnp.asarray(0.2 * draw(size=w.shape), w.dtype), weights))


@nnx.jit
def run(model, *batch):
    return model(*batch)


def inputs(config, seed=1):
    picture_key, text_key = jax.random.split(jax.random.key(seed))
    noisy = jax.random.normal(picture_key, (config.B, config.H, config.W, config.CHANNELS))
    text = jax.random.normal(text_key, (config.B, config.TEXT_LEN, TEXT_DIM))
    mask = jnp.arange(config.TEXT_LEN)[None, :] < jnp.array([2, 5, 3])[:, None]
    return noisy, jnp.array([1, 500, 1000]), text, mask


@pytest.mark.parametrize(
    "change",
    [
        {"CHANNELS": 1},
        {"CHANNELS": 4, "PATCH": 2},
        {"H": 4, "W": 28, "PATCH": 2},
        {"DIM_MULTS": (3,), "self_attention": (), "cross_attention": ()},
        {"DIM_MULTS": (1, 1, 3), "BLOCKS": 3, "self_attention": (0, 2)},
        {"BASE_DIM": 20},  # the number of groups of a norm must divide it
    ],
    ids=str,
)
def test_output_has_the_shape_of_the_picture_and_starts_at_zero(change):
    config = dataclasses.replace(TINY, **change)
    noisy, *rest = inputs(config)
    assert (nnx.jit(lambda *batch: UNet(config, TEXT_DIM, nnx.Rngs(0))(*batch))(noisy, *rest) == 0).all()
    out = run(awake(config), noisy, *rest)
    assert out.shape == noisy.shape
    assert out.std() > 0.01


def test_dropout_changes_training_by_chance_and_leaves_drawing_alone():
    config = dataclasses.replace(TINY, dropout=0.5)
    model, batch = awake(config), inputs(config)
    plain = run(model, *batch)
    np.testing.assert_array_equal(plain, run(awake(TINY), *batch))
    one, other = (run(model, *batch, None, jax.random.key(seed)) for seed in (0, 1))
    assert (abs(one - plain).max() > 0.01) & (abs(one - other).max() > 0.01)


def test_the_network_is_told_of_changes_to_the_picture_and_of_none_by_silence():
    config = dataclasses.replace(TINY, augmentation=0.5)
    model, batch = awake(config), inputs(config)
    none, some = jnp.zeros((config.B, len(LABELS))), jnp.eye(config.B, len(LABELS))
    np.testing.assert_allclose(run(model, *batch), run(model, *batch, none), atol=1e-5)
    assert abs(run(model, *batch, some) - run(model, *batch)).max() > 1e-3
    weights = nnx.state(UNet(config, TEXT_DIM, nnx.Rngs(0)))
    assert not weights["augmentation"]["kernel"][...].any()  # so that it starts by ignoring them


def products(jaxpr):
    """The types of whatever is multiplied by matrix product or convolution."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (factor.aval.dtype for factor in equation.invars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)


def test_bfloat16_is_inside_only_and_close_to_float32():
    graphdef, weights = nnx.split(awake(TINY))
    weights = nnx.to_pure_dict(weights)
    batch = inputs(TINY)
    half = dataclasses.replace(TINY, compute="bfloat16")
    exact, rounded = (jax.jit(network(config, graphdef, weights))(*batch) for config in (TINY, half))
    assert exact.dtype == rounded.dtype == jnp.float32
    error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.05  # the mantissa has 8 bits
    factors = list(products(jax.make_jaxpr(network(half, graphdef, weights))(*batch).jaxpr))
    assert len(factors) > 20
    assert set(factors) == {jnp.dtype("bfloat16")}
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(network(half, graphdef, w)(*batch) ** 2)))(weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_unpatchify_undoes_patchify(size):
    image = jax.random.normal(jax.random.key(0), (2, 3 * size, 7 * size, 3))
    folded = patchify(image, size)
    assert folded.shape == (2, 3, 7, 3 * size**2)
    np.testing.assert_array_equal(folded[1, 2, 4].ravel(), image[1, 2 * size : 3 * size, 4 * size : 5 * size].ravel())
    np.testing.assert_array_equal(unpatchify(folded, size), image)


def test_hidden_tokens_change_nothing_and_visible_ones_do():
    model = awake(TINY)
    noisy, t, text, mask = inputs(TINY)
    out = run(model, noisy, t, text, mask)
    hidden = jnp.where(mask[:, :, None], text, 99.0)
    np.testing.assert_allclose(run(model, noisy, t, hidden, mask), out, rtol=1e-5, atol=1e-5)
    longer = jnp.pad(text, ((0, 0), (0, 3), (0, 0)))
    np.testing.assert_allclose(run(model, noisy, t, longer, jnp.pad(mask, ((0, 0), (0, 3)))), out, rtol=1e-4, atol=1e-5)
    assert jnp.abs(run(model, noisy, t, text.at[:, 0].multiply(-1.0), mask) - out).max() > 1e-3


def test_pictures_of_a_batch_do_not_see_each_other():
    model = awake(TINY)
    batch = inputs(TINY)
    out = run(model, *batch)
    for i in range(TINY.B):
        alone = run(model, *(part[i : i + 1] for part in batch))
        np.testing.assert_allclose(alone[0], out[i], rtol=1e-4, atol=1e-5)


def test_every_weight_has_a_gradient():
    model = awake(TINY)
    graphdef, weights = nnx.split(model, nnx.Param)
    batch = inputs(TINY)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(nnx.merge(graphdef, w)(*batch) ** 2)))(weights)
    dead = [path for path, leaf in jax.tree.leaves_with_path(gradient) if not jnp.abs(leaf).max() > 0]
    assert not dead


def test_cross_attention_is_softmax_attention():
    """Against a transcription of Vaswani et al. 2017, Eq. 1, in numpy, one head at a time."""
    layer = Attention(8, 4, nnx.Rngs(0), context=TEXT_DIM)
    layer.out.kernel[...] = jnp.eye(8)
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 8))
    context = jax.random.normal(jax.random.key(2), (2, 7, TEXT_DIM))
    mask = jnp.arange(7)[None, :] < jnp.array([4, 7])[:, None]
    out = np.asarray(layer(x, context, mask) - x).reshape(2, 15, 8)
    for b, visible in enumerate((4, 7)):
        query = np.asarray(layer.query(layer.norm(x[b : b + 1]).reshape(15, 8)))
        key, value = np.split(np.asarray(layer.key_value(context[b, :visible])), 2, axis=-1)
        for head in (slice(0, 4), slice(4, 8)):
            logits = query[:, head] @ key[:, head].T / 2
            share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            np.testing.assert_allclose(out[b, :, head], share @ value[:, head], rtol=1e-4, atol=1e-5)


def test_timesteps_are_told_apart():
    embedded = sinusoid(jnp.arange(1001), 32)
    assert embedded.shape == (1001, 32)
    np.testing.assert_allclose(embedded[3, 0], np.sin(3), rtol=1e-5)
    np.testing.assert_allclose((embedded**2).sum(1), 16, rtol=1e-5)
    assert np.linalg.norm(np.diff(embedded, axis=0), axis=1).min() > 0.5
    assert TimestampNet(32, 7, nnx.Rngs(0))(jnp.arange(3)).shape == (3, 7)
