"""Many devices as one: a batch is dealt out over them, everything else lies whole on each.

One mesh with one axis, "data", holds every device of every process; a single device is a mesh of one. A step draws
its batch as if there were one device and constrains the rows to the axis; XLA's partitioner then computes each share
where it lies and sums the gradients. So a run does not depend on the number of devices, but for the order in which
float32 sums are taken.

With `--distributed` a process is one of many that run the same script. They take the same steps, and only process 0
prints and writes. What comes from one process alone, a signal or a clock, counts once all have agreed on it.
"""

import atexit
import functools
import hashlib
import os
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dataloader import Picked
from files import CACHE
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
    """Set JAX up, as far as the user has not: 90 % of a GPU's memory, compiled programs kept in .cache/xla.

    Call it before JAX is first used.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def on_accelerator() -> bool:
    """Whether JAX computes on something faster than the CPU."""
    return jax.default_backend() != "cpu"


def join() -> None:
    """Make this process one of many; call before JAX touches a device.

    SLURM, Open MPI, Kubernetes and cloud TPUs are recognised by JAX, else the variables BY_HAND say who this process
    is. Whoever ends without `leave`, by an error, goes at once: an orderly exit would wait for the others, and they
    would wait for it.
    """
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    who = {}
    if len(given) == len(BY_HAND):
        address, count, index = given.values()
        if not (
            count.isdecimal() and index.isdecimal() and int(index) < int(count) and re.fullmatch(r".+:\d+", address)
        ):
            raise ParallelError(f"{' '.join(f'{name}={value}' for name, value in given.items())} is wrong. {HOW}")
        who = {"num_processes": int(count), "process_id": int(index), "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**who)
    except RuntimeError as error:
        raise ParallelError(f"--distributed: the processes did not find each other ({error}). {HOW}") from error
    except ValueError as error:  # what JAX could not find out
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise ParallelError(f"--distributed: no cluster is recognised, and {missing} is not set. {HOW}") from error
    atexit.register(_desert)
    barrier("joined")  # while all are here: the first meeting has a time limit, later ones have none
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open to the end of the process)


def _desert() -> None:
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def leave() -> None:
    """End together, once every process has come here."""
    if jax.distributed.is_initialized():
        barrier("done")
        jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this is the process that prints and writes; true where there is only one."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name."""
    multihost_utils.sync_global_devices(name)


def after_first(name: str) -> None:
    """Let process 0 prepare things alone: the others wait here until it comes to `done_first`."""
    if not is_main():
        barrier(name)


def done_first(name: str) -> None:
    if is_main():
        barrier(name)


def any_process(*flags: bool, meet: bool) -> tuple[bool, ...]:
    """Each flag as raised by any process. Several processes ask each other only where all `meet`; until then, none."""
    if jax.process_count() == 1:
        return flags
    if not meet:
        return (False,) * len(flags)
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


def check_equal(**parts: Any) -> None:
    """Raise ParallelError with the names of the parts that are not the same in every process."""
    hashes = np.array([list(hashlib.sha256(repr(part).encode()).digest()) for part in parts.values()], np.uint8)
    everywhere = multihost_utils.process_allgather(hashes).reshape(-1, *hashes.shape)
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
    """Every device holds all of an array."""
    return NamedSharding(mesh(), PartitionSpec())


def batch_sharding() -> NamedSharding:
    """Each device holds its share of the rows."""
    return NamedSharding(mesh(), PartitionSpec(AXIS))


def check_batch_size(config: Params) -> None:
    """Raise ParallelError where a batch cannot be dealt out evenly."""
    count, parts = mesh().size * config.accumulate, f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    if config.B % count:
        near = [size for size in (config.B // count * count, (config.B // count + 1) * count) if size]
        raise ParallelError(
            f"--B = {config.B}: a batch is dealt out evenly over {mesh().size} devices{parts}; take "
            f"--B {' or '.join(map(str, near))}, or fewer devices (CUDA_VISIBLE_DEVICES; on a CPU JAX_NUM_CPU_DEVICES)"
        )


def shard(tree: Any) -> Any:
    """Inside a jitted function: arrays of rows, each device computing its share."""
    return jax.lax.with_sharding_constraint(tree, batch_sharding())


def replicate(tree: Any) -> Any:
    """Arrays that are the same in every process, laid whole on every device."""

    def lay(leaf):
        copies = [jax.device_put(leaf, device) for device in mesh().local_devices]
        return jax.make_array_from_single_device_arrays(copies[0].shape, replicated(), copies)

    return jax.tree.map(lay, tree)


def unreplicate(tree: Any) -> Any:
    """Arrays laid whole on every device, as arrays of one device of this process: what it alone draws or saves."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def local_rows(B: int) -> slice:
    """The rows of a batch that the devices of this process compute."""
    mine = [place for place, device in enumerate(mesh().devices) if device.process_index == jax.process_index()]
    each = B // mesh().size
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def global_batch(picked: Picked) -> Picked:
    """The batch of all processes, from the rows that each of them has read: those of its `share`."""
    *rows, null_emb, null_mask = picked
    rows = [jax.make_array_from_process_local_data(batch_sharding(), part) for part in rows]
    return Picked(*rows, *replicate((null_emb, null_mask)))
