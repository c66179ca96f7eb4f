"""One step of training: noise a batch, predict the noise, descend.

Each picture of a batch is diffused to its own random step t; the loss is the mean squared error of the predicted
noise (Ho et al. 2020, Eq. 14), or of the velocity or the clean image where `prediction` says so. AdamW with linear
warm-up and a clipped gradient norm takes the step; two moving averages of the weights, their lengths growing
with the run, are what draws later. A step whose loss or gradient is not finite changes no weight and is counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

import dataloader
import parallel
import schedule as schedules
from dataloader import Batch, Data
from model import UNet
from params import Params

LEVELS = 10  # equal stretches of 1 … T over which the loss is recorded, the image side first


class Keys(NamedTuple):
    """The random streams of a run, made once from its seed; each step folds its own number into them."""

    order: Key[Array, ""]
    dropout: Key[Array, ""]
    noise: Key[Array, ""]


class Records(NamedTuple):
    """Sums since the records were last read."""

    loss: Float[Array, "levels"]
    count: Float[Array, "levels"]
    grad_norm: Float[Array, ""]
    skipped: Int[Array, ""]  # steps that were not finite


class Averages(NamedTuple):
    """Two exponential moving averages of the weights, of different lengths."""

    short: dict
    long: dict


class TrainState(NamedTuple):
    weights: dict
    ema: Averages
    optimizer: Any
    step: Int[Array, ""]
    records: Records


def resumable(state: TrainState) -> dict:
    """What a checkpoint holds of a state, by item: each average by itself, as drawing needs no more than one."""
    train = {"weights": state.weights, "optimizer": state.optimizer, "step": state.step}
    return {"ema_short": state.ema.short, "ema_long": state.ema.long, "train": train}


def resumed(state: TrainState, saved: dict) -> TrainState:
    """`state` as the items of a checkpoint say that it was."""
    return state._replace(ema=Averages(saved["ema_short"], saved["ema_long"]), **saved["train"])


def no_records() -> Records:
    return Records(jnp.zeros(LEVELS), jnp.zeros(LEVELS), jnp.zeros(()), jnp.zeros((), jnp.int32))


def build_optimizer(config: Params) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind a clipped gradient norm, the learning rate rising linearly at first."""
    rate = optax.linear_schedule(0.0 if config.warmup else config.learning_rate, config.learning_rate, config.warmup)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=config.weight_decay))


def structure(config: Params, text_dim: int) -> nnx.GraphDef:
    """The network without its weights."""
    return nnx.graphdef(nnx.eval_shape(lambda: UNet(config, text_dim, nnx.Rngs(0))))


def initial(config: Params, text_dim: int, key: Key[Array, ""]) -> TrainState:
    """The state that training starts from: random weights, averages equal to them, an optimizer at rest."""
    weights = nnx.to_pure_dict(nnx.state(UNet(config, text_dim, nnx.Rngs(key))))
    optimizer = build_optimizer(config).init(weights)
    ema = Averages(*(jax.tree.map(jnp.copy, weights) for _ in Averages._fields))  # own buffers: all are donated
    return TrainState(weights, ema, optimizer, jnp.zeros((), jnp.int32), no_records())


def init(config: Params, text_dim: int, key: Key[Array, ""]) -> TrainState:
    """`initial` on the device, in one program; it runs once, so it is compiled fast rather than well."""
    fast = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda key: initial(config, text_dim, key), compiler_options=fast)(key)


def loss_per_picture(
    model: UNet, batch: Batch, key: Key[Array, ""], schedule: schedules.Schedule, prediction: schedules.Prediction
) -> tuple[Float[Array, "b"], Int[Array, "b"]]:
    """The loss of each picture of a batch, and the random steps t they were diffused to."""
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, (len(batch.image),), 1, schedule.T + 1)
    noise = jax.random.normal(noise_key, batch.image.shape)
    return loss_at(model, batch, noise, t, schedule, prediction), t


def loss_at(
    model: nnx.Module,
    batch: Batch,
    noise: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    schedule: schedules.Schedule,
    prediction: schedules.Prediction,
) -> Float[Array, "b"]:
    """Squared error of the prediction at steps t, mean over each picture  (Ho et al. 2020, Eq. 14)."""
    noisy = schedules.add_noise(schedule, batch.image, noise, t)
    predicted = model(noisy, t, batch.text_emb, batch.text_mask)
    target = schedules.target(schedule, batch.image, noise, t, prediction)
    return jnp.mean((predicted - target) ** 2, axis=(1, 2, 3))


def ema_decay(step: Int[Array, ""], longest: float) -> Float[Array, ""]:
    """Decay of the average at a step: short at first, so that the initial weights are soon forgotten."""
    return jnp.minimum(longest, (1 + step) / (10 + step))


def averaged(average: dict, weights: dict, decay: Float[Array, ""]) -> dict:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, weights)


def build_train_step(
    config: Params, graphdef: nnx.GraphDef
) -> Callable[[TrainState, Data, Keys], tuple[TrainState, Float[Array, ""]]]:
    """The jitted step: (state, data, keys) -> (next state, loss); the state's buffers are donated."""
    schedule = schedules.cosine(config.T)
    optimizer = build_optimizer(config)

    def train_step(state: TrainState, data: Data, keys: Keys) -> tuple[TrainState, Float[Array, ""]]:
        batch = dataloader.sample_batch(
            data, keys.order, keys.dropout, state.step, B=config.B, embedding_dropout=config.embedding_dropout
        )
        batch = parallel.dealt(batch)

        def objective(weights: dict):
            model = nnx.merge(graphdef, nnx.State(weights))
            step_key = jax.random.fold_in(keys.noise, state.step)
            losses, t = loss_per_picture(model, batch, step_key, schedule, config.prediction)
            return losses.mean(), (losses, t)

        (loss, (losses, t)), gradient = jax.value_and_grad(objective, has_aux=True)(state.weights)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        ema = Averages(
            short=averaged(state.ema.short, weights, ema_decay(state.step, config.ema_short)),
            long=averaged(state.ema.long, weights, ema_decay(state.step, config.ema_long)),
        )

        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        level = (t - 1) * LEVELS // config.T
        records = Records(
            loss=state.records.loss.at[level].add(losses),
            count=state.records.count.at[level].add(1.0),
            grad_norm=state.records.grad_norm + grad_norm,
            skipped=state.records.skipped,
        )
        moved = (weights, ema, optimizer_state, records)
        stayed = (*state[:3], state.records._replace(skipped=state.records.skipped + 1))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, stayed)
        weights, ema, optimizer_state, records = kept
        return TrainState(weights, ema, optimizer_state, state.step + 1, records), loss

    return jax.jit(train_step, donate_argnums=0, out_shardings=parallel.whole())
