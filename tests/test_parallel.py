"""Several devices and several processes against one of each: the real script, on the loopback."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import flags, weights

import checkpoint
import files
import parallel
from params import Params

ROOT = Path(__file__).parent.parent
UNKNOWN = dict.fromkeys(parallel.BY_HAND, "")  # no process is told which one it is


def start(folder, config, *more, processes=1, devices=1, unlike=()):
    """train.py in `folder` as so many processes of so many devices; the last one gets the words `unlike` too."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, str(ROOT / "train.py"), *flags(config), *more, *["--distributed"] * (processes > 1)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    for index in range(processes):
        who = dict(zip(parallel.BY_HAND, (address, str(processes), str(index)), strict=True))
        last = unlike if index == processes - 1 else ()
        running.append(subprocess.Popen([*words, *last], cwd=folder, env={**base, **who}, **pipes))
    return running


def said(running):
    """What each process printed and complained of, once all have ended; and their exit codes."""
    try:
        pairs = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    # Gloo says "[Gloo] Rank 2 is connected to 3 peer ranks. …" in pieces, so that two ranks may tear each other's line
    gloo = re.compile(r"\[Gloo\]|is connected to \d+ peer ranks")
    out = ["".join(line for line in out.splitlines(True) if not gloo.search(line)) for out, _ in pairs]
    return out, [err for _, err in pairs], [process.returncode for process in running]


def done(running):
    """What process 0 printed, where all ended well and the others printed nothing."""
    (out, *silent), err, codes = said(running)
    assert codes == [0] * len(running), err
    assert not any(silent)
    return out


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "models_vA0" / "metrics.jsonl").read_text().splitlines()]


def close(folder, other, config):
    """Both runs end at the same weights but for rounding: they differ by under 1 % of the way from epoch2 to the end.

    Sums over a batch are taken in another order, a relative difference of some 1e-7 in a gradient. Where the gradient
    is nothing but rounding, as for a bias that a norm takes out again, Adam divides it by its own size and such a
    weight may go anywhere at learning_rate a step; there are few, so the distance of all weights shows an error and
    not them.
    """
    ends = [
        jax.flatten_util.ravel_pytree(weights(path / "models_vA0" / "final", config))[0] for path in (folder, other)
    ]
    half = jax.flatten_util.ravel_pytree(weights(other / "models_vA0" / "epoch2", config))[0]
    assert jnp.linalg.norm(ends[0] - ends[1]) < 0.01 * jnp.linalg.norm(ends[1] - half)


@pytest.fixture(scope="module")
def four(tiny):
    """Eight steps of four pictures by the smallest network."""
    smallest = {"DIM_MULTS": (1,), "self_attention": (0,), "cross_attention": (0,)}
    return dataclasses.replace(tiny, B=4, epochs=4, learning_rate=1e-3, sample_every=100, save_every=2, **smallest)


@pytest.fixture(scope="module")
def alone(four, tmp_path_factory):
    """A run of one process on one device, under way."""
    folder = tmp_path_factory.mktemp("alone")
    running = start(folder, four)
    return folder, lambda: running and done([running.pop()])


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one(four, alone, tmp_path):
    folder, ended = alone
    together = start(tmp_path, four, processes=2, devices=2)
    ended()
    assert "models_vA0/final and validation_images/models_vA0/final.png written" in done(together)
    close(tmp_path, folder, four)
    np.testing.assert_allclose(losses(tmp_path), losses(folder), rtol=1e-5)
    assert sorted(path.name for path in (tmp_path / "models_vA0").iterdir()) == ["epoch2", "final", "metrics.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_one_process_of_several_devices_trains_as_one_of_one(four, alone, tmp_path, devices):
    folder, ended = alone
    several = start(tmp_path, four, devices=devices)
    ended()
    done(several)
    close(tmp_path, folder, four)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 2)), ((2, 2), (1, 1))])
def test_a_run_goes_on_with_another_number_of_processes(four, alone, tmp_path, before, after):
    folder, ended = alone
    ended()
    half = dataclasses.replace(four, epochs=2)
    done(start(tmp_path, half, processes=before[0], devices=before[1]))
    resumed = done(start(tmp_path, four, "--resume", processes=after[0], devices=after[1]))
    assert "resumed from models_vA0/final, step 4" in resumed
    close(tmp_path, folder, four)


def under_way(folder, running):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in running):
        log = folder / "models_vA0" / "metrics.jsonl"
        if log.exists() and log.read_text().count("\n") > 1:
            return
        time.sleep(0.05)
    pytest.fail(f"training never began: {said(running)}")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(four, tmp_path):
    running = start(tmp_path, dataclasses.replace(four, epochs=100_000, save_every=100_000), processes=2)
    under_way(tmp_path, running)
    running[1].send_signal(signal.SIGTERM)
    _, err, codes = said(running)
    step = checkpoint.about(tmp_path / "models_vA0" / "stopped")["step"]
    assert step % four.log_every == 0
    assert f"stopped at step {step} of" in err[0]
    assert codes == [1, 1]


def test_an_error_of_jax_is_told_from_the_end_of_another_process(monkeypatch):
    ended, full = (
        RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
        RuntimeError("out of memory"),
    )
    assert not parallel.lost_another(ended)
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 2)
    assert parallel.lost_another(ended)
    assert not parallel.lost_another(full)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_no_process_waits_for_a_dead_one(four, tmp_path, dies):
    running = start(tmp_path, dataclasses.replace(four, epochs=100_000, save_every=100_000), processes=2)
    under_way(tmp_path, running)
    running[dies].kill()
    began = time.monotonic()
    _, err, codes = said(running)
    assert codes[1 - dies] != 0
    if dies == 1:  # without process 0 JAX ends the others itself
        assert "another process has ended" in err[0]
        assert "Traceback" not in err[0]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_processes_that_were_started_differently_say_so(four, tmp_path):
    _, err, codes = said(start(tmp_path, four, processes=2, unlike=["--seed", "1"]))
    assert "not every process has the same config" in err[1]
    assert all(codes)


COLLECTIVES = r"""
import re, sys
sys.path[:0] = ["tests"]
import conftest, jax, jax.numpy as jnp, numpy as np
import dataloader, parallel, training
from params import Params

config = Params(TEXT_LEN=7, H=8, W=12, T=50, T_dim=6, T_out=10, BASE_DIM=8, DIM_MULTS=(1,), BLOCKS=1, HEAD_DIM=4, B=8,
                self_attention=(0,), cross_attention=(0,), accumulate=int(sys.argv[1]))

def arguments(key):
    shapes = (97, 8, 12, 3), (98, 7, 5), (98, 7)
    data = dataloader.Data(*map(jnp.zeros, shapes, ("uint8", "float32", "bool")))
    rows = jnp.zeros((int(sys.argv[2]), 8), jnp.int32)
    return training.init_state(config, 5, key), data, dataloader.Rows(rows, rows), key

everywhere = jax.eval_shape(arguments, jax.eval_shape(lambda: jax.random.key(0)))
state, data, rows, key = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parallel.replicated()), everywhere)
step = training.build_train_step(config)
program = step.lower(state, data, rows, key).compile().as_text()
for line in program.splitlines():
    found = re.search(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\S+)(-start)?\(", line)
    if found:
        sizes = [np.prod([int(n) for n in part.split(",") if n]) for part in re.findall(r"\[([\d,]*)\]", found[1])]
        print(found[2], int(sum(sizes)))
print("weights", sum(leaf.size for leaf in jax.tree.leaves(state.weights)))
batch = parallel.global_batch(np.arange(8.0)[parallel.local_rows(8)])
assert [shard.data.tolist() for shard in batch.addressable_shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
"""


@pytest.mark.parametrize(
    ("accumulate", "together"), [(1, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (1, 3)))]
)
def test_the_devices_exchange_gradients_and_nothing_larger(accumulate, together):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    words = [sys.executable, "-c", COLLECTIVES, str(accumulate), str(together)]
    made = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    *collectives, weights = (line.split() for line in made.stdout.splitlines())
    assert {name for name, _ in collectives} == {"all-reduce"}
    exchanged = sum(int(size) for _, size in collectives)
    gradients = together * accumulate * int(weights[1])  # a CPU's program has every step written out
    assert gradients <= exchanged <= gradients + together * 100  # the loss, and the metrics by level


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "mesh", lambda: SimpleNamespace(size=4))
    parallel.check_batch_size(Params(B=8))
    parallel.check_batch_size(Params(B=16, accumulate=2))
    with pytest.raises(parallel.ParallelError, match=r"--B = 6: .* over 4 devices; take --B 4 or 8, or fewer devices"):
        parallel.check_batch_size(Params(B=6))
    with pytest.raises(parallel.ParallelError, match=r"take --B 4, or"):
        parallel.check_batch_size(Params(B=3))
    with pytest.raises(parallel.ParallelError, match=r"over 4 devices in 2 parts; take --B 8 or 16"):
        parallel.check_batch_size(Params(B=12, accumulate=2))


@pytest.mark.parametrize(
    "who", [("host:1", "two", "0"), ("host:1", "2", "2"), ("host", "2", "0"), ("host:1", "2", "-1")]
)
def test_wrong_numbers_of_processes_are_refused(monkeypatch, who):
    for name, value in zip(parallel.BY_HAND, who, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(parallel.ParallelError, match=f"JAX_NUM_PROCESSES={who[1]} .* is wrong. Set"):
        parallel.join()


def test_a_process_that_nobody_told_who_it_is_says_what_to_set():
    env = {**os.environ, **UNKNOWN, "JAX_COORDINATOR_ADDRESS": "host:1"}
    words = [sys.executable, str(ROOT / "train.py"), "quick", "--distributed"]
    made = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 1
    assert "no cluster is recognised, and JAX_NUM_PROCESSES, JAX_PROCESS_ID is not set. Set JAX_COORD" in made.stderr


def test_one_process_agrees_with_itself():
    assert parallel.any_process(True, False, meet=False) == (True, False)
    parallel.check_equal(config={"B": 3})
    state = {"weights": jax.numpy.ones(3), "key": jax.random.key(0)}
    assert parallel.unreplicate(parallel.replicate(state))["key"] == state["key"]
    assert parallel.local_rows(6) == slice(0, 6)


def test_numbers_of_64_bits_are_switched_off_and_that_is_said(capsys):
    files.say_once.cache_clear()
    jax.config.update("jax_enable_x64", True)
    try:
        parallel.setup()
        assert jnp.asarray(np.ones(2)).dtype == np.float32
        assert "JAX_ENABLE_X64 is switched off" in capsys.readouterr().err
    finally:
        jax.config.update("jax_enable_x64", False)
