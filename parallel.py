"""Many devices as one: data parallelism.

One mesh with one axis, "data", holds every device of every process; a single device is a mesh of one. The rows of a
batch are sharded over this axis, everything else is replicated. A step is written as for one device; XLA's partitioner
lets each device compute its rows and sums the gradients. So a run does not depend on the number of devices, except for
the order of float32 sums.

With `--distributed` a process is one of many that run the same script. They take the same steps, and only process 0,
the main one, prints and writes. A signal or a clock of one process counts once all processes have agreed on it.
"""

import atexit
import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from files import CACHE, say_once
from params import Params

AXIS = "data"
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HOW = (
    "Set JAX_COORDINATOR_ADDRESS=HOST:PORT (a free port of process 0's host), JAX_NUM_PROCESSES=N and "
    "JAX_PROCESS_ID=0 … N-1 in each process, or start them with srun or mpirun"
)


class ParallelError(ValueError):
    """The processes or devices cannot work together; the message says why and what to do."""


def setup() -> None:
    """Set JAX up: float32, and, as far as the user has not said otherwise, 90 % of a GPU's memory and compiled programs
    kept in .cache/xla. Call it before JAX is first used.
    """
    if jax.config.jax_enable_x64:
        say_once("JAX_ENABLE_X64 is switched off: this program computes in float32")
        jax.config.update("jax_enable_x64", False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def on_accelerator() -> bool:
    """Whether JAX computes on something faster than the CPU."""
    return jax.default_backend() != "cpu"


def join() -> None:
    """Make this process one of many; call before JAX touches a device.

    SLURM, Open MPI, Kubernetes and cloud TPUs are recognised by JAX; elsewhere the variables BY_HAND say which process
    this is. A process that ends with an error, without `leave`, exits at once, because an orderly exit would wait for
    the others while they wait for it.
    """
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    who = {}
    if len(given) == len(BY_HAND):
        address, count, index = given.values()
        if not re.fullmatch(r".+:\d+ \d+ \d+", f"{address} {count} {index}") or int(index) >= int(count):
            raise ParallelError(f"{' '.join(f'{name}={value}' for name, value in given.items())} is wrong. {HOW}")
        who = {"num_processes": int(count), "process_id": int(index), "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**who)
    except RuntimeError as error:
        raise ParallelError(f"--distributed: the processes did not find each other ({error}). {HOW}") from error
    except ValueError as error:  # what JAX could not find out
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise ParallelError(f"--distributed: no cluster is recognised, and {missing} is not set. {HOW}") from error
    atexit.register(_exit_at_once)
    sync_global_devices("joined")  # while all are here: the first meeting has a time limit, later ones have none
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open to the end of the process)


def _exit_at_once() -> None:
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def lost_another(error: Exception) -> bool:
    """Whether an error of JAX says that another process has ended."""
    return jax.process_count() > 1 and bool(re.search("gloo|nccl|coordination|heartbeat", str(error), re.IGNORECASE))


def leave() -> None:
    """End together, once every process has come here."""
    if jax.distributed.is_initialized():
        sync_global_devices("done")
        jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this is the process that prints and writes; true where there is only one."""
    return jax.process_index() == 0


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Let the main process do something alone; the others wait here until it is done, then do it too."""
    if not is_main():
        sync_global_devices(name)
    yield
    if is_main():
        sync_global_devices(name)


def any_process(*flags: bool, meet: bool) -> tuple[bool, ...]:
    """Whether any process raised each flag. Several processes ask each other only where all `meet`, else none did."""
    if jax.process_count() == 1:
        return flags
    if not meet:
        return (False,) * len(flags)
    return tuple(process_allgather(np.array(flags)).any(axis=0).tolist())


def check_equal(**parts: Any) -> None:
    """Raise ParallelError with the names of the parts that are not the same in every process."""
    hashes = np.array([list(hashlib.sha256(repr(part).encode()).digest()) for part in parts.values()], np.uint8)
    everywhere = process_allgather(hashes).reshape(-1, *hashes.shape)
    same = (everywhere == everywhere[0]).all(axis=(0, 2))
    differ = [name for name, alike in zip(parts, same, strict=True) if not alike]
    if differ:
        raise ParallelError(
            f"--distributed: not every process has the same {' and '.join(differ)}; this one, {jax.process_index()}, "
            f"has {'; '.join(str(parts[name]) for name in differ)}. Start all with the same command line and data"
        )


@functools.cache
def mesh() -> Mesh:
    """All devices of all processes in one row, those of a process side by side."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh(), PartitionSpec())


def batch_sharding() -> NamedSharding:
    """The sharding of an array of which each device holds some rows."""
    return NamedSharding(mesh(), PartitionSpec(AXIS))


def check_batch_size(config: Params) -> None:
    """Raise ParallelError where a batch cannot be divided evenly."""
    count, parts = mesh().size * config.accumulate, f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    if config.B % count:
        near = [size for size in (config.B // count * count, (config.B // count + 1) * count) if size]
        raise ParallelError(
            f"--B = {config.B}: a batch is divided evenly over {mesh().size} devices{parts}; take "
            f"--B {' or '.join(map(str, near))}, or fewer devices (CUDA_VISIBLE_DEVICES; on a CPU JAX_NUM_CPU_DEVICES)"
        )


def shard(tree: Any) -> Any:
    """Inside a jitted function: let each device compute its rows of these arrays."""
    return jax.lax.with_sharding_constraint(tree, batch_sharding())


def replicate(tree: Any) -> Any:
    """Arrays that are the same in every process, copied to every device."""

    def copied(leaf):
        copies = [jax.device_put(leaf, device) for device in mesh().local_devices]
        return jax.make_array_from_single_device_arrays(copies[0].shape, replicated(), copies)

    return jax.tree.map(copied, tree)


def unreplicate(tree: Any) -> Any:
    """Replicated arrays as arrays of one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def local_rows(B: int) -> slice:
    """The rows of a batch that the devices of this process hold."""
    mine = [place for place, device in enumerate(mesh().devices) if device.process_index == jax.process_index()]
    each = B // mesh().size
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def global_batch(tree: Any) -> Any:
    """Arrays of the rows of all processes, from those that each process has: its `local_rows`."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batch_sharding(), rows), tree)
