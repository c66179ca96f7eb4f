"""Checkpoints: everything that sampling needs and training goes on from, in one folder, written and read by Orbax.

    models_vA0/epoch10/   ema_short, ema_long   averaged weights; a sampler reads one of them
                          train                 weights, optimizer state, step
                          about                 JSON: configuration, encoder, schedule, dataset, prompts, epoch, step
                          checksums.json        SHA-256 of every file above, compared before anything is read
                          sampling.json         how it is best sampled, once `evaluate.py --recommend` has found that

Orbax writes copies of the arrays in the background, into the folder `.unfinished`. When all is written, the checkpoint
gets its checksums and moves to its name. One that had this name moves to `.replaced` for that moment and can be read
there, so a kill at any time leaves the old or the new one whole. Of several processes only process 0 writes.
"""

import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from files import flush, parsed, replacing, sha256
from params import Sampling
from sharing.portable import ABOUT, CheckpointError, checked

ITEMS = ("ema_short", "ema_long", "train", "about")
NAMES = r"epoch\d+|final|stopped"  # of the checkpoints of a run
UNFINISHED, REPLACED = ".unfinished", ".replaced"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every error that it raises, some of them twice


class Saver(AbstractContextManager):
    """Saves in the background while training goes on, one checkpoint at a time.

    An error is told to `say` once the save is waited for: by the next save, by `wait` or at the end of the context.
    keep: how many epochs stay, the newest; 0 keeps all.
    """

    def __init__(self, keep: int = 0, say: Callable[[str], None] = print):
        self.keep, self.say = keep, say
        self._in_flight: tuple[Path, ocp.AsyncCheckpointer, Exception | None] | None = None

    def __exit__(self, *_) -> None:
        self.wait()

    def save(self, path: Path, items: dict[str, dict], about: dict, *, now: bool = False) -> None:
        """Copy the arrays and start writing; with `now`, finish before this returns, and raise CheckpointError.

        An array of several processes must lie whole on every device.
        """
        self.wait()
        if jax.process_index() != 0:
            return
        _quieten()
        path, orbax, fault = _real(path), _orbax(), None
        trees = {name: ocp.args.StandardSave(tree) for name, tree in jax.device_get(items).items()}
        try:
            _tidy(path.parent)
            unfinished = path.parent / UNFINISHED / path.name
            orbax.save(unfinished, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **trees))
        except Exception as error:
            fault = error
        self._in_flight = path, orbax, fault
        if now:
            self._finish()

    def wait(self) -> None:
        """Until nothing is being written."""
        try:
            self._finish()
        except CheckpointError as error:
            self.say(f"{error}. Training goes on")

    def _finish(self) -> None:
        if self._in_flight is None:
            return
        (path, orbax, fault), self._in_flight = self._in_flight, None
        try:
            with orbax:
                orbax.wait_until_finished()
            if fault:
                raise fault
        except Exception as error:  # Orbax and TensorStore raise a dozen kinds where a disk is full
            whole = None
            with suppress(OSError, CheckpointError):
                _tidy(path.parent)
                whole = newest(path.parent)
            raise CheckpointError(
                f"{path} cannot be written: {_reason(error)}; see that there is room and that the folder may be "
                f"written. Still whole: {whole or 'none'}"
            ) from error
        if self.keep:
            _delete_before(path, self.keep)


@functools.cache
def _quieten() -> None:
    """Print no traceback for each array whose writing ends after another one's error has ended the save."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(raised) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            show(raised)

    sys.unraisablehook = hook


class _Unfinished(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The folder that Orbax writes into; when Orbax is done, the checkpoint gets its checksums and its name."""

    async def finalize(self) -> None:
        await super().finalize()
        unfinished = Path(self.get_final())
        path = unfinished.parent.parent / unfinished.name
        sums = {name: sha256(unfinished / name) for name in _files(unfinished)}
        (unfinished / "checksums.json").write_text(json.dumps(sums, indent=1))
        for written in (*unfinished.rglob("*"), unfinished):
            flush(written)
        if path.exists():
            (path.parent / REPLACED).mkdir(exist_ok=True)
            path.rename(path.parent / REPLACED / path.name)
        unfinished.rename(path)
        flush(path.parent)
        _tidy(path.parent)


def rehearse(folder: Path) -> None:
    """Write a small checkpoint into a run's folder, another one over it, read that and delete it.

    CheckpointError where a disk cannot do this, at the start of a run and not at its end.
    """
    place = folder / ".rehearsal"
    try:
        str(place).encode()  # a name that is not UTF-8 fails here in plain words
        shutil.rmtree(place, ignore_errors=True)
        for step in (1, 2):
            items = {item: {"step": np.full(3, step)} for item in ITEMS[:3]}
            Saver().save(place / "final", items, {"step": step}, now=True)
            restore(place / "final", items)
    except (CheckpointError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{folder} cannot hold checkpoints, choose another folder: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Delete what saves left in a run's folder; a replaced checkpoint that got no successor takes its name back."""
    for replaced in (folder / REPLACED).glob("*"):
        if not (folder / replaced.name).exists():
            replaced.rename(folder / replaced.name)
    for left in (REPLACED, UNFINISHED):
        shutil.rmtree(folder / left, ignore_errors=True)


def _delete_before(path: Path, keep: int) -> None:
    """Delete the epochs before the epoch `path` but for the last keep - 1; they leave their names first."""
    epochs = [found for found in _named(path.parent) if found.name.startswith("epoch")]
    epochs.sort(key=lambda found: int(found.name[5:]), reverse=True)
    before = epochs[epochs.index(path) + 1 :] if path in epochs else []
    with suppress(OSError):
        for found in before[keep - 1 :]:
            (path.parent / UNFINISHED).mkdir(exist_ok=True)
            found.rename(path.parent / UNFINISHED / found.name)
        _tidy(path.parent)


def about(path: Path) -> dict:
    """The JSON part of a checkpoint; CheckpointError names a field of it that is missing or wrong."""
    said = checked(_read(path, {"about": ocp.args.JsonRestore()})["about"], path, ABOUT)
    beside = _located(_real(path))[0] / "sampling.json"
    try:
        sampling = parsed(beside.read_bytes()) if beside.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{beside} cannot be read ({error}): delete it, the defaults stand in") from None
    return checked(said | {"sampling": sampling}, path, {"sampling": Sampling.from_json})


def recommend(path: Path, sampling: Sampling) -> None:
    """Let a checkpoint say from now on how it is best sampled."""
    with replacing(path / "sampling.json") as beside:
        beside.write_text(json.dumps(sampling.to_json()))


def restore(path: Path, like: dict[str, dict]) -> dict[str, dict]:
    """The items of a checkpoint that `like` names, in its structure, shapes and dtypes, on a device of this process.

    The files know keys and fields, not classes: a NamedTuple may be restored as another one of the same fields.
    Each process reads the shared folder by itself; `parallel.replicate` then lays the arrays on all devices.
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
    for path in reversed(checkpoints(folder)):
        try:
            _verify(_located(path)[0], ITEMS)
        except CheckpointError as fault:
            print(f"passed over: {fault}")
        else:
            return path
    if names := ", ".join(path.name for path in _named(folder)):
        raise CheckpointError(f"{folder} holds no whole checkpoint: move {names} away, or use another folder")
    return None


def _named(folder: Path) -> list[Path]:
    """The names under which a run's checkpoints can be read."""
    names = {path.name for path in (*folder.glob("*"), *folder.glob(f"{REPLACED}/*"))}
    return [folder / name for name in sorted(names) if re.fullmatch(NAMES, name)]


def _real(path: Path) -> Path:
    """The whole path behind links; of links in a circle, one that does not exist."""
    return Path(os.path.realpath(path))


def _located(path: Path) -> tuple[Path, bytes]:
    """Where a checkpoint lies, and its checksums.json, which differs from that of any other checkpoint."""
    replaced = path.parent / REPLACED / path.name
    folder = replaced if replaced.exists() and not path.exists() else path
    with suppress(OSError):
        return folder, (folder / "checksums.json").read_bytes()
    return folder, b""


def _read(path: Path, items: dict) -> dict:
    """What Orbax reads from files found whole; once more where a trainer has replaced them meanwhile."""
    before, fault = _located(path := _real(path)), None
    try:
        _verify(before[0], items)
        with _orbax() as orbax:
            read = orbax.restore(before[0], args=ocp.args.Composite(**items))
    except CheckpointError as error:
        fault = error
    except Exception as error:  # Orbax and TensorStore raise a dozen kinds where the arrays are others
        fault = CheckpointError(f"{path}: {', '.join(items)} cannot be read: {_reason(error)}; take another one")
    if _located(path) != before:
        return _read(path, items)
    if fault:
        raise fault
    return {item: read[item] for item in items}


def _verify(folder: Path, items: Iterable[str]) -> None:
    """Raise CheckpointError unless every file of a checkpoint, other items left out, is as it was written."""
    inside = _named(folder)
    if inside or not folder.exists():
        there = ", ".join(map(str, inside or _named(folder.parent)))
        hint = f"there are {there}" if there else "train one: python train.py quick"
        raise CheckpointError(f"no checkpoint at {folder}; {hint}")
    others = set(ITEMS) - {*items, "about"}
    try:
        sums, files = parsed((folder / "checksums.json").read_bytes()), _files(folder)
        listed, present = ({name for name in names if name.partition("/")[0] not in others} for names in (sums, files))
        missing = (listed - present) | ({*items, "about"} - {name.partition("/")[0] for name in present})
        altered = {name for name in present if sha256(folder / name) != sums.get(name)}
        fault = f"not as checksums.json says: {', '.join(sorted(altered)[:3])}" if altered else ""
        fault = f"missing: {', '.join(sorted(missing)[:3])}" if missing else fault
    except OSError as error:
        fault = _reason(error)
    except (ValueError, TypeError, AttributeError):
        fault = "checksums.json cannot be understood"
    if fault:
        raise CheckpointError(f"{folder} is not whole: {fault}; take another one")


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint that checksums.json lists."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name not in ("checksums.json", "sampling.json"))


def _orbax() -> ocp.AsyncCheckpointer:
    """Writes and reads for this process alone."""
    options = {
        "multiprocessing_options": ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()}),
        # made in the background, a folder that fails leaves threads waiting for it, and the program, for five minutes
        "async_options": ocp.AsyncOptions(create_directories_asynchronously=False),
    }
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(**options))
    return ocp.AsyncCheckpointer(handler, temporary_path_class=_Unfinished, **options)


def _reason(error: Exception) -> str:
    """The innermost cause, which TensorStore puts last in a long line."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return line if isinstance(error, OSError) else re.sub(r" \[\w+='.*", "", line).rpartition(": ")[2]
