"""The objective and one training step.

A picture x is diffused to a random step t; the network sees the mixture, t and the caption, and predicts the noise ε:

    loss = E ‖ε - ε_θ(alpha_t x + sigma_t ε, t, caption)‖²                              (Ho et al. 2020, Eq. 14)

or the velocity, or the clean picture, where `prediction` says so; `loss_weight` may weigh the noise levels. AdamW
behind a clipped gradient takes the step. A step whose loss or gradient is not finite changes no weight and is counted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

import dataloader
import ema
import parallel
import schedule as schedules
from augmentation import augment
from dataloader import Batch, Data, Rows
from kernels import scan
from model import UNet, network
from params import Params

VERSION = 6  # of what a step computes from what; a run can only be resumed under the version that it began with
SNR_GAMMA = 5.0  # of min-SNR weighting
LEVELS = 10  # equal stretches of 1 … T over which the loss is recorded, the image side first


def squared_error(
    model: Callable,
    batch: Batch,
    noise: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    schedule: schedules.Schedule,
    prediction: schedules.Prediction,
    labels: Array | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "b"]:
    """Squared error of the prediction at steps t, mean over each picture  (Ho et al. 2020, Eq. 14)."""
    noisy = schedules.add_noise(schedule, batch.image, noise, t)  # [b, h, w, c]
    predicted = model(noisy, t, batch.text_emb, batch.text_mask, labels, dropout_key)  # [b, h, w, c]
    target = schedules.target(schedule, batch.image, noise, t, prediction)  # [b, h, w, c]
    return jnp.mean((predicted - target) ** 2, axis=(1, 2, 3))  # [b]


def loss_weight(schedule: schedules.Schedule, t: Int[Array, "b"], config: Params) -> Float[Array, "b"]:
    """Weight of a picture at step t: 1, or min-SNR-γ (Hang et al. 2023, Section 3.4).

    Min-SNR weighs the error of the clean picture by min(SNR, γ). The same error is SNR times as large in the noise and
    SNR + 1 times as large in the velocity.
    """
    if config.loss_weight == "uniform":
        return jnp.ones(len(t))
    snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2
    return jnp.minimum(snr, SNR_GAMMA) / {"eps": snr, "v": snr + 1, "x0": 1.0}[config.prediction]


def random_steps(key: Key[Array, ""], config: Params) -> Int[Array, "B"]:
    """Steps from 1 to T to train on: t / T = k u / (1 + (k - 1) u) of uniform u  (Esser et al. 2024, Eq. 23).

    With a shift of k = 1 all steps are as likely. With a larger one, those are likelier at which only the caption can
    say what the picture shows: pictures of many pixels show it through much noise already (Hoogeboom et al. 2023).
    """
    u, k = jax.random.uniform(key, (config.B,)), config.timestep_shift
    t = jnp.floor(config.T * k * u / (1 + (k - 1) * u)).astype(jnp.int32) + 1
    return jnp.minimum(t, config.T)  # where rounding took it beyond


class Metrics(NamedTuple):
    """What steps report: sums since the metrics were last read."""

    loss: Float[Array, "levels"]
    count: Float[Array, "levels"]  # pictures
    grad_norm: Float[Array, ""]
    skipped: Int[Array, ""]  # steps that were not finite
    streak: Int[Array, ""]  # steps skipped in a row up to now


class TrainState(NamedTuple):
    weights: dict
    ema: ema.Averages  # left alone by a step; train.loop updates it every ema.EVERY steps
    opt_state: Any
    step: Int[Array, ""]
    metrics: Metrics


def zero_metrics(streak: int = 0) -> Metrics:
    """Empty metrics, on the host; a streak that goes on is kept."""
    return Metrics(*np.zeros((2, LEVELS), np.float32), np.float32(0), np.int32(0), np.int32(streak))


def init_state(config: Params, text_dim: int, key: Key[Array, ""]) -> TrainState:
    """The state before the first step: random weights, averages equal to them, an optimizer at rest."""
    weights = nnx.to_pure_dict(nnx.state(UNet(config, text_dim, nnx.Rngs(key))))
    opt_state = optimizer(config, 1).init(weights)  # whose shape does not depend on the length of the run
    return TrainState(weights, ema.start(weights), opt_state, jnp.zeros((), jnp.int32), zero_metrics())


def start(config: Params, text_dim: int) -> tuple[TrainState, Key[Array, ""]]:
    """The state before the first step and the key of all steps, on every device; both follow from the seed."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    fast = {"xla_backend_optimization_level": 0}  # to compile, as it runs only once
    init = jax.jit(init_state, static_argnums=(0, 1), compiler_options=fast)
    return parallel.replicate((init(config, text_dim, init_key), key))


def to_checkpoint(state: TrainState) -> dict:
    """The items of a checkpoint. Each average is one by itself, because sampling reads only one of them."""
    train = {"weights": state.weights, "opt_state": state.opt_state, "step": state.step, "ema_step": state.ema.step}
    return {"ema_short": state.ema.short, "ema_long": state.ema.long, "train": train}


def from_checkpoint(items: dict) -> TrainState:
    """The state that was saved, with empty metrics."""
    train, averages = items["train"], (items["ema_short"], items["ema_long"], items["train"]["ema_step"])
    return TrainState(train["weights"], ema.Averages(*averages), train["opt_state"], train["step"], zero_metrics())


def learning_rate(config: Params, steps: int) -> optax.Schedule:
    """Learning rate of update number 0, 1, …: a linear warm-up, then constant, or falling to 0 after `steps`."""
    peak, left = config.learning_rate, max(1, steps - config.warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
    }[config.decay]
    first = peak / max(1, config.warmup)
    return optax.join_schedules([optax.linear_schedule(first, peak + first, config.warmup), after], [config.warmup])


def optimizer(config: Params, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind a clipped gradient norm."""
    adamw = optax.adamw(learning_rate(config, steps), weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def accumulate(objective: Callable, weights: dict, batch: tuple, keys: Key[Array, "n"]) -> tuple[Array, Array, dict]:
    """Loss, loss of each picture, and gradient of a batch that is computed in n parts, one after the other."""

    def split(rows: Array) -> Array:  # [B, …] -> [parts, B / parts, …]; no row leaves its device
        return rows.reshape(-1, len(keys), *rows.shape[1:]).swapaxes(0, 1)

    def add(total: tuple, part: tuple) -> tuple[tuple, Array]:
        (loss, losses), gradient = jax.value_and_grad(objective, has_aux=True)(weights, *part)
        return jax.tree.map(jnp.add, total, (loss, gradient)), losses

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    total, losses = scan(add, zero, (*jax.tree.map(split, batch), keys))
    loss, gradient = jax.tree.map(lambda total: total / len(keys), total)
    return loss, losses.T.ravel(), gradient


def build_train_step(config: Params, steps: int = 0) -> Callable:
    """The jitted function (state, data, rows, key) -> (state after n steps, last loss); the state is donated.

    `rows` chooses the pictures of n steps from `data`; where it is None, `data` is the batch of one step. `steps` is
    the length of the whole run, which a decaying learning rate needs to know.
    """
    assert steps or config.decay == "constant"
    schedule, tx = schedules.from_config(config), optimizer(config, steps)

    def objective(weights: dict, batch: Batch, noise: Array, t: Array, labels: Array | None, dropout_key: Array):
        model, key = network(config, weights), dropout_key if config.dropout else None
        losses = squared_error(model, batch, noise, t, schedule, config.prediction, labels, key)  # [b]
        return (loss_weight(schedule, t, config) * losses).mean(), losses

    def one_step(state: TrainState, rows: Rows | None, *, data: Data, key: Key[Array, ""]) -> tuple[TrainState, Array]:
        t_key, noise_key, augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step), 4)
        batch, labels = parallel.shard(dataloader.batch(data, rows)), None
        if config.augmentation:
            image, labels = augment(batch.image, augment_key, config.augmentation)
            batch = batch._replace(image=image)
        t = random_steps(t_key, config)  # [B]
        noise = jax.random.normal(noise_key, batch.image.shape)  # [B, h, w, c]
        dropout_keys = jax.random.split(dropout_key, config.accumulate)
        loss, losses, gradient = accumulate(objective, state.weights, (batch, noise, t, labels), dropout_keys)
        updates, opt_state = tx.update(gradient, state.opt_state, state.weights)
        new, old = (optax.apply_updates(state.weights, updates), opt_state), (state.weights, state.opt_state)

        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        weights, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        level, old = (t - 1) * LEVELS // config.T, state.metrics
        metrics = Metrics(
            loss=old.loss.at[level].add(jnp.where(finite, losses, 0)),
            count=old.count.at[level].add(jnp.where(finite, 1.0, 0.0)),
            grad_norm=old.grad_norm + jnp.where(finite, grad_norm, 0),
            skipped=old.skipped + ~finite,
            streak=jnp.where(finite, 0, old.streak + 1),
        )
        return TrainState(weights, state.ema, opt_state, state.step + 1, metrics), loss

    @partial(jax.jit, donate_argnums=0, out_shardings=parallel.replicated())
    def train_step(state: TrainState, data: Data, rows: Rows | None, key: Key[Array, ""]):
        if rows is None:
            return one_step(state, None, data=data, key=key)
        state, losses = scan(partial(one_step, data=data, key=key), state, rows)
        return state, losses[-1]

    return train_step
