"""A trained network in two plain files that anybody can read: how it is shared.

    FOLDER/model.safetensors   averaged weights, each named by its place in the network: "down.0.0.block.conv1.kernel"
           config.json         what the checkpoint says about itself, and what EXPORTED adds

They are read as float32, whatever they are stored as. float16 rounds each number. int8 stores a kernel W [..., o], the
last axis of which counts output channels, as whole numbers q [..., o] with a float16 per channel, NAME.scale [o], and
all that is no kernel as float16:

    scale = max |W| / 127 over all axes but the last, rounded up,    q = round(W / scale),    |W - q scale| <= scale / 2

Reading checks everything before it is used, runs nothing that is in the files, and needs no Orbax.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from files import from_home, open_regular, parsed, replacing, say_once, sha256
from params import Sampling

FORMAT = "emoji-diffusion 1"  # of both files; any change of what they mean needs another number
FILES = ("model.safetensors", "config.json")
STORED = {"float32": "F32", "float16": "F16", "int8": "I8"}  # safetensors' names
LARGEST_CONFIG = 2**24  # bytes
FIRST_RUN = Path("models_vA0/final")  # what train.py writes where no other folder is named
BUNDLED = Path(__file__).resolve().parent.parent / "pretrained"  # the network that comes with this program
ABOUT = {  # what a network must say about itself, in a checkpoint and in config.json, and when that is right
    "config": lambda it: isinstance(it, dict),
    "encoder": lambda it: isinstance(it["sha256"], str),
    "schedule": lambda it: isinstance(it, dict),
    "dataset": lambda it: isinstance(it["fingerprint"], str),
    "prompts": lambda it: isinstance(it, list) and it and all(isinstance(prompt, str) for prompt in it),
    "step": lambda it: isinstance(it, int) and 0 <= it < 2**31,
    "seconds": lambda it: 0 <= it < 1e12,
}
EXPORTED = {  # what config.json says besides
    "ema": lambda it: it in ("short", "long"),  # which average of the weights it is
    "dtype": lambda it: it in tuple(STORED),
    "sampling": Sampling.from_json,  # that is recommended
    "sha256": lambda it: isinstance(it, str),  # of model.safetensors
}
HUB = r"(?P<name>\w[\w.-]*/(?!(epoch\d+|final|stopped)$)\w[\w.-]*)(@(?P<revision>[\w./-]+))?"  # not a run's checkpoint


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of other shapes or cannot be written; the message says which and what to do."""


def checked(about: dict, path: Path, right: dict[str, Callable[[Any], Any]]) -> dict:
    """What a network says about itself; CheckpointError names a field that is missing or not `right`."""
    for field, is_right in right.items():
        try:
            whole = is_right(about[field])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: about does not say {field} as it should; take another one")
    return about


def default_checkpoint() -> Path:
    """The checkpoint where none is named: that of the first run or, where there is none, the bundled network."""
    replaced = FIRST_RUN.parent / ".replaced" / FIRST_RUN.name  # where a killed trainer may have left it
    if FIRST_RUN.exists() or replaced.exists():
        return FIRST_RUN
    if not is_exported(BUNDLED):
        what = f"there is neither {FIRST_RUN} nor a network in {BUNDLED}"
        raise CheckpointError(f"no checkpoint: {what}; train one: python train.py quick")
    say_once(f"there is no {FIRST_RUN}: the network is that of {BUNDLED}")
    return BUNDLED


def locate(name: str | Path | None) -> Path:
    """A local path itself, or the folder of a model that the Hugging Face hub calls "user/name[@revision]".

    The hub is asked only where neither the path nor the folder that it begins with is here. If nothing is named, it is
    the default checkpoint.
    """
    if name is None:
        return default_checkpoint()
    path, on_hub = from_home(name), re.fullmatch(HUB, str(name))
    if not on_hub or path.exists() or Path(path.parts[0]).exists():
        return path
    try:
        import huggingface_hub  # only here: what is on the disk should not wait for it

        return Path(
            huggingface_hub.snapshot_download(on_hub["name"], revision=on_hub["revision"], allow_patterns=FILES)
        )
    except Exception as error:  # offline, behind a proxy, misspelt, private, not installed: a dozen unrelated types
        raise CheckpointError(
            f"there is no folder {name}, and as a name on the Hugging Face hub it could not be fetched "
            f"({in_a_line(error)}); check the name, and that the hub can be reached"
        ) from error


def in_a_line(error: Exception) -> str:
    """Kind and first line of an error of the hub, whose messages are long."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def is_exported(path: Path) -> bool:
    """Whether a folder holds one of the two files, and no checkpoint of Orbax."""
    return any((path / name).exists() for name in FILES)


def about(path: Path) -> dict:
    """What config.json says; CheckpointError names a field of it that is missing or wrong."""
    file = path / "config.json"
    try:
        with open_regular(file, LARGEST_CONFIG) as stream:
            found = parsed(stream.read())
        written = found["format"]
    except OSError as error:
        raise CheckpointError(f"{path} is not whole: config.json: {error.strerror}; copy it anew") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is none of export.py ({type(error).__name__}: {error}); copy it anew") from None
    if written != FORMAT:
        what = f"its format is {written!r:.40}, this version of the program reads {FORMAT!r}"
        raise CheckpointError(f"{file}: {what}; take the version that wrote it, or export the checkpoint again")
    return checked(found, path, ABOUT | EXPORTED)


def recommend(path: Path, sampling: Sampling) -> None:
    """Let config.json say from now on how the network is best sampled."""
    _write_config(path / "config.json", about(path) | {"sampling": sampling.to_json()})


def restore(path: Path, like: dict[str, dict]) -> dict[str, dict]:
    """The averaged weights, in the structure of `like`, {"ema_short": tree} or {"ema_long": tree}, as float32."""
    file, said, ((item, tree),) = path / "model.safetensors", about(path), like.items()
    if item != f"ema_{said['ema']}":
        raise CheckpointError(f"{path} holds the {said['ema']} average alone; take that, or export the other one")
    expected = [_parts(name_of(key), leaf.shape, said["dtype"]) for key, leaf in jax.tree.leaves_with_path(tree)]
    try:
        if not file.is_file():
            raise CheckpointError(f"{path} is not whole: there is no file model.safetensors; copy it anew")
        if (found := sha256(file)) != said["sha256"]:
            what = f"its SHA-256 is {found[:12]}…, config.json says {said['sha256'][:12]}…"
            raise CheckpointError(f"{file} is not as it was written: {what}; copy both files anew")
        with safe_open(file, "numpy") as tensors:
            _compare(file, tensors, {name: kind for parts in expected for name, kind in parts.items()})
            weights = [_read([tensors.get_tensor(name) for name in parts]) for parts in expected]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy it anew") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; copy it anew") from None
    return {item: jax.device_put(jax.tree.unflatten(jax.tree.structure(tree), weights))}


def write(folder: Path, weights: dict, about: dict, *, dtype: str) -> None:
    """Write both files of a network; `about` says what a checkpoint does, and ema and sampling."""
    tensors = {}
    for key, leaf in jax.tree.leaves_with_path(jax.device_get(weights)):
        tensors |= stored(name_of(key), np.asarray(leaf), dtype)
    file = folder / "model.safetensors"
    file.write_bytes(save(tensors))  # save_file would let nobody else read it
    _write_config(folder / "config.json", about | {"format": FORMAT, "dtype": dtype, "sha256": sha256(file)})


def _write_config(path: Path, about: dict) -> None:
    with replacing(path) as beside:
        text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", encoding="utf-8")


def name_of(key: tuple) -> str:
    return jax.tree_util.keystr(key, simple=True, separator=".")


def _parts(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a weight is stored in: dtype and shape by name."""
    if dtype == "int8" and len(shape) > 1:
        return {name: ("I8", shape), f"{name}.scale": ("F16", shape[-1:])}
    return {name: ("F32" if dtype == "float32" else "F16", shape)}


def quantized(weight: np.ndarray, axes: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers q, and a float16 scale for all numbers along some axes: weight is about q * scale."""
    exact = np.abs(weight).max(axis=axes, keepdims=True) / np.float32(127)
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)  # so that |q| <= 127
    return np.rint(weight / np.where(scale > 0, scale, 1).astype(np.float32)).astype(np.int8), scale


def stored(name: str, weight: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a float32 weight; CheckpointError where its numbers are beyond those of float16."""
    with np.errstate(over="ignore"):
        if dtype == "int8" and weight.ndim > 1:
            q, scale = quantized(weight, tuple(range(weight.ndim - 1)))
            parts = {name: q, f"{name}.scale": scale.reshape(-1)}
        else:
            parts = {name: weight.astype(np.float32 if dtype == "float32" else np.float16)}
    if not all(np.isfinite(part).all() for part in parts.values()):
        largest = np.abs(weight).max()
        raise CheckpointError(f"{name} reaches {largest:.3g}, too large for {dtype}: export with --dtype float32")
    return parts


def _compare(file: Path, tensors: safe_open, expected: dict[str, tuple]) -> None:
    """Raise CheckpointError where the tensors of a file are not those of the network of its config.json."""
    slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{name} is not of this network" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        (dtype, shape), (right, size) = found[name], expected[name]
        if found[name] != expected[name]:
            faults.append(f"{name} is {dtype} {list(shape)}, not {right} {list(size)}")
    if faults:
        more = f", and {len(faults) - 1} more faults" * (len(faults) > 1)
        raise CheckpointError(f"{file} does not fit its config.json: {min(faults)}{more}; copy both files anew")


def _read(parts: list[np.ndarray]) -> np.ndarray:
    """A weight in float32 from the tensors that it is stored in, in the order of _parts."""
    weight, *scale = (part.astype(np.float32) for part in parts)
    return weight * scale[0] if scale else weight
