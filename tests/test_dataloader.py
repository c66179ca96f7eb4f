import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dataloader
import dataset
import files
import parallel
from dataset import DatasetError, Pictures, variants
from params import Params
from text_encoder import TextEncoder

KEY = jax.random.key
VENDORS = ("One", "Two", "Three")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)


# Which pictures and captions.


def test_the_order_of_a_seed_stays_what_it_is():
    """Golden: printed once. Where it changes, a run that is resumed shows some pictures twice and others not at all."""
    expected = {
        (7, 3): [[5, 1, 6], [2, 0, 4], [3, 2, 5], [6, 4, 5], [6, 3, 5]],
        (11, 4): [[1, 5, 3, 4], [10, 8, 6, 9], [0, 7, 2, 7], [8, 5, 3, 2], [4, 1, 7, 2]],
        (5, 13): [[4, 2, 1, 0, 3, 4, 1, 3, 2, 0, 0, 3, 2], [4, 1, 3, 4, 0, 2, 1, 1, 0, 4, 3, 2, 1]],
    }
    for (n, B), batches in expected.items():
        numbered = data(n)._replace(images=jnp.arange(n, dtype=jnp.uint8)[:, None, None, None])
        batch_at = steps_of(numbered, B=B, embedding_dropout=0.0)
        for step, rows in zip((0, 1, 2, 9, 1000), batches, strict=False):
            batch = batch_at(step)
            assert dataloader.to_bytes(batch.image).ravel().tolist() == rows
            np.testing.assert_array_equal(batch.text_emb, numbered.text_emb[jnp.array(rows)])
    dropped = {0: [5, 6, 8], 1: [4, 6, 7, 8], 2: [1], 9: [3, 6]}
    batch_at, null_emb = steps_of(data(), B=9, embedding_dropout=0.4), np.asarray(data().null_emb)
    for step, places in dropped.items():
        is_null = (np.asarray(batch_at(step).text_emb) == null_emb[None]).all(axis=(1, 2))
        assert np.flatnonzero(is_null).tolist() == places


def steps_of(source, **options):
    """step -> its batch, compiled once."""
    return jax.jit(lambda step: dataloader.sample_batch(source, KEY(3), KEY(4), step, **options))


@pytest.mark.parametrize(("n", "B"), [(7, 3), (7, 7), (5, 13), (1, 4), (64, 8)])
def test_each_pass_shows_every_picture_once_in_a_new_order(n, B):
    order = jax.jit(lambda step: dataloader.order(KEY(0), step, n=n, B=B))
    seen = np.concatenate([order(step) for step in range(3 * n)])[: 3 * n]
    passes = seen.reshape(3, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    if n > 4:
        assert not (passes[0] == passes[1]).all()


def test_all_orders_of_few_are_equally_likely():
    """Pearson's statistic of 24,000 passes over four concepts: 23 degrees of freedom, below 52 in 99.95 %."""
    one_pass = jax.vmap(lambda e, place: dataloader.shuffled(jax.random.fold_in(KEY(1), e), place, 4), (None, 0))
    orders = np.asarray(jax.jit(jax.vmap(one_pass, (0, None)))(jnp.arange(24_000), jnp.arange(4)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.shape == (24,)
    assert ((counts - 1000) ** 2 / 1000).sum() < 52


def test_the_order_of_a_large_set_is_never_laid_out():
    jaxpr = jax.make_jaxpr(lambda step: dataloader.order(KEY(0), step, n=100_000, B=8))(jnp.int32(0))
    shapes = re.findall(r"[a-z]\d+\[([\d,]+)\]", str(jaxpr))
    assert 100 < max(math.prod(map(int, shape.split(","))) for shape in shapes) < 1000


def data(n=11, length=4):
    keys = jax.random.split(KEY(1), 3)
    return dataloader.Data(
        images=jax.random.randint(keys[0], (n, 2, 3, 1), 0, 256).astype(jnp.uint8),
        text_emb=jax.random.normal(keys[1], (n, length, 5)),
        text_mask=jnp.arange(length)[None, :] <= jnp.arange(n)[:, None] % length,
        null_emb=jax.random.normal(keys[2], (length, 5)),
        null_mask=jnp.array([True, True, False, False]),
        index=dataloader.one_each(n),
    )


def pictures(drawn_by, keywords="") -> Pictures:
    """Row number i of the CSV, "thing i", drawn by VENDORS[v] for each v of drawn_by[i]; its number is its grey."""
    rows = [(i, VENDORS[v]) for i, vendors in enumerate(drawn_by) for v in vendors]
    names = [f"thing {i}, {vendor} style" for i, vendor in rows]
    images = np.arange(len(rows), dtype=np.uint8).reshape(-1, 1, 1, 1)
    folders = [Path("image", vendor) for _, vendor in rows]
    heldout = np.zeros(len(rows), bool)
    return Pictures(images, names, [str(i) for i, _ in rows], folders, [keywords] * len(rows), heldout, [], "")


class Numbers(TextEncoder):
    """Stands for a text encoder: a caption's embedding is its place among all captions; it has as many tokens as words.

    The empty caption has the place 0.
    """

    identity = {"name": "numbers", "sha256": "0"}  # noqa: RUF012

    def __init__(self):
        pass

    def __call__(self, texts, length):
        text_mask = np.array([[i < max(1, len(text.split())) for i in range(length)] for text in texts])
        return np.arange(len(texts), dtype=np.float32)[:, None, None] * text_mask[..., None], text_mask


def shown(set_of_pictures, steps, B, variants=0.0):
    """The rows of the pictures and of the captions that each step shows, as the arrays of a batch have them."""
    loaded = dataloader.load(set_of_pictures, Numbers(), Params(caption_variants=variants))
    batch_at = steps_of(loaded, B=B, embedding_dropout=0.0, caption_variants=variants)
    batches = [jax.device_get(batch_at(step)) for step in range(steps)]
    rows = np.concatenate([np.rint((batch.image.ravel() + 1) * 127.5) for batch in batches]).astype(int)
    return rows, np.concatenate([batch.text_emb[:, 0, 0] for batch in batches]).astype(int) - 1


SOME = [(0,), (0, 1, 2), (1, 2), (2,), (0, 2), (0, 1, 2), (1,)]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("B", [3, 7, 20])
def test_vendors_take_turns_and_each_concept_is_shown_once_per_pass(B):
    mixed, passes = pictures(SOME), 12
    rows, texts = shown(mixed, -(-passes * len(SOME) // B), B)
    rows, texts = rows[: passes * len(SOME)], texts[: passes * len(SOME)]
    np.testing.assert_array_equal(rows, texts)  # each picture has its own caption, vendor included
    concept = np.array([int(index) for index in mixed.indexes])
    by_pass = concept[rows].reshape(passes, -1)
    assert (np.sort(by_pass, axis=1) == np.arange(len(SOME))).all()
    assert not (by_pass[0] == by_pass[1]).all()
    count = np.bincount(rows, minlength=len(concept))
    assert [count[row] for row in range(len(concept))] == [passes // len(SOME[index]) for index in concept]


def test_what_one_vendor_alone_draws_is_in_the_same_order_beside_others():
    key = KEY(3)
    alone, several = dataloader.one_each(7), dataloader.Index(jnp.arange(14).reshape(7, 2), jnp.arange(14)[:, None])
    one, _ = dataloader.choices(alone, key, jnp.int32(5), B=4, caption_variants=0.0)
    two, _ = dataloader.choices(several, key, jnp.int32(5), B=4, caption_variants=0.0)
    np.testing.assert_array_equal(one, dataloader.order(key, jnp.int32(5), n=7, B=4))
    np.testing.assert_array_equal(one, two // 2)


# Variants of captions.


def test_variants_are_few_different_and_say_something_new():
    cat = pictures([(0,)])._replace(names=["grinning cat"])
    expected = {
        "": None,
        "Cat, grin": None,  # nothing that the name does not say
        "face": ["grinning cat, face"],
        "face, Face ,joy": ["grinning cat, Face", "joy"],
        "one, two, 3, 4, 5, 6, 7, 8": ["grinning cat, one", "3", "grinning cat, 5", "7"],
    }
    message = r"no picture .* keyword .*--caption_variants needs some.* `keywords`"
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


@pytest.mark.usefixtures("own_cache")
def test_variants_are_shown_at_their_rate_and_belong_to_their_picture():
    words = pictures([(0, 1)] * 20, "cat, dog, sun, sea")
    words.keywords[0] = ""
    texts, index = dataloader.captions(words, 0.3)
    assert (len(texts), index.captions.shape, index.captions[0].tolist()) == (40 + 39 * 4, (40, 5), [0, -1, -1, -1, -1])
    rows, chosen = shown(words, 40, 100, variants=0.3)
    assert all(text in index.captions[row] for row, text in zip(rows, chosen, strict=True))
    may = rows != 0
    assert (chosen[~may] == 0).all()
    share, n = (chosen[may] >= 40).mean(), may.sum()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    kinds = np.bincount((chosen[may & (chosen >= 40)] - 40) % 4)
    assert abs(kinds / kinds.sum() - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / kinds.sum())
    assert (chosen[(rows == 1)] != chosen[rows == 1][0]).any()


@pytest.mark.usefixtures("own_cache")
def test_variants_leave_the_order_of_the_pictures_alone():
    words = pictures([(0, 1)] * 5, "cat")
    rows, own = shown(words, 9, 4)
    np.testing.assert_array_equal(rows, own)
    np.testing.assert_array_equal(rows, shown(words, 9, 4, variants=1.0)[0])
    assert (shown(words, 9, 4, variants=1.0)[1] >= 10).all()


# The batch.


def draw(step, dropout, seed=0, B=4):
    return dataloader.sample_batch(data(), KEY(seed), KEY(seed + 99), jnp.int32(step), B=B, embedding_dropout=dropout)


def test_a_batch_is_a_function_of_seed_and_step():
    for a, b in zip(draw(5, 0.5), draw(5, 0.5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (draw(5, 0.5).image != draw(6, 0.5).image).any()
    assert (draw(5, 0.5).image != draw(5, 0.5, seed=1).image).any()


def test_pictures_and_captions_stay_together():
    everything, batch = data(), draw(3, 0.0)
    floats = dataloader.to_float(everything.images)
    for image, text_emb, text_mask in zip(*batch, strict=True):
        (row,) = np.flatnonzero((floats == image[None]).all(axis=(1, 2, 3)))
        np.testing.assert_array_equal(text_emb, everything.text_emb[row])
        np.testing.assert_array_equal(text_mask, everything.text_mask[row])


def test_dropout_replaces_captions_by_the_empty_one_at_its_rate():
    assert all((text == data().null_emb).all() for text in draw(0, 1.0).text_emb)
    assert (draw(0, 1.0).text_mask == data().null_mask[None]).all()
    assert not any((text == data().null_emb).all() for text in draw(0, 0.0).text_emb)
    dropped = (draw(0, 0.3, B=4000).text_emb == data().null_emb[None]).all(axis=(1, 2))
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)


def test_bytes_survive_the_way_to_floats_and_back():
    every_byte = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    floats = dataloader.to_float(every_byte)
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_array_equal(dataloader.to_bytes(floats), every_byte)
    np.testing.assert_array_equal(dataloader.to_bytes(jnp.array([[[[-3.0], [3.0]]]])).ravel(), [0, 255])


def test_transparent_bytes_survive_the_way_to_floats_and_back():
    colour, alpha = jnp.meshgrid(jnp.arange(256), jnp.arange(256))
    rgba = jnp.stack([colour, 255 - colour, colour // 2, alpha], axis=-1).astype(jnp.uint8)
    floats = dataloader.to_float(rgba)
    assert (floats[0] == -1).all()  # what is transparent has no colour
    assert (floats[..., :3] <= floats[..., 3:] + 1e-6).all()
    back = dataloader.to_bytes(floats)
    np.testing.assert_array_equal(back[1:], rgba[1:])
    assert (back[0] == jnp.array([[255, 255, 255, 0]])).all()


def test_transparent_pictures_are_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    np.testing.assert_array_equal(dataloader.on_white(rgba), [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]])


def test_captions_are_encoded_once_and_for_one_encoder_only(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)

    class Counting(TextEncoder):
        calls = 0

        def __init__(self, identity):
            self.identity = identity

        def __call__(self, texts, length):
            Counting.calls += 1
            return np.full((len(texts), length, 2), Counting.calls, np.float32), np.ones((len(texts), length), bool)

    one = Counting({"sha256": "a"})
    first = dataloader.encode(one, ["x", "y"], 3)
    again = dataloader.encode(one, ["x", "y"], 3)
    np.testing.assert_array_equal(first[0], again[0])
    assert Counting.calls == 1
    for other in ((one, ["x", "z"], 3), (one, ["x", "y"], 4), (Counting({"sha256": "b"}), ["x", "y"], 3)):
        before = Counting.calls
        dataloader.encode(*other)
        assert Counting.calls == before + 1


def test_the_empty_caption_is_visible():
    """A mask without any visible token would make attention average over all of them."""
    encoder = TextEncoder("sentence-transformers/all-MiniLM-L6-v2")
    red = pictures([(0,)])._replace(names=["red heart"])
    loaded = dataloader.load(red, encoder, Params(TEXT_LEN=6))
    assert loaded.null_mask.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(loaded.text_emb[0], encoder(["red heart"], 6)[0][0], atol=1e-5)


@pytest.mark.parametrize(("words", "length"), [(1, 8), (8, 8), (9, 16), (17, 20), (40, 20)])
@pytest.mark.usefixtures("own_cache")
def test_captions_are_kept_to_the_tokens_that_the_longest_has(words, length):
    longest = pictures([(0,), (0,)])._replace(names=["one", "x " * words])
    loaded = dataloader.load(longest, Numbers(), Params(TEXT_LEN=20))
    assert loaded.text_emb.shape == (2, length, 1)
    assert loaded.text_mask.shape == (2, length)
    assert loaded.null_emb.shape == (length, 1)
    assert loaded.text_mask.sum(axis=1).tolist() == [1, min(words, 20)]


@pytest.mark.usefixtures("own_cache")
def test_a_cpu_trains_on_the_pictures_where_they_lie(tiny):
    pictures = dataset.from_config(tiny)
    loaded = parallel.replicate(dataloader.load(dataset.side(pictures, heldout=False), Numbers(), tiny))
    np.testing.assert_array_equal(loaded.images, pictures.images)
    if len(jax.devices()) == 1:
        assert np.shares_memory(loaded.images, pictures.images)
