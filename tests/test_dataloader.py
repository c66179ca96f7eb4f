"""What each step shows: from memory, and the same from the disk."""

import dataclasses
import itertools
import resource
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dataloader
import dataset
import files
import parallel
from dataset import DatasetError, Pictures, variants
from params import Params
from text_encoder import TextEncoder

VENDORS = ("One", "Two", "Three")
SOME = [(0,), (0, 1, 2), (1, 2), (2,), (0, 2), (0, 1, 2), (1,)]  # vendors that have a picture of each concept


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")


def pictures(vendors, keywords="") -> Pictures:
    """Row number i of the CSV, "thing i", with a picture of VENDORS[v] for each v of vendors[i]."""
    rows = [(i, VENDORS[v]) for i, some in enumerate(vendors) for v in some]
    names = [f"thing {i}, {vendor} style" for i, vendor in rows]
    images = np.arange(len(rows), dtype=np.uint8).reshape(-1, 1, 1, 1)
    folders = [Path("image", vendor) for _, vendor in rows]
    heldout = np.zeros(len(rows), bool)
    indexes, words, others = [str(i) for i, _ in rows], [keywords] * len(rows), [[] for _ in rows]
    return Pictures(images, names, indexes, folders, words, heldout, [], "", others)


def shown(some: Pictures, steps: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pictures and of the captions (-1: the empty one) that the first steps show, one after the other."""
    config = Params(**{"embedding_dropout": 0.0, **options})
    table, _ = dataloader.table(some, config.caption_variants)
    images, captions = dataloader.rows(table, 0, steps, config)
    return images.ravel(), captions.ravel() - 1


# Which pictures and captions.


@pytest.mark.parametrize(("n", "B"), [(7, 3), (7, 7), (5, 13), (1, 4), (64, 8)])
def test_each_pass_shows_every_picture_once_in_a_new_order(n, B):
    seen, _ = shown(pictures([(0,)] * n), 3 * n, B=B)
    passes = seen[: 3 * n].reshape(3, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    if n > 4:
        assert not (passes[0] == passes[1]).all()
        assert not (seen == shown(pictures([(0,)] * n), 3 * n, B=B, seed=1)[0]).all()


def test_a_step_is_a_function_of_seed_and_number_even_after_two_billion_pictures():
    table, _ = dataloader.table(pictures([(0,)] * 7), 0.0)
    config, far = Params(B=64, embedding_dropout=0.4), 2**31 // 64 + 5
    for a, b in zip(dataloader.rows(table, far - 1, 3, config), dataloader.rows(table, far, 2, config), strict=True):
        np.testing.assert_array_equal(a[1:], b)
    images = dataloader.rows(table, far, 7, dataclasses.replace(config, B=7 * 64)).images
    assert (np.bincount(images.ravel()) == 7 * 64).all()  # 64 whole passes a step


def test_all_orders_of_few_are_equally_likely():
    """Pearson's statistic of 24,000 passes over four concepts: 23 degrees of freedom, below 52 in 99.95 %."""
    orders = np.stack([dataloader.permutation(0, number, 4) for number in range(24_000)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.shape == (24,)
    assert ((counts - 1000) ** 2 / 1000).sum() < 52


@pytest.mark.parametrize("B", [3, 7, 20])
def test_vendors_take_turns_and_each_concept_is_shown_once_per_pass(B):
    mixed, passes = pictures(SOME), 12
    rows, texts = (part[: passes * len(SOME)] for part in shown(mixed, -(-passes * len(SOME) // B), B=B))
    np.testing.assert_array_equal(rows, texts)  # each picture has its own caption, vendor included
    concept = np.array([int(index) for index in mixed.indexes])
    by_pass = concept[rows].reshape(passes, -1)
    assert (np.sort(by_pass, axis=1) == np.arange(len(SOME))).all()
    assert not (by_pass[0] == by_pass[1]).all()
    count = np.bincount(rows, minlength=len(concept))
    assert [count[row] for row in range(len(concept))] == [passes // len(SOME[index]) for index in concept]


def test_a_second_vendor_leaves_the_order_of_the_concepts_alone():
    one, _ = shown(pictures([(0,)] * 7), 5, B=4)
    two, _ = shown(pictures([(0, 1)] * 7), 5, B=4)
    np.testing.assert_array_equal(one, two // 2)


def test_variants_are_few_different_and_say_something_new():
    cat = pictures([(0,)])._replace(names=["grinning cat"])
    expected = {
        "": None,
        "Cat, grin": None,  # nothing that the name does not say
        "face": ["grinning cat, face"],
        "face, Face ,joy": ["grinning cat, Face", "joy"],
        "one, two, 3, 4, 5, 6, 7, 8": ["grinning cat, one", "3", "grinning cat, 5", "7"],
    }
    message = r"no picture .* keyword .*--caption_variants needs some.* `keywords`.* rows with the same #"
    for keywords, texts in expected.items():
        if texts is None:
            with pytest.raises(DatasetError, match=message):
                variants(cat._replace(keywords=[keywords]))
        else:
            assert variants(cat._replace(keywords=[keywords])) == [texts]


def test_variants_name_the_vendor_where_there_are_several():
    assert variants(pictures([(0, 1), (1,)], "cat")._replace(keywords=["cat", "cat", ""])) == [
        ["thing 0, cat, One style"],
        ["thing 0, cat, Two style"],
        [],
    ]


def test_further_captions_are_variants_before_those_of_keywords():
    cat = pictures([(0,), (0,)])._replace(names=["a cat", "a dog"], keywords=["pet", ""])
    others = [["my cat", "a pet that sleeps"], [f"dog {i}" for i in range(9)]]
    assert variants(cat._replace(others=others)) == [[*others[0], "a cat, pet"], others[1]]
    both = pictures([(0, 1)])._replace(others=[["it"], ["it"]])
    assert variants(both) == [["it, One style"], ["it, Two style"]]
    _, texts = shown(cat._replace(others=others), 200, B=2, caption_variants=1.0)
    assert set(texts) == set(range(2, 14))  # all of them, and none but them


def test_variants_are_shown_at_their_rate_and_belong_to_their_picture():
    words = pictures([(0, 1)] * 20, "cat, dog, sun, sea")
    words.keywords[0] = ""
    table, texts = dataloader.table(words, 0.3)
    assert (len(texts), table.captions.shape) == (1 + 40 + 39 * 4, (40, 5))
    assert table.captions[0].tolist() == [1, -1, -1, -1, -1]
    rows, chosen = shown(words, 40, B=100, caption_variants=0.3)
    assert all(text + 1 in table.captions[row] for row, text in zip(rows, chosen, strict=True))
    may = rows != 0
    assert (chosen[~may] == 0).all()
    share, n = (chosen[may] >= 40).mean(), may.sum()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    kinds = np.bincount((chosen[may & (chosen >= 40)] - 40) % 4)
    assert abs(kinds / kinds.sum() - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / kinds.sum())


def test_variants_leave_the_order_of_the_pictures_alone():
    words = pictures([(0, 1)] * 5, "cat")
    rows, own = shown(words, 9, B=4)
    np.testing.assert_array_equal(rows, own)
    varied, texts = shown(words, 9, B=4, caption_variants=1.0)
    np.testing.assert_array_equal(rows, varied)
    assert (texts >= 10).all()


def test_dropout_replaces_captions_by_the_empty_one_at_its_rate():
    some = pictures([(0,)] * 11)
    assert (shown(some, 3, embedding_dropout=1.0)[1] == -1).all()
    assert (shown(some, 3, embedding_dropout=0.0)[1] >= 0).all()
    dropped = shown(some, 1, B=4000, embedding_dropout=0.3)[1] == -1
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)


# Captions.


class Letters(TextEncoder):
    """Stands for a text encoder: every letter is a token, and its embedding says which one and where."""

    dim = 2
    calls = 0

    def __init__(self, name="letters"):
        self.identity = {"name": name, "sha256": name}

    def name_unknown(self, texts):
        Letters.asked = texts

    def tokenize(self, texts, length):
        tokens = np.array([[ord(letter) for letter in f"^{text}".ljust(length)[:length]] for text in texts], np.int32)
        return tokens, tokens != ord(" ")

    def __call__(self, texts, length):
        Letters.calls += 1
        tokens, mask = self.tokenize(texts, length)
        text_emb = np.stack([tokens, np.broadcast_to(np.arange(length), tokens.shape)], -1).astype(np.float32)
        return text_emb * mask[..., None], mask


def test_captions_are_encoded_once_in_parts_and_for_one_encoder_only(monkeypatch):
    monkeypatch.setattr(dataloader, "PART", 16)
    texts = ["", *(f"caption{i}" for i in range(50))]
    first = dataloader.encode(Letters(), texts, 60)
    for found, expected in zip(first, Letters()(texts, 16), strict=True):  # a multiple of 8 that holds the longest
        np.testing.assert_array_equal(found, expected)
    before = Letters.calls
    again = dataloader.encode(Letters(), texts, 60)
    np.testing.assert_array_equal(first[0], again[0])
    assert Letters.calls == before
    assert isinstance(again[0].base, np.memmap)
    for other in ((Letters(), ["x"], 60), (Letters(), texts, 59), (Letters("other"), texts, 60)):
        before = Letters.calls
        dataloader.encode(*other)
        assert Letters.calls > before


@pytest.mark.parametrize(("letters", "length"), [(1, 8), (7, 8), (8, 16), (16, 20), (40, 20)])
def test_captions_are_cut_to_the_tokens_that_the_longest_has(letters, length):
    text_emb, text_mask = dataloader.encode(Letters(), ["", "x" * letters], 20)
    assert text_emb.shape == (2, length, 2)
    assert text_mask.sum(axis=1).tolist() == [1, min(1 + letters, 20)]


def test_a_file_of_captions_that_was_cut_short_is_made_again():
    texts = ["", "one", "two"]
    dataloader.encode(Letters(), texts, 60)
    (file,) = (files.CACHE / "captions").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(dataloader.encode(Letters(), texts, 60)[0], Letters()(texts, 8)[0])


def test_captions_stay_in_memory_where_no_file_can_hold_them(tmp_path, monkeypatch, capsys):
    texts = ["", "one", "two"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        found = dataloader.encode(Letters(), texts, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(found[0], Letters()(texts, 8)[0])
    assert "captions cannot hold the encoded captions (File too large): they stay in memory" in capsys.readouterr().out
    assert not [path for path in files.CACHE.rglob("*") if path.is_file()]


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_words_are_named_also_of_captions_that_are_on_the_disk(config, stream):
    for _ in range(2):
        Letters.asked = None
        source(dataclasses.replace(config, caption_variants=0.5), stream=stream).close()
        assert {"", "thing0, One style", "sea, Two style"} <= set(Letters.asked)


def test_emoji_are_kept_under_the_words_that_they_are_read_as(monkeypatch):
    monkeypatch.setattr(Letters, "spelled", lambda self, texts: [text.replace("🐶", "dog") for text in texts])
    first = dataloader.encode(Letters(), ["", "🐶"], 60)
    np.testing.assert_array_equal(first[0], Letters()(["", "dog"], 8)[0])
    before = Letters.calls
    dataloader.encode(Letters(), ["", "dog"], 60)
    assert Letters.calls == before


def test_the_empty_caption_is_visible():
    """A mask without any visible token would make attention average over all of them."""
    encoder = TextEncoder("sentence-transformers/all-MiniLM-L6-v2")
    text_emb, text_mask = dataloader.encode(encoder, ["", "red heart"], 6)
    assert text_mask[0].tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(text_emb[1], encoder(["red heart"], 6)[0][0], atol=1e-5)


# Batches from memory and from the disk.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    random = np.random.default_rng(0)
    for i, vendors in enumerate(SOME):
        for vendor in vendors:
            (root / "image" / VENDORS[vendor]).mkdir(parents=True, exist_ok=True)
            rgba = random.integers(0, 256, (9, 11, 4)).astype(np.uint8)
            Image.fromarray(rgba).save(root / "image" / VENDORS[vendor] / f"{i}.png")
    rows = [f'{i},thing{i},"sun, sea, air"' for i in range(len(SOME))]
    (root / "full_emoji.csv").write_text("\n".join(["#,name,keywords", *rows]) + "\n")
    return root


@pytest.fixture
def config(tiny, root):
    return dataclasses.replace(tiny, data=str(root), vendor="One+Two+Three", TEXT_LEN=60, H=8, W=12)


def source(config, *, stream=False):
    some = dataset.from_config(config, decode=not stream)
    return dataloader.load(some, Letters(), dataclasses.replace(config, stream=stream))


def streamed(config, steps):
    reading = source(config, stream=True)
    try:
        return [jax.device_get(reading.at(step, 1)[0]) for step in steps]
    finally:
        reading.close()


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
    config, seen = dataclasses.replace(config, **change), []
    data, rows = map(jax.device_get, source(config).at(step, 8))
    for i, read in enumerate(streamed(config, range(step, step + 8))):
        images, captions = rows.images[i], rows.captions[i]
        chosen = dataloader.Data(data.images[images], data.text_emb[captions], data.text_mask[captions])
        jax.tree.map(np.testing.assert_array_equal, chosen, read)
        seen.append(read.images)
    assert any((a != b).any() for a, b in itertools.pairwise(seen))


def test_streaming_from_the_middle_is_as_if_never_stopped(config):
    for a, b in zip(streamed(config, range(9))[5:], streamed(config, range(5, 9)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_two_processes_stream_the_whole_batch_between_them(config, monkeypatch):
    config = dataclasses.replace(config, B=5, caption_variants=0.3)
    monkeypatch.setattr(parallel, "global_batch", lambda tree: tree)
    read = []
    for share in (slice(0, 5), slice(0, 2), slice(2, 5)):
        monkeypatch.setattr(parallel, "local_rows", lambda B, share=share: share)
        read.append(streamed(config, range(6)))
    for whole, left, right in zip(*read, strict=True):
        assert [len(half.images) for half in (left, right)] == [2, 3]
        jax.tree.map(lambda a, b, c: np.testing.assert_array_equal(a, np.concatenate([b, c])), whole, left, right)


def test_a_batch_has_pictures_in_floats_and_their_captions(config):
    memory = source(config)
    data, rows = memory.at(3, 1)
    batch = dataloader.batch(data, jax.tree.map(lambda part: part[0], rows))
    np.testing.assert_allclose(batch.image, np.asarray(data.images)[rows.images[0]] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(batch.text_emb, np.asarray(data.text_emb)[rows.captions[0]])
    np.testing.assert_array_equal(batch.text_mask, np.asarray(data.text_mask)[rows.captions[0]])


def test_a_cpu_trains_on_the_pictures_where_they_lie(tiny):
    pictures = dataset.from_config(tiny)
    data, _ = dataloader.load(dataset.side(pictures, heldout=False), Letters(), tiny).at(0, 1)
    np.testing.assert_array_equal(data.images, pictures.images)
    if len(jax.devices()) == 1:
        assert np.shares_memory(data.images, pictures.images)


def test_a_picture_that_breaks_on_the_way_is_named(config, root):
    reading = source(dataclasses.replace(config, vendor="Three", B=1), stream=True)
    reading.at(0, 1)
    file = root / "image" / "Three" / "3.png"
    whole = file.read_bytes()
    with files.replacing(file) as beside:  # at once, as it is being read
        beside.write_bytes(whole[:60])
    try:
        with pytest.raises(DatasetError, match=r"Three/3\.png: a damaged picture.* in its place"):
            [reading.at(step, 1) for step in range(1, 100)]
    finally:
        file.write_bytes(whole)


def test_without_grain_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(DatasetError, match="needs the package grain: pip install grain"):
        source(config, stream=True).at(0, 1)
