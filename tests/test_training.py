import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import make_train_step

import checkpoint
import dataloader
import parallel
import schedule as schedules
import training

KEYS = training.Keys(*jax.random.split(jax.random.key(7), len(training.Keys._fields)))
TEXT_DIM = 5


@pytest.fixture(scope="module")
def data():
    keys = jax.random.split(jax.random.key(1), 3)
    return dataloader.Data(
        images=jax.random.randint(keys[0], (7, 8, 12, 3), 0, 256).astype(jnp.uint8),
        text_emb=jax.random.normal(keys[1], (7, 7, TEXT_DIM)),
        text_mask=jnp.ones((7, 7), bool),
        null_emb=jax.random.normal(keys[2], (7, TEXT_DIM)),
        null_mask=jnp.ones(7, bool),
        index=dataloader.one_each(7),
    )


@pytest.fixture(scope="module")
def compiled(tiny):
    return training.build_train_step(tiny, training.structure(tiny, TEXT_DIM))


@functools.cache
def start(config):
    return training.init(config, TEXT_DIM, jax.random.key(0))


def fresh(config):
    """The same first state again, in buffers of its own: a step takes those it is given."""
    return jax.tree.map(jnp.copy, start(config))


def same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_stopping_and_going_on_equals_not_stopping(tiny, data, compiled, tmp_path):
    state = fresh(tiny)
    for _ in range(4):
        state, _ = compiled(state, data, KEYS)
    half = fresh(tiny)
    for _ in range(2):
        half, _ = compiled(half, data, KEYS)
    items = training.resumable(half)
    checkpoint.save(tmp_path / "epoch1", items, about={"step": 2})
    resumed = training.resumed(fresh(tiny), checkpoint.restore(checkpoint.newest(tmp_path), items))
    for _ in range(2):
        resumed, _ = compiled(resumed, data, KEYS)
    same(state._replace(records=()), resumed._replace(records=()))


def test_the_step_is_traced_once(tiny, data, monkeypatch):
    traces, sample_batch = [], dataloader.sample_batch
    monkeypatch.setattr(dataloader, "sample_batch", lambda *a, **k: traces.append(1) or sample_batch(*a, **k))
    state = fresh(tiny)
    step = training.build_train_step(tiny, training.structure(tiny, TEXT_DIM))
    for _ in range(3):
        state, _ = step(state, data, KEYS)
    state, _ = step(state._replace(records=parallel.replicate(training.no_records())), data, KEYS)
    assert len(traces) == 1


def test_several_steps_in_one_program_equal_as_many_by_themselves(tiny, data, compiled):
    one, n = fresh(tiny), 4
    for _ in range(n):
        one, loss = compiled(one, data, KEYS)
    together, last_loss = training.several(compiled, n)(fresh(tiny), data, KEYS)
    np.testing.assert_allclose(last_loss, loss, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, ((one.records, one.step), (together.records, together.step))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    tree = optax.tree
    moments = one.optimizer.mean
    assert tree.norm(tree.sub(moments, together.optimizer.mean)) < 1e-4 * tree.norm(moments)
    for found, expected in zip((together.weights, *together.ema), (one.weights, *one.ema), strict=True):
        moved = tree.norm(tree.sub(expected, start(tiny).weights))
        assert tree.norm(tree.sub(found, expected)) <= 0.01 * moved  # AdamW takes the sign even of a rounding error


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tiny, data, compiled):
    before = fresh(tiny)
    poisoned = data._replace(
        text_emb=jnp.full_like(data.text_emb, jnp.nan), null_emb=jnp.full_like(data.null_emb, jnp.nan)
    )
    after, loss = compiled(fresh(tiny), poisoned, KEYS)
    assert not jnp.isfinite(loss)
    same(before[:3], after[:3])
    assert (int(after.records.skipped), int(after.step)) == (1, 1)
    healed, _ = compiled(after, data, KEYS)
    assert (int(healed.records.skipped), float(healed.records.count.sum())) == (1, tiny.B)


def test_the_first_step_is_what_optax_makes_of_the_gradient(tiny, data):
    """The jitted step against its parts: the loss of equation 14, its gradient, AdamW's update."""
    tiny = dataclasses.replace(tiny, warmup=0)  # at step 0 of a warm-up nothing moves
    state = fresh(tiny)
    rates = {"B": tiny.B, "embedding_dropout": tiny.embedding_dropout}
    batch = dataloader.sample_batch(data, KEYS.order, KEYS.dropout, state.step, **rates)
    graphdef = training.structure(tiny, TEXT_DIM)
    schedule = schedules.cosine(tiny.T)

    def objective(weights, batch, noise_key):
        model = training.nnx.merge(graphdef, training.nnx.State(weights))
        t_key, eps_key = jax.random.split(jax.random.fold_in(noise_key, 0))
        t = jax.random.randint(t_key, (tiny.B,), 1, tiny.T + 1)
        noise = jax.random.normal(eps_key, batch.image.shape)
        mixed = schedule.alpha[t][:, None, None, None] * batch.image + schedule.sigma[t][:, None, None, None] * noise
        return jnp.mean((model(mixed, t, batch.text_emb, batch.text_mask) - noise) ** 2)

    loss, gradient = jax.jit(jax.value_and_grad(objective))(state.weights, batch, KEYS.noise)
    assert 0.8 < loss < 1.2  # the network starts as zero, the noise has unit variance
    clipped, _ = optax.clip_by_global_norm(tiny.clip).update(gradient, optax.EmptyState())
    optimizer = optax.adamw(tiny.learning_rate, weight_decay=tiny.weight_decay)
    optimizer_state = optimizer.init(state.weights)
    updates, optimizer_state = optimizer.update(clipped, optimizer_state, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    after, jitted_loss = training.build_train_step(tiny, graphdef)(state, data, KEYS)
    np.testing.assert_allclose(jitted_loss, loss, rtol=1e-5)
    for new, expected in zip(jax.tree.leaves(after.weights), jax.tree.leaves(weights), strict=True):
        differ = abs(new - expected) > 1e-4 * tiny.learning_rate
        assert differ.mean() < 0.01  # where the gradient is nothing but rounding, its sign is chance


def test_adamw_is_that_of_optax():
    draw = np.random.default_rng(0).normal
    weights = {"a": jnp.asarray(draw(size=(3, 4)), jnp.float32), "b": jnp.asarray(draw(size=5), jnp.float32)}
    optimizer = optax.adamw(0.03, weight_decay=0.1)
    state, expected = optimizer.init(weights), weights
    nothing = jax.tree.map(jnp.zeros_like, weights)
    moments = training.Moments(nothing, nothing, jnp.int32(0))
    for _ in range(20):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), jnp.float32), weights)
        updates, state = optimizer.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
        moments = training.moments_after(moments, gradient)
        weights = training.adamw(weights, moments, jnp.float32(0.03), 0.1)
    for found, wanted in zip(*map(jax.tree.leaves, (weights, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_an_average_keeps_its_length_as_a_share_of_the_run(length):
    """Karras et al. 2024, Eq. 4: step t counts in proportion to t^gamma, whose relative deviation is `length`."""
    steps = 2000
    decays = np.array([training.ema_decay(jnp.int32(step), length) for step in range(steps)], np.float64)
    share = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # of each step in the last average
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-4)  # nothing is left of the initial weights
    place = (np.arange(steps) + 1) / steps
    mean = (share * place).sum()
    np.testing.assert_allclose(np.sqrt((share * (place - mean) ** 2).sum()), length, rtol=1e-2)


def test_every_eighth_step_enters_the_averages_by_its_share(tiny, data, compiled):
    state, entered = fresh(tiny), []
    for step in range(2 * training.EMA_EVERY + 3):
        state, _ = compiled(state, data, KEYS)
        if step % training.EMA_EVERY == 0:
            entered.append(jax.tree.map(np.asarray, state.weights))
    for average, length in ((state.ema.short, tiny.ema_short), (state.ema.long, tiny.ema_long)):
        _, second, third = (float(training.ema_decay(jnp.int32(number), length)) for number in range(3))
        for found, *seen in zip(*map(jax.tree.leaves, (average, *entered)), strict=True):
            expected = third * (second * seen[0] + (1 - second) * seen[1]) + (1 - third) * seen[2]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


GOLDEN = dict(np.load(make_train_step.FILE))


@pytest.mark.parametrize(
    "no_op",
    [
        {},
        {"loss_weight": "min_snr", "snr_gamma": 1000.0},  # ε is then weighed by min(SNR, γ) / SNR, SNR below 1000
        {"augmentation": 1e-12, "dropout": 1e-12, "accumulate": 3},  # the network is told of no change, and drops none
    ],
    ids=str,
)
def test_options_at_their_no_op_value_leave_a_step_as_it_was_before_they_came(no_op):
    found = make_train_step.run(dataclasses.replace(make_train_step.CONFIG, **no_op))
    np.testing.assert_allclose(found["losses"], GOLDEN["losses"], rtol=5e-4)  # parts of a batch round differently
    if len(found["sizes"]) == len(GOLDEN["sizes"]):
        np.testing.assert_allclose(found["sizes"], GOLDEN["sizes"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_one_batch_can_be_learned(tiny, data, prediction):
    config = dataclasses.replace(
        tiny, prediction=prediction, B=5, learning_rate=5e-3, embedding_dropout=0.0, BASE_DIM=16
    )
    few = data._replace(images=data.images[:1] // 64 * 64, text_emb=data.text_emb[:1], text_mask=data.text_mask[:1])
    few = few._replace(index=dataloader.one_each(1))
    state = fresh(config)
    step = training.build_train_step(config, training.structure(config, TEXT_DIM))
    losses = []
    for _ in range(150):
        state, loss = step(state, few, KEYS)
        losses.append(loss)
    assert np.mean(losses[-10:]) < 0.35 * np.mean(losses[:10])


def test_records_sort_the_loss_by_noise_level(tiny, data, compiled):
    state, total = fresh(tiny), 0.0
    for _ in range(5):
        state, loss = compiled(state, data, KEYS)
        total += float(loss) * tiny.B
    assert float(state.records.count.sum()) == 5 * tiny.B
    np.testing.assert_allclose(state.records.loss.sum(), total, rtol=1e-5)
    assert float(state.records.grad_norm) > 0


def test_even_timesteps_meet_every_stretch_once_and_every_step_alike(tiny):
    config = dataclasses.replace(tiny, T=40, B=10, low_discrepancy=True)
    draws = jax.vmap(lambda key: training.random_steps(key, config))(jax.random.split(jax.random.key(0), 4000))
    stretches = np.sort((np.asarray(draws) - 1) // 4, axis=1)
    assert (stretches == np.arange(10)).mean() > 0.99  # rounding may put two on one border
    counts = np.bincount(np.asarray(draws).ravel(), minlength=41)
    assert counts[0] == 0
    assert len(counts) == 41
    np.testing.assert_allclose(counts[1:], 1000, atol=5 * np.sqrt(1000))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_of_the_clean_image_alike_for_every_prediction(tiny, prediction):
    """The loss of a wrong estimate of the image, made from that estimate in each prediction's own terms."""
    config = dataclasses.replace(tiny, prediction=prediction, loss_weight="min_snr", snr_gamma=3.0)
    schedule, t = schedules.from_config(config), jnp.array([1, 7, 20, 33, 49])
    keys = jax.random.split(jax.random.key(3), 3)
    image, noise, wrong = (jax.random.normal(key, (5, 2, 3, 1)) for key in keys)
    noisy = schedules.add_noise(schedule, image, noise, t)
    claimed = {
        "eps": schedules.eps_from_denoised(schedule, noisy, wrong, t),
        "v": schedules.v_from_denoised(schedule, noisy, wrong, t),
        "x0": wrong,
    }[prediction]
    batch = dataloader.Batch(image, jnp.zeros((5, 1, 1)), jnp.ones((5, 1), bool))
    losses = training.loss_at(lambda *_: claimed, batch, noise, t, schedule, prediction)
    snr = np.exp(np.asarray(schedule.log_snr, np.float64)[t])
    expected = np.minimum(snr, 3.0) * np.mean((wrong - image) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(training.loss_weight(schedule, t, config) * losses, expected, rtol=2e-3)


def test_accumulation_equals_the_large_batch(tiny, data):
    config = dataclasses.replace(tiny, B=6, embedding_dropout=0.5, loss_weight="min_snr", augmentation=0.5)
    graphdef, after = training.structure(config, TEXT_DIM), []
    for parts in (1, 3):
        step = training.build_train_step(dataclasses.replace(config, accumulate=parts), graphdef)
        state, loss = step(fresh(config), data, KEYS)
        after.append((loss, state.optimizer.mean, state.records))
    for one, other in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_then_falls_to_zero_at_the_last_step(tiny):
    for decay, half_way, end in (("constant", 0.1, 0.1), ("cosine", 0.05, 0), ("linear", 0.05, 0)):
        rate = training.learning_rate(dataclasses.replace(tiny, warmup=10, learning_rate=0.1, decay=decay), 110)
        np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.05, 0.1], atol=1e-6)
        np.testing.assert_allclose([rate(60), rate(110)], [half_way, end], atol=1e-6)


def test_steps_skipped_in_a_row_are_counted_across_readings(tiny, data, compiled):
    poisoned = data._replace(
        text_emb=jnp.full_like(data.text_emb, jnp.nan), null_emb=jnp.full_like(data.null_emb, jnp.nan)
    )
    state = fresh(tiny)
    for source in (poisoned, data, poisoned, poisoned):
        state, _ = compiled(state, source, KEYS)
    counts = [int(getattr(state.records, name)) for name in ("skipped", "forward", "streak", "longest")]
    assert counts == [3, 3, 2, 2]
    state, _ = compiled(state._replace(records=parallel.replicate(training.no_records(2))), poisoned, KEYS)
    assert int(state.records.longest) == 3
