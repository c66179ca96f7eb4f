"""The objective and a training step of the U-Net itself; the rest of the step is tested in test_training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_training import KEY, ROWS, TEXT_DIM, build, fresh, near, rows, seven, start, take  # noqa: F401

import dataloader
import schedule as schedules
from model import abstract


def test_the_loss_and_its_gradient_are_those_of_equation_14(tiny, data):
    """The jitted step against its parts, written out; AdamW's first update is the sign of the gradient, so of that."""
    state, (graphdef, _), schedule = fresh(tiny), abstract(tiny, TEXT_DIM), schedules.cosine(tiny.T)
    image = dataloader.to_float(data.images[ROWS.images[0]])
    text_emb, text_mask = data.text_emb[ROWS.captions[0]], data.text_mask[ROWS.captions[0]]

    def objective(weights):
        predict = nnx.merge(graphdef, nnx.State(weights))
        t_key, noise_key, _, _ = jax.random.split(jax.random.fold_in(KEY, 0), 4)
        t = 1 + (tiny.T * jax.random.uniform(t_key, (tiny.B,))).astype(jnp.int32)
        noise = jax.random.normal(noise_key, image.shape)
        mixed = schedule.alpha[t][:, None, None, None] * image + schedule.sigma[t][:, None, None, None] * noise
        return jnp.mean((predict(mixed, t, text_emb, text_mask) - noise) ** 2)

    loss, gradient = jax.jit(jax.value_and_grad(objective))(state.weights)
    assert 0.8 < loss < 1.2  # the network starts as zero, the noise has unit variance
    after, jitted_loss = take(tiny, state, data, 1)
    np.testing.assert_allclose(jitted_loss, loss, rtol=1e-4)
    clipped, _ = optax.clip_by_global_norm(tiny.clip).update(gradient, optax.EmptyState())
    near(optax.tree.get(after.opt_state, "mu"), jax.tree.map(lambda leaf: 0.1 * leaf, clipped))  # 1 - beta1
    np.testing.assert_allclose(after.metrics.grad_norm, optax.tree.norm(gradient), rtol=1e-3)


def test_augmentation_and_dropout_that_never_happen_leave_a_step_as_it_is(tiny, data):
    """A network that is told of no change and drops nothing."""
    plain, loss = take(tiny, fresh(tiny), data, 1)
    config = dataclasses.replace(tiny, augmentation=1e-12, dropout=1e-12)
    weights = {**start(config).weights, **start(tiny).weights}  # but for the layer that learns of augmentation
    state = fresh(config)._replace(weights=jax.tree.map(jnp.copy, weights))
    found, found_loss = build(config)(state, data, rows(0), KEY)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-4)
    np.testing.assert_allclose(found.metrics.grad_norm, plain.metrics.grad_norm, rtol=1e-3)
    near(found.metrics.loss, plain.metrics.loss)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_one_batch_can_be_learned(tiny, data, prediction):
    config = dataclasses.replace(tiny, prediction=prediction, B=5)
    few = data._replace(images=data.images[:1] // 64 * 64)
    state, losses, zeros = fresh(config), [], dataloader.Rows(*np.zeros((2, 1, 5), np.int32))
    for _ in range(200):
        state, loss = build(config)(state, few, zeros, KEY)
        losses.append(loss)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
