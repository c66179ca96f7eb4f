"""One step of training: noise a batch, predict the noise, descend.

Each picture of a batch is diffused to its own random step t; the loss is the mean squared error of the predicted
noise (Ho et al. 2020, Eq. 14), or of the velocity or the clean image where `prediction` says so, each noise level
weighed as `loss_weight` says. AdamW behind a clipped gradient norm takes the step; two moving averages of the weights,
their lengths growing with the run, are what draws later. A step whose loss or gradient is not finite changes no weight
and is counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

import dataloader
import parallel
import schedule as schedules
from augmentation import augment
from dataloader import Batch, Data, Picked
from model import UNet, network
from params import Params

VERSION = 3  # of what steps show, compute and keep: a run goes on only under the number that it began with
EMA_EVERY = 8  # steps; an average over thousands does not notice, and entering each would make steps 7 % longer
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of AdamW
LEVELS = 10  # equal stretches of 1 … T over which the loss is recorded, the image side first


class Keys(NamedTuple):
    """The random streams of a run, made once from its seed; each step folds its own number into them."""

    order: Key[Array, ""]
    dropout: Key[Array, ""]
    noise: Key[Array, ""]
    regularization: Key[Array, ""]  # augmentation, and dropout in the network


def streams(seed: int) -> tuple[Key[Array, ""], Keys]:
    """The key of a run's initial weights, and its random streams."""
    init_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(Keys._fields))
    return init_key, Keys(*keys)


class Records(NamedTuple):
    """Sums since the records were last read."""

    loss: Float[Array, "levels"]
    count: Float[Array, "levels"]
    grad_norm: Float[Array, ""]
    skipped: Int[Array, ""]  # steps that were not finite …
    forward: Int[Array, ""]  # … and of them, those whose loss already was not
    streak: Int[Array, ""]  # steps skipped in a row up to now
    longest: Int[Array, ""]  # streak


class Averages(NamedTuple):
    """Two exponential moving averages of the weights, of different lengths."""

    short: dict
    long: dict


class Moments(NamedTuple):
    """What AdamW remembers: moving averages of the gradient and of its square, and how many entered them."""

    mean: dict
    square: dict
    count: Int[Array, ""]


class TrainState(NamedTuple):
    weights: dict
    ema: Averages
    optimizer: Moments
    step: Int[Array, ""]
    records: Records


def resumable(state: TrainState) -> dict:
    """What a checkpoint holds of a state, by item: each average by itself, as drawing needs no more than one."""
    train = {"weights": state.weights, "optimizer": state.optimizer, "step": state.step}
    return {"ema_short": state.ema.short, "ema_long": state.ema.long, "train": train}


def resumed(state: TrainState, saved: dict) -> TrainState:
    """`state` as the items of a checkpoint say that it was."""
    return state._replace(ema=Averages(saved["ema_short"], saved["ema_long"]), **saved["train"])


def no_records(streak: int = 0) -> Records:
    """Empty records, on the host; a streak that is not over goes on."""
    sums = np.zeros(LEVELS, np.float32), np.zeros(LEVELS, np.float32), np.float32(0)
    return Records(*sums, *map(np.int32, (0, 0, streak, streak)))


def learning_rate(config: Params, steps: int) -> optax.Schedule:
    """Learning rate at each step: up linearly at first, then constant, or falling to 0 at step `steps`."""
    peak, left = config.learning_rate, max(1, steps - config.warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
    }[config.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup), after], [config.warmup])


def moments_after(moments: Moments, gradient: dict) -> Moments:
    """The moments with one gradient more (Kingma & Ba 2015, Algorithm 1)."""
    mean = jax.tree.map(lambda old, new: BETA1 * old + (1 - BETA1) * new, moments.mean, gradient)
    square = jax.tree.map(lambda old, new: BETA2 * old + (1 - BETA2) * new**2, moments.square, gradient)
    return Moments(mean, square, moments.count + 1)


def adamw(weights: dict, moments: Moments, rate: Float[Array, ""], weight_decay: float) -> dict:
    """The weights after a step of AdamW (Loshchilov & Hutter 2019, Algorithm 2)."""
    unbias1, unbias2 = 1 / (1 - BETA1**moments.count), 1 / (1 - BETA2**moments.count)

    def moved(weight: Array, mean: Array, square: Array) -> Array:
        return weight - rate * (unbias1 * mean / (jnp.sqrt(unbias2 * square) + EPSILON) + weight_decay * weight)

    return jax.tree.map(moved, weights, moments.mean, moments.square)


def structure(config: Params, text_dim: int) -> nnx.GraphDef:
    """The network without its weights."""
    return nnx.graphdef(nnx.eval_shape(lambda: UNet(config, text_dim, nnx.Rngs(0))))


def initial(config: Params, text_dim: int, key: Key[Array, ""]) -> TrainState:
    """The state that training starts from: random weights, averages equal to them, an optimizer at rest."""
    weights = nnx.to_pure_dict(nnx.state(UNet(config, text_dim, nnx.Rngs(key))))
    ema = Averages(*(jax.tree.map(jnp.copy, weights) for _ in Averages._fields))  # own buffers: all are donated
    rest = Moments(*(jax.tree.map(jnp.zeros_like, weights) for _ in range(2)), jnp.zeros((), jnp.int32))
    return TrainState(weights, ema, rest, jnp.zeros((), jnp.int32), no_records())


def init(config: Params, text_dim: int, key: Key[Array, ""]) -> TrainState:
    """`initial` on the device, in one program; it runs once, so it is compiled fast rather than well."""
    fast = {"xla_backend_optimization_level": 0}
    return parallel.replicate(jax.jit(lambda key: initial(config, text_dim, key), compiler_options=fast)(key))


def random_steps(key: Key[Array, ""], config: Params) -> Int[Array, "b"]:
    """Steps t from 1 to T, one for each picture of a batch.

    Each by itself, or spread evenly from a common random start, so that every batch meets all noise levels alike
    (Kingma et al. 2021, Appendix I.1).
    """
    if not config.low_discrepancy:
        return jax.random.randint(key, (config.B,), 1, config.T + 1)
    place = (jax.random.uniform(key) + jnp.arange(config.B) / config.B) % 1
    return jnp.minimum(1 + jnp.floor(place * config.T), config.T).astype(jnp.int32)


def loss_weight(schedule: schedules.Schedule, t: Int[Array, "b"], config: Params) -> Float[Array, "b"]:
    """How much a picture at step t counts: 1, or as min-SNR-γ says (Hang et al. 2023, Section 3.4).

    That is min(SNR, γ) on the error of the clean image; the same error is SNR times as large in the noise, SNR + 1
    times in the velocity.
    """
    if config.loss_weight == "uniform":
        return jnp.ones(len(t))
    snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2
    return jnp.minimum(snr, config.snr_gamma) / {"eps": snr, "v": snr + 1, "x0": 1.0}[config.prediction]


def loss_at(
    model: Callable[..., Float[Array, "b h w c"]],
    batch: Batch,
    noise: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    schedule: schedules.Schedule,
    prediction: schedules.Prediction,
    *regularization: Array | None,
) -> Float[Array, "b"]:
    """Squared error of the prediction at steps t, mean over each picture  (Ho et al. 2020, Eq. 14)."""
    noisy = schedules.add_noise(schedule, batch.image, noise, t)
    predicted = model(noisy, t, batch.text_emb, batch.text_mask, *regularization)
    target = schedules.target(schedule, batch.image, noise, t, prediction)
    return jnp.mean((predicted - target) ** 2, axis=(1, 2, 3))


def ema_decay(number: Int[Array, ""], length: float) -> Float[Array, ""]:
    """Decay of an average at entry `number`, 0 the first; its length stays the same share of the run so far.

    The weights of entry t count in proportion to t^γ: the power-function average of Karras et al. 2024, Eq. 4; `length`
    is its relative standard deviation, whose γ is the root of their Algorithm 2.
    """
    gamma = np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max()
    return (1 - 1 / (number + 1)) ** (gamma + 1)


def averages(ema: Averages, weights: dict, number: Int[Array, ""], config: Params) -> Averages:
    """Both averages with these weights added, the first of them numbered 0."""
    decays = Averages(ema_decay(number, config.ema_short), ema_decay(number, config.ema_long))

    def averaged(average: dict, decay: Float[Array, ""]) -> dict:
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, weights)

    return Averages(*map(averaged, ema, decays))


def build_train_step(
    config: Params, graphdef: nnx.GraphDef, steps: int = 0
) -> Callable[[TrainState, Data | Picked, Keys], tuple[TrainState, Float[Array, ""]]]:
    """The jitted step: (state, source, keys) -> (next state, loss); the state's buffers are donated.

    steps: of the whole run; a decaying learning rate needs to know.
    """
    assert steps or config.decay == "constant"
    schedule, rate_at = schedules.from_config(config), learning_rate(config, steps)

    def objective(weights: dict, part: tuple) -> tuple[Float[Array, ""], Float[Array, "b"]]:
        batch, noise, t, regularization = part
        model = network(config, graphdef, weights)
        losses = loss_at(model, batch, noise, t, schedule, config.prediction, *regularization)
        return (loss_weight(schedule, t, config) * losses).mean(), losses

    def descend(weights: dict, batch: Batch, noise: Array, t: Array, key: Array) -> tuple[Array, Array, dict]:
        """Loss, losses of each picture, gradient; a part of the batch after the other where `accumulate` says so."""
        augment_key, dropout_key = jax.random.split(key)
        labels, dropout_keys = None, jax.random.split(dropout_key, config.accumulate) if config.dropout else None
        if config.augmentation:
            image, labels = augment(batch.image, augment_key, config.augmentation)
            batch = batch._replace(image=image)
        gradient_of = jax.value_and_grad(objective, has_aux=True)
        if config.accumulate == 1:
            key = None if dropout_keys is None else dropout_keys[0]
            (loss, losses), gradient = gradient_of(weights, (batch, noise, t, (labels, key)))
            return loss, losses, gradient

        def add(sums: tuple, part: tuple) -> tuple[tuple, Array]:
            (loss, losses), gradient = gradient_of(weights, part)
            return jax.tree.map(jnp.add, sums, (loss, gradient)), losses

        def cut(leaf: Array) -> Array:
            """[B, …] as [parts, B / parts, …], no row of which leaves its device."""
            return leaf.reshape(-1, config.accumulate, *leaf.shape[1:]).swapaxes(0, 1)

        parts = (*jax.tree.map(cut, (batch, noise, t)), (jax.tree.map(cut, labels), dropout_keys))
        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        unroll = jax.default_backend() == "cpu"  # where XLA runs convolutions inside a loop many times slower
        (loss, gradient), losses = jax.lax.scan(add, nothing, parts, unroll=unroll)
        loss, gradient = jax.tree.map(lambda total: total / config.accumulate, (loss, gradient))
        return loss, losses.T.ravel(), gradient

    def train_step(state: TrainState, source: Data | Picked, keys: Keys) -> tuple[TrainState, Float[Array, ""]]:
        batch = parallel.shard(dataloader.batch_of(source, keys.order, keys.dropout, state.step, config))
        t_key, noise_key = jax.random.split(jax.random.fold_in(keys.noise, state.step))
        t, noise = random_steps(t_key, config), jax.random.normal(noise_key, batch.image.shape)
        key = jax.random.fold_in(keys.regularization, state.step)
        loss, losses, gradient = descend(state.weights, batch, noise, t, key)

        grad_norm, records = optax.tree.norm(gradient), state.records
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        clipped = optax.tree.scale(config.clip / jnp.maximum(grad_norm, config.clip), gradient)
        moments = kept(moments_after(state.optimizer, clipped), state.optimizer)
        moments = jax.lax.optimization_barrier(moments)  # or XLA works them out again for the weights, from copies
        rate = rate_at(state.step)  # of the step, not the count: some may have been skipped
        weights = kept(adamw(state.weights, moments, rate, config.weight_decay), state.weights)
        level = (t - 1) * LEVELS // config.T
        good = records._replace(
            loss=records.loss.at[level].add(losses),
            count=records.count.at[level].add(1.0),
            grad_norm=records.grad_norm + grad_norm,
            streak=jnp.zeros_like(records.streak),
        )
        bad = records._replace(
            skipped=records.skipped + 1,
            forward=records.forward + ~jnp.isfinite(loss),
            streak=records.streak + 1,
            longest=jnp.maximum(records.longest, records.streak + 1),
        )
        number, rest = jnp.divmod(state.step, EMA_EVERY)
        ema = jax.lax.cond(rest == 0, lambda: averages(state.ema, weights, number, config), lambda: state.ema)
        return TrainState(weights, ema, moments, state.step + 1, kept(good, bad)), loss

    return jax.jit(train_step, donate_argnums=0, out_shardings=parallel.replicated())


def several(train_step: Callable, n: int) -> Callable[[TrainState, Data, Keys], tuple[TrainState, Float[Array, ""]]]:
    """n of these steps as one program, between which a device need not wait for the host; the loss is the last one's.

    Not for a CPU, where XLA runs convolutions inside a loop many times slower, nor for a source that the host picks for
    each step.
    """
    if n == 1:
        return train_step

    def train_steps(state: TrainState, source: Data, keys: Keys) -> tuple[TrainState, Float[Array, ""]]:
        state, losses = jax.lax.scan(lambda state, _: train_step(state, source, keys), state, length=n)
        return state, losses[-1]

    return jax.jit(train_steps, donate_argnums=0, out_shardings=parallel.replicated())
