"""How fast a preset trains, beside what this machine could do: `python benchmarks/benchmark.py [PRESET]`.

In one run: the float32 matrix-product rate (the ceiling), the training step and its share of that ceiling, beside it a
bare step (gradient and AdamW: no averages, no records, no guard against what is not finite), the data path alone and
its share of the step, drawing one guided picture and as many bare evaluations of the network. Rounds of
all of them alternate and medians are reported, so that a machine whose speed drifts bends no ratio. FLOPs are those of
the forward pass as XLA counts them, times three for a training step. Then whole processes: `train.py --help`, and where
there is a checkpoint in models_vA0/final, `test.py` with no program compiled yet and with all of them on disk.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import made_up
import optax
from flax import nnx

import dataloader
import device
import schedule as schedules
import training
from model import network
from params import PRESETS, Params
from pipeline import STEPS

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7


def seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def process(*words: str, **environment: str) -> float:
    """Seconds from the start of a script of this project to its end."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def processes() -> dict[str, float]:
    """Medians of five `--help`s, and one cold and three warm runs of test.py."""
    result = {"help_seconds": statistics.median(process("train.py", "--help") for _ in range(5))}
    if (ROOT / "models_vA0" / "final").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            own = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
            draw = ("test.py", "--output", f"{folder}/pictures")
            result["test_cold_seconds"] = process(*draw, **own)
            result["test_warm_seconds"] = statistics.median(process(*draw, **own) for _ in range(3))
    return result


def bare_step(config: Params, graphdef: nnx.GraphDef) -> Callable:
    """What is left of the training step without averages, records and guard."""
    schedule = schedules.of(config)
    adamw = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), adamw)

    def step(state: tuple, data: dataloader.Data, keys: training.Keys) -> tuple[tuple, jax.Array]:
        weights, optimizer_state, number = state
        batch = dataloader.batch_of(data, keys.order, keys.dropout, number, config)
        t_key, noise_key = jax.random.split(jax.random.fold_in(keys.noise, number))
        t, noise = training.random_steps(t_key, config), jax.random.normal(noise_key, batch.image.shape)

        def objective(weights: dict) -> jax.Array:
            model = network(config, graphdef, weights)
            return training.loss_at(model, batch, noise, t, schedule, config.prediction).mean()

        loss, gradient = jax.value_and_grad(objective)(weights)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, optimizer_state, number + 1), loss

    return jax.jit(step, donate_argnums=0)


def main() -> None:
    device.reserve_memory()
    name = sys.argv[1] if len(sys.argv) > 1 else "quick"
    if name in ("-h", "--help"):
        sys.exit(__doc__)
    if name not in PRESETS:
        sys.exit(f"no preset {name!r} (presets: {', '.join(PRESETS)})")
    config = PRESETS[name]
    _, keys = training.streams(0)
    pictures = config.MAX_INDEX or 1824
    data = made_up.data(config, pictures)
    graphdef = training.structure(config, made_up.TEXT_DIM)
    state = training.init(config, made_up.TEXT_DIM, jax.random.key(0))
    step = training.build_train_step(config, graphdef)
    batch = jax.jit(
        lambda data, keys, step: dataloader.sample_batch(
            data, keys.order, keys.dropout, step, B=config.B, embedding_dropout=config.embedding_dropout
        )
    )
    draw = made_up.drawer(config, graphdef, data, pictures=1, sampler="dpmpp_2m", steps=STEPS)
    forward = jax.jit(lambda weights, *inputs: network(config, graphdef, weights)(*inputs))
    first = batch(data, keys, jnp.int32(0))
    inputs = (first.image, jnp.ones(config.B, jnp.int32), first.text_emb, first.text_mask)
    flops = forward.lower(state.weights, *inputs).cost_analysis()["flops"]

    matrix = jnp.ones((3072, 3072))
    product = jax.jit(jnp.matmul)
    one = tuple(array[:1] for array in inputs)

    def draw_one() -> jax.Array:
        return draw(state.ema.short)

    def evaluations() -> None:
        """As many bare evaluations of the network on one picture as a guided drawing needs."""
        for _ in range(2 * STEPS):
            forward(state.weights, *one).block_until_ready()

    compile_seconds = seconds(lambda: step(state, data, keys))
    state = training.init(config, made_up.TEXT_DIM, jax.random.key(0))  # the call has taken the old one's buffers
    state, _ = step(state, data, keys)
    for function, args in (
        (product, (matrix, matrix)),
        (batch, (data, keys, jnp.int32(0))),
        (draw_one, ()),
        (evaluations, ()),
        (forward, (state.weights, *inputs)),
    ):
        seconds(function, *args)

    bare = bare_step(config, graphdef)
    other = training.init(config, made_up.TEXT_DIM, jax.random.key(0))
    bare_state, _ = bare((other.weights, other.optimizer, other.step), data, keys)

    times = {part: [] for part in ("product", "step", "bare", "forward", "batch", "draw", "evaluations")}
    for number in range(ROUNDS):
        times["product"].append(seconds(product, matrix, matrix))
        for _ in range(5):
            start = time.perf_counter()
            state, loss = step(state, data, keys)
            loss.block_until_ready()
            times["step"].append(time.perf_counter() - start)
            start = time.perf_counter()
            bare_state, loss = bare(bare_state, data, keys)
            loss.block_until_ready()
            times["bare"].append(time.perf_counter() - start)
        times["forward"].append(seconds(forward, state.weights, *inputs))
        times["batch"].append(seconds(batch, data, keys, jnp.int32(number)))
        times["draw"].append(seconds(draw_one))
        times["evaluations"].append(seconds(evaluations))
    median = {part: statistics.median(each) for part, each in times.items()}

    ceiling = 2 * 3072**3 / median["product"]
    result = {
        "preset": name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters_million": sum(leaf.size for leaf in jax.tree.leaves(state.weights)) / 1e6,
        "ceiling_gflops": ceiling / 1e9,
        "step_seconds": median["step"],
        "images_per_second": config.B / median["step"],
        "step_gflops": 3 * flops / median["step"] / 1e9,
        "step_share_of_ceiling": 3 * flops / median["step"] / ceiling,
        "step_over_bare_step": statistics.median(a / b for a, b in zip(times["step"], times["bare"], strict=True)),
        "forward_share_of_ceiling": flops / median["forward"] / ceiling,
        "data_share_of_step": median["batch"] / median["step"],
        "draw_guided_seconds": median["draw"],
        "draw_guided_steps": STEPS,
        "draw_over_bare_evaluations": median["draw"] / median["evaluations"],
        "compile_seconds": compile_seconds,
        **processes(),
    }
    for label, value in result.items():
        print(f"{label:32}{value:10.4g}" if isinstance(value, float) else f"{label:32}{value:>10}")
    path = Path(__file__).with_name(f"{name}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path} written")


if __name__ == "__main__":
    main()
