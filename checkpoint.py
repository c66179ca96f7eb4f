"""Checkpoints: everything that training goes on from and drawing needs, in one folder.

    models_vA0/epoch10/   ema_short, ema_long   averaged weights; drawing reads one of them
                          train                 weights, optimizer state, step
                          about                 JSON: configuration, encoder, schedule, dataset, prompts, epoch, step
                          checksums.json        SHA-256 of every other file, compared before anything is read

Weights are plain nested dicts of arrays, so that no file depends on the classes that made it. A checkpoint is written
as `.epoch10.part` and takes its name when whole; one that had the name waits as `.epoch10.old` until then, and is read
there: only writers rename and delete. Of several processes the first one writes, and none waits for another.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from files import flush, sha256

ITEMS = ("ema_short", "ema_long", "train", "about")
NAMES = r"epoch\d+|final|stopped"  # of the checkpoints of a run

logging.getLogger("absl").setLevel(logging.CRITICAL)  # where Orbax raises an error, its threads log it several times


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unlike or cannot be written; the message names the folder and what to do."""


# Writing.


def save(path: Path, items: dict[str, dict], about: dict) -> None:
    """Write a folder of trees of arrays and one JSON; an older one of that name gives way only to a complete one.

    Raises CheckpointError where that fails, and leaves nothing behind. Only the first process writes.
    """
    if jax.process_index() == 0:
        _write(path.resolve(), _copied(items), about)


class Saver:
    """Saves while training goes on: the arrays are copied at once, then written in the background, one save at a time.

    A save that fails is said and leaves nothing behind. With keep = N, epoch M once written deletes the epochs before
    it but for the last N - 1; 0 keeps all.
    """

    def __init__(self, keep: int = 0, say: Callable[[str], None] = print):
        self.keep, self.say = keep, say
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()
        self.wait()

    def save(self, path: Path, items: dict[str, dict], about: dict, *, now: bool = False) -> None:
        """Like the function of that name, in the background; `now`: before this returns, and raising its errors."""
        self.wait()
        if now:
            save(path, items, about)
        elif jax.process_index() == 0:
            self._in_flight = self._thread.submit(self._write, path.resolve(), _copied(items), about)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._in_flight:
            self._in_flight.result()

    def _write(self, path: Path, items: dict[str, dict], about: dict) -> None:
        try:
            _write(path, items, about)
            if self.keep:
                _delete_before(path, self.keep)
        except CheckpointError as error:
            self.say(f"{error}. Training goes on")


def _copied(items: dict[str, dict]) -> dict[str, dict]:
    """Arrays of their own on the host: a training step gives the memory of its state away."""

    def local(leaf):
        if isinstance(leaf, jax.Array):
            assert leaf.is_fully_replicated, "every device must hold all of an array that is saved"
            return leaf.addressable_data(0)
        return leaf

    return jax.tree.map(np.array, jax.device_get(jax.tree.map(local, items)))  # all of them on the way at once


def _write(path: Path, items: dict[str, dict], about: dict) -> None:
    part, old = _beside(path)
    saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        with _orbax() as writer:
            writer.save(part, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **saves))
        files = sorted(file for file in part.rglob("*") if file.is_file())
        sums = {file.relative_to(part).as_posix(): sha256(file) for file in files}
        (part / "checksums.json").write_text(json.dumps(sums, indent=1))
        for written in (*part.rglob("*"), part):
            flush(written)
        if path.exists():
            path.rename(old)
        part.rename(path)
        flush(path.parent)
        _tidy(path)
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds where a disk is full
        with suppress(OSError):
            _tidy(path)
        raise CheckpointError(
            f"{path} cannot be written: {_reason(error)}; see that there is room and that the folder may be written. "
            f"Still whole: {next(_whole(path.parent), 'none')}"
        ) from error


def _beside(path: Path) -> tuple[Path, Path]:
    """The names of what is not whole, not yet or no longer, and of what waits until another checkpoint is whole."""
    return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")


def _tidy(path: Path) -> None:
    """Clear away what saves and deletions left in this folder; a checkpoint that waits in vain gets its name back."""
    for left in sorted(path.parent.glob(".*"), reverse=True):  # .part before .old
        match = re.fullmatch(rf"\.({re.escape(path.name)}|{NAMES})\.(old|part.*)", left.name)
        if match and match[2] == "old" and not path.with_name(match[1]).exists():
            left.rename(path.with_name(match[1]))
        elif match:
            _delete(left, match[1])


def _delete(folder: Path, name: str) -> None:
    """Delete what was the checkpoint `name`; cut off, the rest does not look whole, and goes at the next save."""
    part, _ = _beside(folder.with_name(name))
    with suppress(OSError):
        shutil.rmtree(folder.rename(part))


def _delete_before(path: Path, keep: int) -> None:
    """Delete the epochs before `path` but for the last keep - 1; where `path` is no epoch, none."""
    epochs = {found: int(found.name[5:]) for found in _named(path.parent) if found.name.startswith("epoch")}
    before = [found for found in epochs if path in epochs and epochs[found] < epochs[path]]
    for found in sorted(before, key=epochs.get, reverse=True)[keep - 1 :]:
        _delete(found, found.name)


# Reading.


def about(path: Path) -> dict:
    """The JSON part of a checkpoint."""
    return _read(path, {"about": ocp.args.JsonRestore()})["about"]


def restore(path: Path, like: dict[str, dict]) -> dict[str, dict]:
    """The items of a checkpoint that `like` names, in its structure, shapes and dtypes, on a device of this process.

    Each process reads the shared folder by itself; `jax.device_put` then spreads the arrays over the devices of all.
    """
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    read = _read(path, {item: ocp.args.StandardRestore(tree) for item, tree in host.items()})
    for (key, asked), leaf in zip(jax.tree.leaves_with_path(host), jax.tree.leaves(read), strict=True):
        if asked.shape != leaf.shape:
            name = jax.tree_util.keystr(key, simple=True, separator="/")
            raise CheckpointError(f"{path}: {name} is {leaf.shape}, not {asked.shape}; take another one")
    return jax.device_put(read)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first; says which ones do not even tell their step."""
    steps = {}
    for path in _named(folder):
        try:
            steps[path] = about(path)["step"]
        except CheckpointError as fault:
            print(f"passed over: {fault}")
    return sorted(steps, key=steps.get)


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of a run that has trained for the most steps; says which ones are passed over.

    None where there are no checkpoints, CheckpointError where none of them is whole.
    """
    path = next(_whole(folder), None)
    if path is None and (there := _named(folder)):
        names = ", ".join(found.name for found in there)
        raise CheckpointError(f"{folder} holds no whole checkpoint: move {names} away, or use another folder")
    return path


def _whole(folder: Path) -> Iterator[Path]:
    for path in reversed(checkpoints(folder)):
        try:
            _verified(path, ITEMS)
        except CheckpointError as fault:
            print(f"passed over: {fault}")
        else:
            yield path


def _named(folder: Path) -> list[Path]:
    """The names under which a run's checkpoints can be read."""
    found = {re.sub(r"^\.(.+)\.old$", r"\1", path.name) for path in folder.glob("*")}
    return [folder / name for name in sorted(found) if re.fullmatch(NAMES, name)]


def _read(path: Path, items: dict) -> dict:
    """What Orbax reads, once the files are found whole; again where a trainer has replaced them meanwhile."""
    path = path.resolve()
    before = _lies(path)
    try:
        folder = _verified(path, items)
        with _orbax() as reader:
            read = reader.restore(folder, args=ocp.args.Composite(**items))
            return {item: read[item] for item in items}
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds where the arrays are others
        if _lies(path) != before:
            return _read(path, items)
        if isinstance(error, CheckpointError):
            raise
        fault = f"{', '.join(items)} cannot be read: {_reason(error)}"
        raise CheckpointError(f"{path}: {fault}; take another one") from error


def _lies(path: Path) -> tuple[Path, int | None]:
    """Where a checkpoint lies, and the folder's number on the disk: what takes its place has another one."""
    _, old = _beside(path)
    folder = old if not path.exists() and old.exists() else path
    with suppress(OSError):
        return folder, folder.stat().st_ino
    return folder, None


def _verified(path: Path, items: Iterable[str]) -> Path:
    """Where a checkpoint lies in which all files of these items, and of `about`, are as they were written."""
    folder, number = _lies(path)
    inside = _named(folder)
    if number is None or inside:
        there = ", ".join(map(str, inside or _named(path.parent)))
        hint = f"there are {there}" if there else "train one: python train.py quick"
        raise CheckpointError(f"no checkpoint at {path}; {hint}")
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        asked = [name for name in sums if "/" not in name or name.partition("/")[0] in {*items, "about"}]
        altered = [name for name in asked if sha256(folder / name) != sums[name]]
        fault = f"{', '.join(altered)} changed after writing" if altered else ""
    except OSError as error:
        fault = _reason(error)
    except ValueError:
        fault = "checksums.json cannot be understood"
    if fault:
        raise CheckpointError(f"{path} is not whole: {fault}; take another one")
    return folder


def _orbax() -> ocp.Checkpointer:
    """Reads and writes for this process alone."""
    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _reason(error: Exception) -> str:
    """The innermost cause, which TensorStore puts last in a long line."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if isinstance(error, OSError) else line.rpartition(": ")[2]
