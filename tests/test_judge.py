import dataclasses

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

import files
from evaluation import judge, metrics
from evaluation.features import Extractor
from text_encoder import TextEncoder

RANDOM = np.random.default_rng(0)
TURN = RANDOM.normal(size=(12, 7))


def pairs(n, noise=0.1):
    """Features whose captions follow from their direction, but for noise."""
    features = np.abs(RANDOM.normal(size=(n, 12))).astype(np.float32)
    text_emb = np.tanh(features @ TURN / np.linalg.norm(features, axis=1, keepdims=True))
    return features, text_emb + noise * RANDOM.normal(size=text_emb.shape)


def test_the_judge_is_scikit_learns_kernel_ridge():
    features, text_emb = pairs(50)
    fresh, _ = pairs(9)
    unit, fresh_unit = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features.astype(float), fresh.astype(float))
    )
    gamma = 1 / unit.var(0).sum()
    oracle = KernelRidge(kernel="rbf", alpha=judge.RIDGE, gamma=gamma).fit(unit, text_emb - text_emb.mean(0))
    expected = oracle.predict(fresh_unit) + text_emb.mean(0)
    np.testing.assert_allclose(judge.train(features, text_emb)(fresh), expected, rtol=1e-6, atol=1e-8)


def test_a_judge_trained_twice_is_the_same_and_brightness_does_not_sway_it():
    features, text_emb = pairs(40)
    one, two = judge.train(features, text_emb), judge.train(features, text_emb)
    np.testing.assert_array_equal(one(features), two(features))
    np.testing.assert_allclose(one(3 * features), one(features), rtol=1e-5, atol=1e-6)


def test_held_out_pictures_find_their_captions_and_shuffled_ones_do_not():
    one = judge.train(*pairs(400))
    features, text_emb = pairs(100, noise=0.02)
    seen, words, own = one(features) - one.mean, text_emb - one.mean, np.arange(100)
    ceiling = metrics.share(metrics.r_precision(seen, words, own))
    floor = metrics.share(metrics.r_precision(seen, words, RANDOM.permutation(100)))
    assert ceiling.low > 0.5
    assert floor.low <= 0.01 <= floor.high


def test_a_picture_unlike_all_others_is_put_at_the_mean():
    features, text_emb = pairs(40)
    features[:, 6:] = 0
    unlike = np.zeros((1, 12), np.float32)
    unlike[0, 6:] = 1
    one = judge.train(features, text_emb)
    near, far = (np.linalg.norm(one(x) - one.mean, axis=1).mean() for x in (features, unlike))
    assert far < near / 3


def test_of_too_many_pictures_an_even_share_is_used(monkeypatch):
    monkeypatch.setattr(judge, "MOST", 30)
    features, text_emb = pairs(100)
    one = judge.train(features, text_emb)
    assert len(one.support) == 30
    rows = np.linspace(0, 99, 30).astype(int)
    np.testing.assert_array_equal(one(features), judge.train(features[rows], text_emb[rows])(features))


def test_one_picture_is_too_few_and_equal_ones_are_no_division_by_zero():
    with pytest.raises(ValueError, match="a judge needs at least 2 pictures, got 1"):
        judge.train(*pairs(1))
    features, text_emb = pairs(5)
    assert np.isfinite(judge.train(np.repeat(features[:1], 5, 0), text_emb)(features)).all()


class Letters(TextEncoder):
    """Stands for a text encoder: every letter is a token."""

    identity = {"name": "letters", "sha256": "0"}  # noqa: RUF012

    def __init__(self):
        self.calls = 0

    def __call__(self, texts, length):
        self.calls += 1
        text_mask = np.array([[i < len(text) for i in range(length)] for text in texts])
        letters = np.array([[ord(letter) for letter in text.ljust(length)] for text in texts], np.float32)
        return np.stack([letters, letters**2 / 100], -1) * text_mask[..., None], text_mask


class Colour(Extractor):
    """Stands for a feature extractor: the mean colour."""

    identity = "mean colour"

    def __init__(self):
        pass

    def __call__(self, images):
        return images.mean((1, 2), dtype=np.float32)


def test_a_captions_embedding_is_the_mean_of_its_own_tokens_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path)
    encoder = Letters()
    expected = [[(97 + 98) / 2, (97**2 + 98**2) / 200], [99, 99**2 / 100]]
    for _ in range(2):
        np.testing.assert_allclose(judge.embed(encoder, ["ab", "c"], 5), expected, rtol=1e-6)
    assert encoder.calls == 1


def test_the_judge_of_a_dataset_saw_every_vendors_training_pictures_and_no_others(tiny, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    rows = ["#,name,split"] + [f"{i},thing {i},{'heldout' if i == 2 else 'train'}" for i in range(5)]
    for vendor, colour in (("One", 0), ("Two", 90)):
        (tmp_path / "image" / vendor).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (6, 6), (colour, 40 * i, 9)).save(tmp_path / "image" / vendor / f"{i}.png")
    (tmp_path / "full_emoji.csv").write_text("\n".join(rows) + "\n")
    config = dataclasses.replace(tiny, data=str(tmp_path), vendor="One", H=6, W=6, TEXT_LEN=9, MAX_INDEX=1)
    one = judge.from_config(config, Colour(), Letters())
    assert len(one.support) == 8
    np.testing.assert_allclose(
        one.mean, judge.embed(Letters(), [f"thing {i}" for i in (0, 1, 3, 4)], 9).mean(0), rtol=1e-6
    )
    config = dataclasses.replace(config, vendor="One+Two", TEXT_LEN=30)
    names = [f"thing {i}, {vendor} style" for vendor in ("One", "Two") for i in (0, 1, 3, 4)]
    several = judge.from_config(config, Colour(), Letters())
    np.testing.assert_allclose(several.mean, judge.embed(Letters(), names, 30).mean(0), rtol=1e-6)
