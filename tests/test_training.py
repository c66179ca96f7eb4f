"""The training step around the network: here a linear one, which compiles in a moment (the U-Net: test_objective)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import checkpoint
import dataloader
import ema
import parallel
import schedule as schedules
import training

KEY = jax.random.key(7)
TEXT_DIM = 5
ROWS = dataloader.Rows(np.int32([[3, 1, 6], [0, 5, 2], [4, 4, 1], [6, 0, 3]]), np.int32([[4, 0, 7], [1, 6, 3]] * 2))


@pytest.fixture(autouse=True, scope="module")
def linear(linear_network):
    for cached in (build, start):
        cached.cache_clear()
    with linear_network():
        yield
    for cached in (build, start):
        cached.cache_clear()


@pytest.fixture(scope="module", name="data")
def seven():
    """Seven pictures with a caption each; row 0 of the captions is the empty one."""
    keys = jax.random.split(jax.random.key(1), 2)
    return dataloader.Data(
        images=jax.random.randint(keys[0], (7, 8, 12, 3), 0, 256).astype(jnp.uint8),
        text_emb=jax.random.normal(keys[1], (8, 7, TEXT_DIM)),
        text_mask=jnp.ones((8, 7), bool),
    )


def rows(step, n=1):
    """The rows of n steps."""
    return jax.tree.map(lambda part: np.take(part, range(step, step + n), axis=0, mode="wrap"), ROWS)


@functools.cache
def build(config):
    return training.build_train_step(config, steps=100)


@functools.cache
def start(config):
    return parallel.replicate(training.init_state(config, TEXT_DIM, jax.random.key(0)))


def fresh(config):
    """The same first state again, in buffers of its own: a step takes those it is given."""
    return jax.tree.map(jnp.copy, start(config))


def take(config, state, data, steps, step=0):
    for number in range(step, step + steps):
        state, loss = build(config)(state, data, rows(number), KEY)
    return state, loss


def same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def near(a, b, share=1e-3):
    """Two trees differ by at most a share of their size, each taken as one vector."""
    a, b = (jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    assert jnp.linalg.norm(a - b) <= share * jnp.linalg.norm(b)


def test_stopping_and_going_on_equals_not_stopping(tiny, data, tmp_path):
    whole, _ = take(tiny, fresh(tiny), data, 4)
    half, _ = take(tiny, fresh(tiny), data, 2)
    items = training.to_checkpoint(half)
    checkpoint.Saver().save(tmp_path / "epoch1", items, about={"step": 2}, now=True)
    resumed = training.from_checkpoint(checkpoint.restore(tmp_path / "epoch1", items))
    resumed, _ = take(tiny, parallel.replicate(resumed), data, 2, step=2)
    same(whole._replace(metrics=()), resumed._replace(metrics=()))


def test_the_step_is_traced_once(tiny, data, monkeypatch):
    traces, batch = [], dataloader.batch
    monkeypatch.setattr(dataloader, "batch", lambda *a: traces.append(1) or batch(*a))
    step, state = training.build_train_step(tiny), fresh(tiny)
    for number in range(3):
        state, _ = step(state, data, rows(number), KEY)
        state = state._replace(metrics=parallel.replicate(training.zero_metrics()))
    assert len(traces) == 1


def test_several_steps_in_one_program_equal_as_many_by_themselves(tiny, data):
    apart, loss = take(tiny, fresh(tiny), data, 3)
    at_once, last_loss = build(tiny)(fresh(tiny), data, rows(0, 3), KEY)
    np.testing.assert_allclose(last_loss, loss, rtol=1e-3)
    assert int(at_once.step) == 3
    near(at_once.metrics.loss, apart.metrics.loss)
    near(at_once.opt_state, apart.opt_state)


def test_a_batch_without_rows_is_taken_as_it_is(tiny, data):
    images, captions = rows(0).images[0], rows(0).captions[0]
    chosen = dataloader.Data(data.images[images], data.text_emb[captions], data.text_mask[captions])
    one, loss = build(tiny)(fresh(tiny), data, rows(0), KEY)
    other, same_loss = build(tiny)(fresh(tiny), chosen, None, KEY)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-4)
    near(one.opt_state, other.opt_state)


def poisoned(data):
    return data._replace(text_emb=jnp.full_like(data.text_emb, jnp.nan))


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tiny, data):
    before = fresh(tiny)
    after, loss = take(tiny, fresh(tiny), poisoned(data), 1)
    assert not jnp.isfinite(loss)
    same((before.weights, before.opt_state), (after.weights, after.opt_state))
    assert (int(after.metrics.skipped), int(after.metrics.streak), int(after.step)) == (1, 1, 1)
    after, _ = take(tiny, after, poisoned(data), 1, step=1)
    assert (int(after.metrics.skipped), int(after.metrics.streak)) == (2, 2)
    after = after._replace(metrics=parallel.replicate(training.zero_metrics(2)))
    after, _ = take(tiny, after, poisoned(data), 1, step=2)
    assert (int(after.metrics.skipped), int(after.metrics.streak)) == (1, 3)
    healed, _ = take(tiny, after, data, 1, step=3)
    assert (int(healed.metrics.skipped), int(healed.metrics.streak), float(healed.metrics.count.sum())) == (
        1,
        0,
        tiny.B,
    )


def test_noise_levels_of_equal_weight_leave_a_step_as_it_is(tiny, data, monkeypatch):
    """Noise weighed by min(SNR, γ) / SNR with a vast γ."""
    monkeypatch.setattr(training, "SNR_GAMMA", 1e9)
    plain, loss = take(tiny, fresh(tiny), data, 1)
    found, found_loss = take(dataclasses.replace(tiny, loss_weight="min_snr"), fresh(tiny), data, 1)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-4)
    near((found.metrics.loss, found.metrics.grad_norm), (plain.metrics.loss, plain.metrics.grad_norm))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_random_steps_follow_the_density_of_the_shift(tiny, shift):
    """Against the cumulative distribution s / (k - (k - 1) s) of s = t / T, by the bound of Dvoretzky and others."""
    many = 20_000
    steps = training.random_steps(jax.random.key(0), dataclasses.replace(tiny, B=many, timestep_shift=shift))
    assert (int(steps.min()), int(steps.max())) == (1, tiny.T)
    s = np.arange(1, tiny.T + 1) / tiny.T
    share = (np.asarray(steps) <= np.arange(1, tiny.T + 1)[:, None]).mean(1)
    assert abs(share - s / (shift - (shift - 1) * s)).max() < np.sqrt(np.log(2 / 1e-6) / 2 / many)


def test_metrics_sort_the_loss_by_noise_level(tiny, data):
    state, total = fresh(tiny), 0.0
    for step in range(5):
        state, loss = take(tiny, state, data, 1, step=step)
        total += float(loss) * tiny.B
    assert float(state.metrics.count.sum()) == 5 * tiny.B
    np.testing.assert_allclose(state.metrics.loss.sum(), total, rtol=1e-4)
    assert float(state.metrics.grad_norm) > 0


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_of_the_clean_image_alike_for_every_prediction(tiny, prediction):
    """The loss of a wrong estimate of the image, made from that estimate in each prediction's own terms."""
    config = dataclasses.replace(tiny, prediction=prediction, loss_weight="min_snr")
    schedule, t = schedules.from_config(config), jnp.array([1, 7, 20, 33, 49])
    keys = jax.random.split(jax.random.key(3), 3)
    image, noise, wrong = (jax.random.normal(key, (5, 2, 3, 1)) for key in keys)
    alpha, sigma = schedules.mix_at(schedule, t)
    noisy = alpha * image + sigma * noise
    claimed = {"eps": (noisy - alpha * wrong) / sigma, "v": (alpha * noisy - wrong) / sigma, "x0": wrong}[prediction]
    batch = dataloader.Batch(image, jnp.zeros((5, 1, 1)), jnp.ones((5, 1), bool))
    losses = training.squared_error(lambda *_: claimed, batch, noise, t, schedule, prediction)
    snr = (np.asarray(schedule.alpha, np.float64)[t] / schedule.sigma[t]) ** 2
    expected = np.minimum(snr, training.SNR_GAMMA) * np.mean((wrong - image) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(training.loss_weight(schedule, t, config) * losses, expected, rtol=2e-3)


def test_accumulation_equals_the_large_batch(tiny, data):
    config = dataclasses.replace(tiny, B=6, loss_weight="min_snr", augmentation=0.5)
    six, after = dataloader.Rows(*np.int32([[[3, 1, 6, 0, 2, 5]], [[4, 0, 7, 1, 3, 0]]])), []
    for parts in (1, 3):
        split = dataclasses.replace(config, accumulate=parts)
        state, loss = build(split)(fresh(split), data, six, KEY)
        after.append((loss, optax.tree.get(state.opt_state, "mu"), state.metrics))
    for one, other in zip(*after, strict=True):
        near(one, other)


def test_the_learning_rate_rises_then_falls_to_zero_after_the_last_step(tiny):
    for decay, half_way, last in (("constant", 0.1, 0.1), ("cosine", 0.05, 0), ("linear", 0.05, 0)):
        rate = training.learning_rate(dataclasses.replace(tiny, warmup=10, learning_rate=0.1, decay=decay), 110)
        np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.01, 0.05, 0.1, 0.1], atol=1e-6)
        np.testing.assert_allclose([rate(60), rate(110)], [half_way, last], atol=1e-6)
        assert rate(109) > 0
    assert training.learning_rate(dataclasses.replace(tiny, warmup=0, learning_rate=0.1), 110)(0) == pytest.approx(0.1)


# Averages of the weights.


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("every", [1, 8])
def test_an_average_keeps_its_length_as_a_share_of_the_run(length, every):
    """Karras et al. 2024, Eq. 4: step t counts in proportion to t^gamma, whose relative deviation is `length`."""
    steps = np.arange(every, 4000 + every, every)
    new = np.array(jax.vmap(lambda a, b: ema.entering(a, b, length))(jnp.asarray(steps - every), jnp.asarray(steps)))
    share = new.astype(np.float64) * np.append(np.cumprod(1 - new[:0:-1].astype(np.float64))[::-1], 1.0)
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-3)  # nothing is left of the initial weights
    place = steps / steps[-1]
    mean = (share * place).sum()
    np.testing.assert_allclose(np.sqrt((share * (place - mean) ** 2).sum()), length, rtol=0.05)


def test_averages_depend_on_the_weights_that_entered_and_the_last_step_always_does(tiny):
    weights = [{"w": jnp.float32(value)} for value in (5.0, -2.0, 1.0)]
    update = ema.build_update(tiny)
    averages, expected = parallel.replicate(ema.start({"w": jnp.float32(9.0)})), 9.0
    for step, before, value in ((3, 0, weights[0]), (8, 3, weights[1]), (9, 8, weights[2])):
        averages = update(averages, value, jnp.int32(step))
        kept = (before / step) ** (ema.gamma(tiny.ema_short) + 1)
        expected = kept * expected + (1 - kept) * float(value["w"])
        np.testing.assert_allclose(averages.short["w"], expected, rtol=1e-4)
    again = update(jax.tree.map(jnp.copy, averages), {"w": jnp.float32(77.0)}, jnp.int32(9))
    same(again, averages)  # a second update at the same step changes nothing
    assert abs(averages.long["w"] - averages.short["w"]) > 1e-3


def test_an_update_before_the_first_step_changes_nothing(tiny):
    averages = parallel.replicate(ema.start({"w": jnp.float32(9.0)}))
    averages = ema.build_update(tiny)(averages, {"w": jnp.float32(9.0)}, jnp.int32(0))
    assert (averages.short["w"], averages.long["w"]) == (9.0, 9.0)


def test_after_one_step_the_averages_are_its_weights(tiny):
    averages = ema.build_update(tiny)(
        parallel.replicate(ema.start({"w": jnp.float32(9.0)})), {"w": jnp.float32(4.0)}, 1
    )
    assert (averages.short["w"], averages.long["w"]) == (4.0, 4.0)
