"""How fast this project is beside what the machine can do: `python benchmarks/benchmark.py [PRESET …] [--peer PYTHON]`.

    machine   the float32 matrix-product rate (the ceiling) and the rate at which memory is copied
    presets   a training step, its parts, its memory and compilation; a bare step without averages, records and guard;
              a guided picture by each solver; bare evaluations of the network beside it
    data      the default pictures decoded for the first time and read from .cache; captions encoded
    start     whole processes: `train.py --help`; and with a checkpoint in models_vA0/final, test.py with no program
              compiled yet and with all of them on disk; from nothing to a drawn picture, import by import
    peer      with --peer PYTHON, diffusers on torch beside each preset, at equal FLOPs: see peer.py

Everything in one run. Rounds of all that is timed alternate and medians are reported, for a step's ratios those of
rounds of their own, so that a machine whose speed drifts bends no ratio. FLOPs are those of matrix products and
convolutions, counted in the program (count.py): a multiply-add is two, a tap on the padding counts. A convolution
counts as it is written, as the peer's do, also where a CPU gets by with fewer multiplications (kernels.py): the share
that it is left with is `arithmetic_over_counted`. The numbers go to benchmarks/benchmark.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
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
import numpy as np
import optax
from count import count_flops

import dataloader
import dataset
import ema
import files
import parallel
import schedule as schedules
import training
from model import network
from params import PRESETS, Params
from pipeline import STEPS
from samplers import SOLVERS
from sources import emojis
from text_encoder import TextEncoder

ROOT = Path(__file__).resolve().parent.parent
SIZE = 3072  # rows and columns of the matrices
ENOUGH = 1824  # pictures, as many as the default dataset trains on
CAPTIONS = 256  # encoded to time it
FROM_NOTHING = """
import json, time
marks = {"before": time.perf_counter()}
def mark(name): marks[name] = time.perf_counter()
import numpy; mark("numpy")
import jax; mark("jax")
from flax import nnx; mark("flax")
from pipeline import DiffusionPipeline; mark("this project and orbax")
pipeline = DiffusionPipeline("models_vA0/final"); mark("checkpoint and text encoder")
pipeline.generate_arrays(["cat face"]); mark("first picture")
pipeline.generate_arrays(["red heart"]); mark("second picture")
names = list(marks)
print(json.dumps({b: marks[b] - marks[a] for a, b in zip(names, names[1:])}))
"""


def seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def in_turn(functions: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each in every round, right after an untimed one: caches hold what they hold in a loop of it."""
    times = {name: np.empty(rounds) for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            seconds(function)
            times[name][number] = seconds(function)
    return times


def medians(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    return {name: float(np.median(times)) for name, times in in_turn(functions, rounds).items()}


def ratio(one: np.ndarray, other: np.ndarray) -> float:
    """The median over rounds: what the machine did meanwhile, it did to both."""
    return float(np.median(one / other))


# A preset.


def bare_step(config: Params, data: dataloader.Data, rows: dataloader.Rows) -> Callable:
    """A training step without averages, metrics and guard; it keeps its own state."""
    schedule, tx = schedules.from_config(config), training.optimizer(config, steps=1)

    def step(state: tuple, data: dataloader.Data, rows: dataloader.Rows) -> tuple[tuple, jax.Array]:
        weights, opt_state, number = state
        batch = dataloader.batch(data, jax.tree.map(lambda part: part[0], rows))
        t_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        t = jax.random.randint(t_key, (config.B,), 1, config.T + 1)
        noise = jax.random.normal(noise_key, batch.image.shape)

        def objective(weights: dict) -> jax.Array:
            model = network(config, weights)
            return training.squared_error(model, batch, noise, t, schedule, config.prediction).mean()

        loss, gradient = jax.value_and_grad(objective)(weights)
        updates, opt_state = tx.update(gradient, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state, number + 1), loss

    compiled = jax.jit(step, donate_argnums=0)
    weights = training.init_state(config, made_up.TEXT_DIM, jax.random.key(0)).weights
    state = (weights, tx.init(weights), jnp.int32(0))

    def run() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, data, rows)
        return loss

    return run


def preset(config: Params, rounds: int) -> dict:
    """Everything about one preset, beside the ceilings of the same rounds."""
    state, data, rows, key = made_up.arguments(config, config.MAX_INDEX or ENOUGH)
    weights = jax.tree.map(jnp.copy, state.weights)  # the state's own buffers are taken by its first step
    step = training.build_train_step(config)
    jaxpr = jax.make_jaxpr(step)(state, data, rows, key).jaxpr
    flops, computed = count_flops(jaxpr), count_flops(jaxpr, min if jax.default_backend() == "cpu" else max)
    jax.clear_caches()
    start = time.perf_counter()
    compiled = step.lower(state, data, rows, key).compile()
    cold = time.perf_counter() - start
    jax.clear_caches()
    start = time.perf_counter()
    training.build_train_step(config).lower(state, data, rows, key).compile()
    cached = time.perf_counter() - start
    memory = compiled.memory_analysis()

    batch = jax.jit(lambda data, rows: dataloader.batch(data, jax.tree.map(lambda x: x[0], rows)))
    first, table = batch(data, rows), dataloader.Table(np.arange(ENOUGH)[:, None], 1 + np.arange(ENOUGH)[:, None])
    inputs = (first.image, jnp.ones(config.B, jnp.int32), first.text_emb, first.text_mask)
    one = tuple(array[:1] for array in inputs)
    forward = jax.jit(lambda weights, *inputs: network(config, weights)(*inputs))
    gradient = jax.jit(jax.grad(lambda weights, *inputs: (forward(weights, *inputs) ** 2).mean()))
    opt_state, averages = jax.tree.map(jnp.copy, (state.opt_state, state.ema))
    tx = training.optimizer(config, steps=1)
    optimizer = jax.jit(lambda weights, opt_state: tx.update(weights, opt_state, weights))
    averaging = jax.jit(lambda averages, weights: ema.update(averages, weights, jnp.int32(1), config))
    host = []

    def train() -> jax.Array:
        nonlocal state
        start = time.perf_counter()
        state, loss = compiled(state, data, rows, key)
        host.append(time.perf_counter() - start)
        return jax.block_until_ready((state.weights, loss))

    def evaluations() -> None:
        """As many bare evaluations of the network on one picture as a guided drawing needs."""
        for _ in range(2 * STEPS):
            forward(weights, *one).block_until_ready()

    draws = {f"draw {name}": made_up.drawer(config, data, pictures=1, sampler=name, steps=STEPS) for name in SOLVERS}
    functions = ceilings() | {
        "step": train,
        "bare step": bare_step(config, data, rows),
        "forward": lambda: forward(weights, *inputs),
        "gradient": lambda: gradient(weights, *inputs),
        "optimizer": lambda: optimizer(weights, opt_state),
        "averages": lambda: averaging(averages, weights),
        "batch": lambda: batch(data, parallel.replicate(dataloader.rows(table, 1, 1, config))),
        "evaluations": evaluations,
        **{name: lambda draw=draw: draw(weights) for name, draw in draws.items()},
    }
    took = medians(functions, rounds)
    close = in_turn({name: functions[name] for name in ("product", "step", "bare step")}, 3 * rounds)
    ceiling, lasts = 2 * SIZE**3 / float(np.median(close["product"])), float(np.median(close["step"]))
    return {
        "batch": config.B,
        "parameters_million": sum(leaf.size for leaf in jax.tree.leaves(weights)) / 1e6,
        "gflop_per_picture": flops / config.B / 1e9,
        "arithmetic_over_counted": computed / flops,
        "ceiling_gflops": ceiling / 1e9,
        "step_seconds": lasts,
        "pictures_per_second": config.B / lasts,
        "step_gflops": flops / lasts / 1e9,
        "step_share_of_ceiling": flops / (2 * SIZE**3) * ratio(close["product"], close["step"]),
        "step_over_bare_step": ratio(close["step"], close["bare step"]),
        "step_memory_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_seconds": cold,
        "compile_seconds_from_cache": cached,
        "parts_of_step_alone": {
            "forward": took["forward"] / took["step"],
            "backward": (took["gradient"] - took["forward"]) / took["step"],
            "optimizer": took["optimizer"] / took["step"],
            "averages": took["averages"] / ema.EVERY / took["step"],
            "batch": took["batch"] / took["step"],
            "host, before it may go on": statistics.median(host) / took["step"],
        },
        "forward_share_of_ceiling": count_flops(jax.make_jaxpr(forward)(weights, *inputs).jaxpr)
        / (2 * SIZE**3)
        * (took["product"] / took["forward"]),
        "draw_guided_steps": STEPS,
        "draw_guided_seconds": {name.split()[1]: took[name] for name in draws},
        "draw_over_bare_evaluations": took["draw dpmpp_2m"] / took["evaluations"],
    }


# The machine, the data and whole processes.


def ceilings() -> dict[str, Callable]:
    matrix, product = jnp.ones((SIZE, SIZE)), jax.jit(jnp.matmul)
    much, copy = jnp.ones(2**26), jax.jit(lambda much: much + 1)  # 256 MiB, read and written
    return {"copy": lambda: copy(much), "product": lambda: product(matrix, matrix)}


def preparation(config: Params) -> dict[str, float]:
    """Pictures and captions per second, with nothing in .cache and with everything there."""
    config = dataclasses.replace(config, vendor=emojis.ensure(ROOT / config.data, config.vendor))
    pictures = dataset.from_config(config, ROOT / config.data)
    encoder, names = TextEncoder(config.encoder), pictures.names[:CAPTIONS]
    kept = files.CACHE
    with tempfile.TemporaryDirectory() as folder:
        files.CACHE = Path(folder)
        cold, warm = (seconds(dataset.from_config, config, ROOT / config.data) for _ in range(2))
        encoder(names, config.TEXT_LEN)  # compiles
        first, again = (seconds(dataloader.encode, encoder, names, config.TEXT_LEN) for _ in range(2))
        files.CACHE = kept
    n = len(pictures.names)
    per_second = {"pictures_decoded": n / cold, "pictures_from_cache": n / warm}
    return per_second | {"captions_encoded": len(names) / first, "captions_from_cache": len(names) / again}


def process(*words: str, **environment: str) -> tuple[float, str]:
    """Seconds from the start of a Python process in this project to its end, and what it printed."""
    start = time.perf_counter()
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - start, done.stdout.decode()


def processes(rounds: int) -> dict:
    result = {"help_seconds": statistics.median(process("train.py", "--help")[0] for _ in range(rounds))}
    if not (ROOT / "models_vA0" / "final").is_dir():
        return result
    with tempfile.TemporaryDirectory() as folder:
        own = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        grid, one = ("test.py", "--output", folder), ("test.py", "--output", folder, "--prompts", "cat face")
        result["test_cold_seconds"] = process(*grid, **own)[0]
        process(*one, **own)
        marks = []
        for name, words in (("test_warm_seconds", grid), ("test_warm_seconds_one_prompt", one)):
            result[name] = statistics.median(process(*words, **own)[0] for _ in range(rounds))
        for _ in range(rounds):
            marks.append(json.loads(process("-c", FROM_NOTHING, **own)[1]))
    result["from_nothing_seconds"] = {name: statistics.median(mark[name] for mark in marks) for name in marks[0]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"among {', '.join(PRESETS)} (quick cpu)")
    parser.add_argument("--rounds", type=int, default=9, help="of everything that is timed (9)")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of the peer's virtual environment, see peer.py")
    options = parser.parse_args()
    names = options.presets or ["quick", "cpu"]
    if unknown := set(names) - set(PRESETS):
        parser.error(f"no preset {', '.join(sorted(unknown))} (presets: {', '.join(PRESETS)})")
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: give 3 or more")
    if options.peer and shutil.which(options.peer) is None:
        parser.error(f"--peer {options.peer}: there is no such program; peer.py says how to make one")
    parallel.setup()
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        took = medians(ceilings(), options.rounds)
        result = {
            "machine": {
                "device": jax.devices()[0].device_kind,
                "cores": os.cpu_count(),
                "jax": jax.__version__,
                "product_gflops": 2 * SIZE**3 / took["product"] / 1e9,
                "copy_gigabytes": 2 * 2**28 / took["copy"] / 1e9,
            },
            "presets": {name: preset(PRESETS[name], options.rounds) for name in names},
            "data_per_second": preparation(PRESETS["cpu"]),
            "start": processes(5),
        }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    if options.peer:
        draws = ("--pictures", "1", "--steps", str(STEPS))
        result["peer"] = {}
        for name in names:
            process(str(path.with_name("peer.py")), name, "--python", options.peer, *draws)
            against = json.loads(path.with_name(f"peer-{name}.json").read_text())
            result["peer"][name] = against["peer_seconds_over_ours"]
            path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"{path} written")


def show(result: dict, indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(
                f"{indent}{name:{40 - len(indent)}}{value:.4g}"
                if isinstance(value, float)
                else f"{indent}{name:{40 - len(indent)}}{value}"
            )


if __name__ == "__main__":
    main()
