"""Checkpoints: everything that training goes on from and drawing needs, in one folder.

    models_vA0/epoch10/   ema_short, ema_long   averaged weights; drawing reads one of them
                          train                 weights, optimizer state, step
                          about                 JSON: configuration, encoder, schedule, dataset, prompts, epoch, step

Weights are plain nested dicts of arrays, so that no file depends on the classes that made it. A checkpoint is written
beside its place and renamed when whole: what has a name is complete.
"""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ITEMS = ("ema_short", "ema_long", "train", "about")


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or does not fit; the message names the folder and what to do."""


def save(path: Path, items: dict[str, dict], about: dict) -> None:
    """Write a folder of trees of arrays and one JSON; an older one of that name gives way only to a complete one."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path)
    new, old = _beside(path)
    shutil.rmtree(new, ignore_errors=True)
    saves = {name: ocp.args.StandardSave(jax.device_get(tree)) for name, tree in items.items()}
    with _orbax() as writer:
        writer.save(new, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **saves))
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _orbax() -> ocp.Checkpointer:
    """A reader and writer that waits for no other process."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(this, {this}, barrier_sync_key_prefix=str(this))
    handlers = {name: ocp.StandardCheckpointHandler(multiprocessing_options=alone) for name in ITEMS}
    handlers["about"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(composite_options=options, **handlers), multiprocessing_options=alone
    )


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written before it takes its name, and where the one that had the name waits until then."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    _, old = _beside(path)
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def about(path: Path) -> dict:
    """The JSON part of a checkpoint."""
    return _read(path, {"about": ocp.args.JsonRestore()})["about"]


def restore(path: Path, like: dict[str, dict]) -> dict[str, dict]:
    """The items of a checkpoint that `like` names, in its structure, shapes and dtypes."""
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    return jax.device_put(_read(path, {item: ocp.args.StandardRestore(tree) for item, tree in host.items()}))


def newest(folder: Path) -> Path | None:
    """The readable checkpoint in `folder` that has trained for the most steps; None where there is none."""
    for left in folder.glob(".*.old"):
        _recover(left.with_name(left.name[1:].removesuffix(".old")))
    steps = {}
    for path in folder.glob("*"):
        if re.fullmatch(r"epoch\d+|final|stopped", path.name):
            try:
                steps[path] = about(path)["step"]
            except CheckpointError as error:
                print(f"passed over: {error}")
    return max(steps, key=steps.get, default=None)


def _read(path: Path, items: dict) -> dict:
    path = path.resolve()
    _recover(path)
    if not path.is_dir():
        others = sorted(str(found.parent) for found in path.parent.glob("*/about"))
        hint = f"there are {', '.join(others)}" if others else "train one: python train.py quick"
        raise CheckpointError(f"no checkpoint at {path}; {hint}")
    missing = [item for item in ITEMS if not (path / item).is_dir()]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint: it lacks {', '.join(missing)}; take another one")
    try:
        with _orbax() as reader:
            read = reader.restore(path, args=ocp.args.Composite(**items))
            return {item: read[item] for item in items}
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds for a damaged or unlike file
        raise CheckpointError(
            f"{path}: {', '.join(items)} cannot be read: {str(error).splitlines()[0]}; take another one"
        ) from error
