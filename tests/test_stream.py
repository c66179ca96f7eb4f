"""What is read from the disk against what lies in memory, on a small set of three vendors."""

import dataclasses
import itertools
import resource
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import dataloader
import dataset
import files
import stream
from files import replacing
from text_encoder import TextEncoder

KEY = jax.random.key
DRAWN_BY = [("One",), ("One", "Two", "Three"), ("Two", "Three"), ("Three",), ("One", "Three"), ("Two",), ("One", "Two")]


class Letters(TextEncoder):
    """Stands for a text encoder: every letter is a token, and its embedding says which one and where."""

    identity = {"name": "letters", "sha256": "0"}  # noqa: RUF012
    dim = 2

    def __init__(self):
        pass

    def tokenize(self, texts, length):
        tokens = np.array([[ord(letter) for letter in f"^{text}".ljust(length)[:length]] for text in texts], np.int32)
        return tokens, tokens != ord(" ")

    def __call__(self, texts, length):
        tokens, mask = self.tokenize(texts, length)
        text_emb = np.stack([tokens, np.broadcast_to(np.arange(length), tokens.shape)], -1).astype(np.float32)
        return text_emb * mask[..., None], mask


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    random = np.random.default_rng(0)
    for i, vendors in enumerate(DRAWN_BY):
        for vendor in vendors:
            (root / "image" / vendor).mkdir(parents=True, exist_ok=True)
            rgba = random.integers(0, 256, (9, 11, 4)).astype(np.uint8)
            Image.fromarray(rgba).save(root / "image" / vendor / f"{i}.png")
    rows = [f'{i},thing{i},"sun, sea, air"' for i in range(len(DRAWN_BY))]
    (root / "full_emoji.csv").write_text("\n".join(["#,name,keywords", *rows]) + "\n")
    return root


@pytest.fixture
def config(tiny, root, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)
    return dataclasses.replace(tiny, data=str(root), vendor="One+Two+Three", TEXT_LEN=60, H=8, W=12, stream=True)


def streamed(config, step=0, share=None):
    source = stream.load(dataset.from_config(config, decode=False), Letters(), config)
    return stream.batches(source, KEY(3), step, config, share=share)


def first(config, count, step=0, share=None):
    batches = streamed(config, step, share)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({}, 0),
        ({"caption_variants": 0.5}, 0),
        ({"caption_variants": 0.5, "B": 20}, 123_456),
        ({"vendor": "Three", "CHANNELS": 4}, 5),
    ],
)
def test_what_is_streamed_is_bit_for_bit_what_memory_gives(config, change, step):
    config = dataclasses.replace(config, **change)
    data = dataloader.load(dataset.from_config(config), Letters(), config)
    batch_at = jax.jit(lambda source, step: dataloader.batch_of(source, KEY(3), KEY(4), step, config))
    seen = []
    for number, picked in enumerate(first(config, 8, step), step):
        one, other = batch_at(data, number), batch_at(picked, number)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
        seen.append(picked.images)
    assert any((a != b).any() for a, b in itertools.pairwise(seen))


def test_going_on_in_the_middle_is_as_if_never_stopped(config):
    for a, b in zip(first(config, 9)[5:], first(config, 4, step=5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_shares_of_two_processes_are_the_whole_batch(config):
    config = dataclasses.replace(config, B=5, caption_variants=0.3)
    whole, left, right = first(config, 6), first(config, 6, 0, slice(0, 2)), first(config, 6, 0, slice(2, 5))
    for batch, *halves in zip(whole, left, right, strict=True):
        assert [len(half.images) for half in halves] == [2, 3]
        for field in ("images", "text_emb", "text_mask"):
            both = np.concatenate([getattr(half, field) for half in halves])
            np.testing.assert_array_equal(getattr(batch, field), both)


def test_captions_are_encoded_in_parts_once_and_mapped(config, monkeypatch):
    monkeypatch.setattr(stream, "PART", 16)
    texts = ["", *(f"caption{i}" for i in range(50))]
    rows = stream.encoded(Letters(), texts, 60)
    expected = Letters()(texts, 16)
    np.testing.assert_array_equal(rows["emb"], expected[0])
    np.testing.assert_array_equal(rows["mask"], expected[1])
    monkeypatch.setattr(Letters, "__call__", lambda *_: pytest.fail("encoded again"))
    assert isinstance(stream.encoded(Letters(), texts, 60), np.memmap)


def test_a_file_of_captions_that_was_cut_short_is_made_again(config):
    texts = ["", "one", "two"]
    stream.encoded(Letters(), texts, 60)
    (file,) = (files.CACHE / "captions").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(stream.encoded(Letters(), texts, 60)["emb"], Letters()(texts, 8)[0])


def test_no_room_for_the_captions_is_said(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "CACHE", tmp_path / "file")
    with pytest.raises(dataset.DatasetError, match=r"captions cannot hold the 0 MiB .*or train without --stream"):
        stream.encoded(Letters(), [""], 60)


def test_a_disk_that_fills_up_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(dataset.DatasetError, match=r"captions cannot hold the 0 MiB .*File too large.*make room"):
            stream.encoded(Letters(), ["", "a", "b"], 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_picture_that_breaks_on_the_way_is_named(config, root):
    batches = streamed(dataclasses.replace(config, vendor="Three", B=1))
    next(batches)
    file = root / "image" / "Three" / "3.png"
    whole = file.read_bytes()
    with replacing(file) as beside:  # at once, as it is being read
        beside.write_bytes(whole[:60])
    try:
        with pytest.raises(dataset.DatasetError, match=r"Three/3\.png: a damaged picture.* in its place"):
            list(itertools.islice(batches, 100))
    finally:
        file.write_bytes(whole)


def test_without_grain_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(dataset.DatasetError, match="needs the package grain: pip install grain"):
        next(streamed(config))
