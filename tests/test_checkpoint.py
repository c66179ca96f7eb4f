"""A checkpoint is whole or refused, whatever happens while it is written, and to its files afterwards."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import UNREADABLE, damaged

import checkpoint
from checkpoint import ITEMS, CheckpointError, Saver

ROOT = Path(checkpoint.__file__).parent
ARRAYS = ITEMS[:3]


def items(step):
    weights = {"b": np.full(5, step, np.float32), "layers": [np.full((2, 3), -step, np.float32)]}
    return {"ema_short": weights, "ema_long": weights, "train": {"weights": weights, "step": np.int32(step)}}


ABOUT = {
    "config": {}, "encoder": {"sha256": "0"}, "schedule": {}, "dataset": {"fingerprint": "0"}, "prompts": ["κόσμος"],
    "step": 1, "seconds": 0.1,
}  # fmt: skip


def small(path, step):
    checkpoint.Saver().save(path, items(step), ABOUT | {"step": step, "words": ["κόσμος", None, 0.1]}, now=True)


def read(path):
    """The step that every number of a checkpoint says it is of."""
    found = checkpoint.restore(path, items(0))
    step = checkpoint.about(path)["step"]
    jax.tree.map(np.testing.assert_array_equal, found, items(step))
    return step


def contents(folder):
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in folder.rglob("*")}


# Reading.


def test_what_is_saved_is_restored_in_its_structure_and_dtypes(tmp_path):
    ones, words = {"w": jnp.ones((2, 3))}, ["κόσμος", None, 0.1]
    train = {"pair": (jnp.arange(3, dtype=jnp.bfloat16), np.array([True, False])), "step": jnp.int32(7)}
    path = tmp_path / "new folder" / "final"
    checkpoint.Saver().save(
        path, {"ema_short": ones, "ema_long": ones, "train": train}, ABOUT | {"words": words}, now=True
    )
    assert checkpoint.about(path) == ABOUT | {"words": words, "sampling": {}}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train)
    found = checkpoint.restore(path, {"train": shapes})
    assert found.keys() == {"train"}
    assert jax.tree.structure(found["train"]) == jax.tree.structure(train)
    jax.tree.map(lambda found, saved: np.testing.assert_array_equal(found, saved, strict=True), found["train"], train)


def test_fields_of_any_other_kind_are_refused_by_name(two, monkeypatch):
    for said in damaged(ABOUT):
        monkeypatch.setattr(checkpoint, "_read", lambda path, items, said=said: {"about": said})
        with suppress(CheckpointError):
            found = checkpoint.about(two / "epoch9")
            assert found.keys() >= ABOUT.keys()
            assert np.int32(found["step"]) >= 0
            assert np.isfinite(found["seconds"])
            assert all(isinstance(prompt, str) for prompt in found["prompts"])
            assert isinstance(found["encoder"]["sha256"] + found["dataset"]["fingerprint"], str)
    for field in ABOUT:
        monkeypatch.setattr(checkpoint, "_read", lambda path, items, field=field: {"about": ABOUT | {field: None}})
        with pytest.raises(CheckpointError, match=f"epoch9: about does not say {field} as it should; take another one"):
            checkpoint.about(two / "epoch9")


class Other(NamedTuple):
    """Has the fields of optax.ScaleByAdamState in another order."""

    nu: dict
    count: jax.Array
    mu: dict


def test_an_optimizer_state_is_restored_as_any_class_of_the_same_fields(tmp_path):
    weights = {"w": jnp.arange(3.0), "layers": [{"b": jnp.ones(2)}, {}]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 9)))
    updates, opt_state = optimizer.update(weights, optimizer.init(weights), weights)
    train = {"weights": optax.apply_updates(weights, updates), "opt_state": opt_state, "step": jnp.int32(1)}
    checkpoint.Saver().save(tmp_path / "final", {"train": train}, ABOUT | {"step": 1}, now=True)

    found = checkpoint.restore(tmp_path / "final", {"train": jax.tree.map(jnp.zeros_like, train)})["train"]
    assert jax.tree.structure(found) == jax.tree.structure(train)
    jax.tree.map(lambda found, saved: np.testing.assert_array_equal(found, saved, strict=True), found, train)

    empty, (adam, *rest) = opt_state
    asked = (list(empty), [Other(adam.nu, adam.count, adam.mu), *rest])
    _, (adam_found, *_) = checkpoint.restore(tmp_path / "final", {"train": {**train, "opt_state": asked}})["train"][
        "opt_state"
    ]
    assert isinstance(adam_found, Other)
    for field in Other._fields:
        jax.tree.map(np.testing.assert_array_equal, getattr(adam_found, field), getattr(adam, field))
    about_tree = (tmp_path / "final" / "train" / "_METADATA").read_text()
    assert "ScaleByAdamState" not in about_tree
    assert "EmptyState" not in about_tree


def test_another_shape_or_structure_is_refused(tmp_path):
    small(tmp_path / "final", 1)
    other = items(0)["ema_short"]
    with pytest.raises(CheckpointError, match=r"final: ema_short/layers/0 is \(2, 3\), not \(3, 2\); take another"):
        checkpoint.restore(tmp_path / "final", {"ema_short": {**other, "layers": [np.ones((3, 2), np.float32)]}})
    with pytest.raises(CheckpointError, match=r"final: ema_short cannot be read: .*; take another"):
        checkpoint.restore(tmp_path / "final", {"ema_short": {"b": other["b"]}})


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def largest(path):
    return path if path.is_file() else max(path.rglob("*"), key=lambda file: file.is_file() * file.stat().st_size)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    small(folder / "epoch9", 9)
    small(folder / "epoch10", 10)
    return folder


@pytest.fixture
def run(two, tmp_path):
    """A run's folder with two checkpoints."""
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("part", [*ITEMS, "checksums.json", "_CHECKPOINT_METADATA"])
def test_damage_is_named_and_the_checkpoint_before_is_used(run, capsys, part, damage):
    assert checkpoint.newest(run).name == "epoch10"
    assert capsys.readouterr().out == ""
    damage(largest(run / "epoch10" / part))
    where = "" if part == "checksums.json" and damage is flip else part  # there it is the file that seems damaged
    with pytest.raises(CheckpointError, match=f"{run}/epoch10 is not whole: .*{where}.*; take another one"):
        read(run / "epoch10")
    assert checkpoint.newest(run) == run / "epoch9"
    assert f"passed over: {run}/epoch10 is not whole: " in capsys.readouterr().out
    if part in ARRAYS:
        for other in set(ARRAYS) - {part}:
            checkpoint.restore(run / "epoch10", {other: items(0)[other]})
    damage(largest(run / "epoch9" / "train"))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint: move epoch10, epoch9 away, or use another"):
        checkpoint.newest(run)


@pytest.mark.parametrize("item", ITEMS)
def test_a_missing_item_is_named(run, item):
    shutil.rmtree(run / "epoch9" / item)
    with pytest.raises(CheckpointError, match=f"epoch9 is not whole: missing: {item}.*{item}/"):
        read(run / "epoch9")
    sums = json.loads((run / "epoch9" / "checksums.json").read_text())
    unlisted = {name: digest for name, digest in sums.items() if not name.startswith(f"{item}/")}
    (run / "epoch9" / "checksums.json").write_text(json.dumps(unlisted))
    with pytest.raises(CheckpointError, match=f"epoch9 is not whole: missing: {item}; take another one"):
        checkpoint._verify(run / "epoch9", ITEMS)


def without(name):
    return lambda sums: {other: sums[other] for other in sums if other != name}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda sums: {}, "not as checksums.json says: _CHECKPOINT_METADATA, about/"),
        (lambda sums: [], "cannot be understood"),
        (lambda sums: list(sums), "cannot be understood"),
        (lambda sums: None, "cannot be understood"),
        (lambda sums: {**sums, "/dev/zero": "0"}, "missing: /dev/zero"),
        (without("train/_METADATA"), "not as checksums.json says: train/_METADATA"),
        (without("_CHECKPOINT_METADATA"), "not as checksums.json says: _CHECKPOINT_METADATA"),
        (lambda sums: {**sums, "train/more": "0"}, "missing: train/more"),
        (lambda sums: {**sums, "train/_METADATA": None}, "not as checksums.json says: train/_METADATA"),
    ],
)
def test_checksums_that_do_not_list_exactly_the_files_are_a_fault(run, change, fault):
    file = run / "epoch10" / "checksums.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=f"{run}/epoch10 is not whole: .*{fault}.*; take another one"):
        read(run / "epoch10")
    assert checkpoint.newest(run) == run / "epoch9"


@pytest.mark.parametrize("text", UNREADABLE)
def test_checksums_that_are_no_json_are_a_fault(run, text):
    (run / "epoch10" / "checksums.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=f"{run}/epoch10 is not whole: .*; take another one"):
        read(run / "epoch10")
    assert checkpoint.newest(run) == run / "epoch9"


@pytest.mark.parametrize("place", ["", "train"])
def test_a_file_that_is_not_listed_is_a_fault(run, place):
    (run / "epoch10" / place / "more").touch()
    with pytest.raises(CheckpointError, match=f"not as checksums.json says: {place}/?more; take another one"):
        read(run / "epoch10")
    assert checkpoint.newest(run) == run / "epoch9"


def test_every_file_counts(run):
    for file in [file for file in (run / "epoch10").rglob("*") if file.is_file() and file.stat().st_size]:
        flip(file)
        assert checkpoint.newest(run).name == "epoch9"
        flip(file)
    assert read(run / "epoch10") == 10


def test_the_checkpoints_of_a_run_by_their_steps(tmp_path, capsys):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.checkpoints(tmp_path / "nowhere") == []
    for name, step in (("epoch9", 90), ("epoch10", 100), ("stopped", 95), ("epoch11.copy", 110), ("epoch12", 120)):
        small(tmp_path / name, step)
    (tmp_path / "epoch12" / "about" / "metadata").write_text("{")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["epoch9", "stopped", "epoch10"]
    assert "passed over: " in capsys.readouterr().out
    assert checkpoint.newest(tmp_path).name == "epoch10"
    assert checkpoint.checkpoints(tmp_path / "epoch10") == []


def test_no_checkpoint_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere; train one: python train.py quick"):
        checkpoint.about(tmp_path / "nowhere")
    small(tmp_path / "final", 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*epoch9; there are .*final"):
        checkpoint.about(tmp_path / "epoch9")
    with pytest.raises(CheckpointError, match=rf"no checkpoint at {tmp_path}; there are .*final"):
        checkpoint.about(tmp_path)


def test_a_checkpoint_is_found_behind_a_link_and_links_in_a_circle_are_none(run, tmp_path):
    (tmp_path / "newest").symlink_to(run / "epoch10")
    assert read(tmp_path / "newest") == 10
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in tmp_path / "a", tmp_path / "a" / "final":
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*/a"):
            checkpoint.about(path)
        assert checkpoint.checkpoints(path) == []
        assert checkpoint.newest(path) is None
        with pytest.raises(CheckpointError, match="cannot be written"):
            small(path, 1)


def test_a_reader_uses_what_waits_where_it_lies(tmp_path):
    small(tmp_path / "final", 1)
    small(tmp_path / "spare", 2)
    (tmp_path / ".replaced").mkdir()
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / "final").rename(tmp_path / ".replaced" / "final")
    (tmp_path / "spare").rename(tmp_path / ".unfinished" / "final")
    before = contents(tmp_path)
    assert checkpoint.newest(tmp_path) == tmp_path / "final"
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "final"]
    assert read(tmp_path / "final") == 1
    assert contents(tmp_path) == before
    small(tmp_path / "epoch3", 3)  # a writer tidies up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch3", "final"]
    assert read(tmp_path / "final") == 1


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    small(tmp_path / "final", 1)
    verify = checkpoint._verify

    def replaced(folder, items):
        verify(folder, items)
        monkeypatch.undo()
        small(tmp_path / "final", 2)
        shutil.rmtree(folder / "train")  # what was verified is gone
        small(tmp_path / "final", 2)

    monkeypatch.setattr(checkpoint, "_verify", replaced)
    assert int(checkpoint.restore(tmp_path / "final", items(0))["train"]["step"]) == 2


def test_what_is_read_is_of_one_checkpoint(tmp_path, monkeypatch):
    small(tmp_path / "final", 1)
    restore = checkpoint.ocp.AsyncCheckpointer.restore

    def replaced(self, folder, args):
        """Reads one item after the other, and the checkpoint is replaced after the first."""
        monkeypatch.undo()
        found = {}
        for name in args.keys():  # noqa: SIM118  (no dict)
            found |= restore(self, folder, args=checkpoint.ocp.args.Composite(**{name: args[name]})).items()
            small(tmp_path / "final", 2)
        return found

    monkeypatch.setattr(checkpoint.ocp.AsyncCheckpointer, "restore", replaced)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path / "final", items(0)), items(2))


# Writing.


class Killed(BaseException):
    """Ends a save as SIGKILL would: nothing catches it, nothing is cleaned up."""


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["epoch10", "epoch11"])
def test_a_save_cut_off_anywhere_loses_nothing(two, tmp_path, monkeypatch, name, every):
    class Steps:
        """Counts what changes a folder, and dies before the n-th time."""

        def __init__(self, n):
            self.left = n

        def __call__(self, change):
            def counted(*args, **keywords):
                if self.left == 0:
                    raise Killed
                self.left -= 1
                return change(*args, **keywords)

            return counted

    for n in itertools.count(step=every):
        folder = shutil.copytree(two, tmp_path / str(n))
        with monkeypatch.context() as patch:
            steps = Steps(n)
            for owner, change in ((Path, "rename"), (Path, "write_text"), (os, "rmdir")):
                patch.setattr(owner, change, steps(getattr(owner, change)))
            try:
                small(folder / name, 11)
                break
            except Killed:
                pass
        assert read(checkpoint.newest(folder)) in (10, 11)
        assert read(folder / "epoch10") in (10, 11)
        small(folder / name, 12)
        assert {path.name for path in folder.iterdir()} == {"epoch9", "epoch10", name}
        assert read(folder / name) == 12
    assert n > 1
    assert read(folder / name) == 11


ENDLESS = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from checkpoint import Saver, about, newest
from test_checkpoint import ABOUT, items
before = newest(Path(sys.argv[1]))
with Saver(keep=2) as saver:
    for step in range(1 + (before is not None and about(before)["step"]), 10**6):
        for name in (f"epoch{step}", "stopped"):
            saver.save(Path(sys.argv[1]) / name, items(step), ABOUT | {"step": step})
            saver.wait()
        print(step, flush=True)
"""


def killed(folder, after):
    """Goes on saving in another process until that is killed; the last step of which it said that it was saved."""
    command = [sys.executable, "-c", ENDLESS, str(folder), str(ROOT), str(ROOT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return int((first + process.stdout.read()).split("\n")[-2])


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_trainer_leaves_its_last_checkpoint_whole(tmp_path, times):
    chance = random.Random(times)
    for _ in range(times):
        saved = killed(tmp_path, chance.uniform(0.2, 1.2))
        assert saved <= read(checkpoint.newest(tmp_path)) <= saved + 1
        assert saved <= read(tmp_path / "stopped") <= saved + 1
        for path in checkpoint.checkpoints(tmp_path):
            read(path)
    small(tmp_path / "final", 1)
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path, full_disk, capfd):
    small(tmp_path / "epoch1", 1)
    noise = {"w": np.random.default_rng(0).normal(size=100_000)}
    full_disk()
    with Saver(keep=1) as saver:
        saver.save(tmp_path / "epoch2", {**items(2), "train": noise}, ABOUT | {"step": 2})
        saver.wait()
        said, logged = capfd.readouterr()
        assert logged == ""
        assert said.startswith(f"{tmp_path}/epoch2 cannot be written: File too large")
        assert f"Still whole: {tmp_path}/epoch1. Training goes on\n" in said
        assert said.count("\n") == 1
        for _ in range(2):  # in a new place, and over one that is whole
            for one in (Saver(), saver):
                with pytest.raises(CheckpointError, match=f"final cannot be written: .*Still whole: {tmp_path}/"):
                    one.save(tmp_path / "final", {**items(2), "train": noise}, ABOUT | {"step": 2}, now=True)
            small(tmp_path / "final", 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch1", "final"]
        assert (read(tmp_path / "epoch1"), read(tmp_path / "final")) == (1, 3)
        saver.save(tmp_path / "epoch4", items(4), ABOUT | {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch4", "final"]


MANY = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import numpy as np
from checkpoint import Saver
from test_checkpoint import ABOUT, items
noise = {str(i): np.random.default_rng(i).normal(size=20_000) for i in range(100)}
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
with Saver() as saver:
    saver.save(Path(sys.argv[1]) / "epoch1", {**items(1), "train": noise}, ABOUT | {"step": 1})
"""


def test_a_full_disk_under_many_arrays_is_one_sentence(tmp_path):
    command = [sys.executable, "-c", MANY, str(tmp_path), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert re.fullmatch(r".*epoch1 cannot be written: File too large; see .*none\. Training goes on\n", done.stdout)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError, match=r"file/final cannot be written: .*Still whole: none"):
        small(tmp_path / "file" / "final", 1)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), "the program would wait for it before it ends"


def test_a_folder_that_can_hold_checkpoints_is_left_as_it_was(run):
    (run / ".rehearsal" / "left by a kill").mkdir(parents=True)
    before = {path: time for path, time in contents(run).items() if path.parts[0] != ".rehearsal"}
    checkpoint.rehearse(run)
    assert contents(run) == before


def no_flush(path):
    if path.is_dir():
        raise OSError(22, "Invalid argument")


def no_rename(path, target):
    if path.name == "final" or Path(target).exists():
        raise OSError(95, "Operation not supported")
    os.rename(path, target)


@pytest.mark.parametrize(
    ("owner", "name", "lacking", "reason"),
    [
        (checkpoint, "flush", no_flush, "Invalid argument"),
        (Path, "rename", no_rename, "Operation not supported"),
        (checkpoint, "sha256", lambda file: str(time.perf_counter()), "not as checksums.json says"),
    ],
)
def test_a_disk_that_cannot_do_what_a_save_needs_is_refused_at_the_start(
    run, monkeypatch, owner, name, lacking, reason
):
    monkeypatch.setattr(owner, name, lacking)
    with pytest.raises(CheckpointError, match=f"{run} cannot hold checkpoints, choose another folder: .*{reason}"):
        checkpoint.rehearse(run)
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == ["epoch10", "epoch9"]


def test_a_name_that_is_not_utf_8_is_refused_at_the_start(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot hold checkpoints.*'utf-8' codec"):
        checkpoint.rehearse(tmp_path / "\udcff")


@pytest.fixture
def gate(monkeypatch):
    """No array is written until it is set."""
    gate, handler = threading.Event(), checkpoint.ocp.type_handlers.NumpyHandler
    write = handler._background_serialize

    async def wait_and_write(*args):
        assert gate.wait(60)
        await write(*args)

    monkeypatch.setattr(handler, "_background_serialize", wait_and_write)
    return gate


def test_what_is_saved_is_the_state_at_that_time(tmp_path, gate):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: 2 * leaf, state), donate_argnums=0)
    state = step(jax.tree.map(jnp.asarray, items(1)))
    with Saver() as saver:
        saver.save(tmp_path / "epoch1", state, ABOUT | {"step": 2})
        given = jax.tree.leaves(state)
        for _ in range(3):
            state = step(state)
        assert all(leaf.is_deleted() for leaf in given)
        assert not (tmp_path / "epoch1").exists()
        gate.set()
    assert read(tmp_path / "epoch1") == 2


@pytest.mark.parametrize("now", [False, True])
def test_a_save_in_flight_is_waited_for(tmp_path, gate, now):
    with Saver() as saver:
        saver.save(tmp_path / "epoch1", items(1), ABOUT | {"step": 1})
        assert not (tmp_path / "epoch1").exists()
        threading.Timer(0.1, gate.set).start()
        saver.save(tmp_path / "final", items(2), ABOUT | {"step": 2}, now=now)
        assert read(tmp_path / "epoch1") == 1
        assert (tmp_path / "final").exists() or not now
    assert read(tmp_path / "final") == 2


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 5, 9, 10, 11]), (1, [11]), (2, [10, 11]), (9, [2, 5, 9, 10, 11])])
def test_only_the_last_epochs_are_kept(two, tmp_path, keep, left):
    for name in ("epoch2", "epoch5", "epoch9", "epoch10", "stopped", "final", "other"):
        shutil.copytree(two / "epoch9", tmp_path / name)
    everything = {path.name for path in tmp_path.iterdir()}
    with Saver(keep) as saver:
        saver.save(tmp_path / "stopped", items(9), ABOUT | {"step": 9})
        saver.wait()
        assert {path.name for path in tmp_path.iterdir()} == everything
        saver.save(tmp_path / "epoch11", items(11), ABOUT | {"step": 11})
    assert {path.name for path in tmp_path.iterdir()} == {*(f"epoch{n}" for n in left), "stopped", "final", "other"}


def test_epochs_after_the_one_that_is_saved_are_kept(run):
    with Saver(keep=1) as saver:
        saver.save(run / "epoch8", items(8), ABOUT | {"step": 8})
    assert sorted(path.name for path in run.iterdir()) == ["epoch10", "epoch8", "epoch9"]


TOGETHER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
import jax
jax.distributed.initialize(sys.argv[3], num_processes=2, process_id=int(sys.argv[1]))
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import checkpoint
from test_checkpoint import ABOUT, items, read
folder = Path(sys.argv[2])
mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = NamedSharding(mesh, PartitionSpec())
state = jax.device_put(items(3), everywhere)
with checkpoint.Saver(keep=1) as saver:
    saver.save(folder / "epoch1", state, ABOUT | {"step": 3})
    saver.save(folder / "epoch2", state, ABOUT | {"step": 3})
    saver.save(folder / "final", state, ABOUT | {"step": 3}, now=True)
multihost_utils.sync_global_devices("saved")
if jax.process_index() == 1:  # alone
    assert checkpoint.newest(folder).name == "final" and read(folder / "final") == 3
state = jax.device_put(checkpoint.restore(folder / "epoch2", items(0)), everywhere)
assert int(jax.jit(lambda state: state["train"]["step"])(state)) == 3
multihost_utils.sync_global_devices("read")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(tmp_path), address, str(ROOT), str(ROOT / "tests")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    both = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(i), *command], env=environment) for i in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch2", "final"]
