import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dataloader
import packages
from text_encoder import TextEncoder

KEY = jax.random.key


@pytest.mark.parametrize(("n", "B"), [(7, 3), (7, 7), (5, 13), (1, 4), (64, 8)])
def test_each_pass_shows_every_picture_once_in_a_new_order(n, B):
    order = jax.jit(lambda step: dataloader.order(KEY(0), step, n=n, B=B))
    seen = np.concatenate([order(step) for step in range(3 * n)])[: 3 * n]
    passes = seen.reshape(3, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    if n > 4:
        assert not (passes[0] == passes[1]).all()


def data(n=11, length=4):
    keys = jax.random.split(KEY(1), 3)
    return dataloader.Data(
        images=jax.random.randint(keys[0], (n, 2, 3, 1), 0, 256).astype(jnp.uint8),
        text_emb=jax.random.normal(keys[1], (n, length, 5)),
        text_mask=jnp.arange(length)[None, :] <= jnp.arange(n)[:, None] % length,
        null_emb=jax.random.normal(keys[2], (length, 5)),
        null_mask=jnp.array([True, True, False, False]),
    )


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
    monkeypatch.setattr(packages, "CACHE", tmp_path)

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
    loaded = dataloader.load(np.zeros((1, 2, 2, 3), np.uint8), ["red heart"], encoder, 6)
    assert loaded.null_mask.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(loaded.text_emb[0], encoder(["red heart"], 6)[0][0], atol=1e-5)
