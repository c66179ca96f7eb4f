"""The self-test passes where text steers the picture, and says so where it does not."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import dataset
import training
from evaluation import selftest
from evaluation.selftest import Losses, Verdict, judge, pick, self_test
from text_encoder import TextEncoder

BEFORE, KNOWN = Losses(1.0, 1.0), Losses(0.02, 20.0)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Half as many pictures as usual; and what belongs to one configuration is compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "PICTURES", 4)
        patch.setattr(selftest, "EVERY", 50)
        patch.setattr(training, "build_train_step", functools.cache(training.build_train_step))
        yield


@pytest.fixture(scope="module")
def config(tiny):
    return dataclasses.replace(tiny, PATCH=4, BASE_DIM=16, prediction="v")


@pytest.fixture(scope="module")
def pictures(config):
    return dataset.from_config(config)


@pytest.fixture(scope="module")
def encoder(config):
    return TextEncoder(config.encoder)


class SameForAll(TextEncoder):
    """A text encoder that says nothing."""

    identity = {"name": "nothing", "sha256": "0"}  # noqa: RUF012

    def __call__(self, texts, length):
        emb, mask = super().__call__(texts, length)
        return np.zeros_like(emb), np.ones_like(mask)


def test_a_network_that_learns_passes(config, pictures, encoder):
    verdict = self_test(config, pictures, encoder, seconds=600)
    assert verdict.outcome == "PASS", verdict
    assert (verdict.pictures, verdict.steps % selftest.EVERY) == (4, 0)
    assert verdict.own > 2 >= verdict.other
    assert verdict.after.ratio > selftest.STEERED
    assert f"{verdict.own} nearest to their own picture" in str(verdict)
    assert "PASS: the code learns, and text steers the picture" in str(verdict)


@pytest.mark.slow
def test_captions_that_say_nothing_fail(config, pictures, monkeypatch):
    monkeypatch.setattr(selftest, "ENOUGH", 100)
    monkeypatch.setattr(selftest, "MOST", 100)
    verdict = self_test(config, pictures, SameForAll(config.encoder), seconds=600)
    assert verdict.outcome == "FAIL", verdict
    assert "captions do not matter; the encoder" in verdict.why
    assert verdict.own <= 1  # all samples are the same
    assert verdict.after.ratio == pytest.approx(1)


def test_a_network_that_stands_still_fails_early(config, pictures, encoder, monkeypatch):
    monkeypatch.setattr(
        training, "build_train_step", lambda *_: lambda state, *_: (state._replace(step=state.step + 1), jnp.zeros(()))
    )
    verdict = self_test(config, pictures, encoder, seconds=600)
    assert (verdict.outcome, verdict.own, verdict.steps) == ("FAIL", 0, selftest.ENOUGH)
    assert "the loss did not fall" in verdict.why
    assert f"--learning_rate = {config.learning_rate:g} " in verdict.why


def test_no_time_is_no_verdict(config, pictures, encoder):
    verdict = self_test(config, pictures, encoder, seconds=0)
    assert (verdict.outcome, verdict.pictures, verdict.steps) == ("UNDECIDED", 4, 0)
    assert "only 0 steps fit" in verdict.why
    assert "quick --self_test" in verdict.why


def test_pictures_that_cannot_be_told_apart_are_refused(config, pictures, encoder):
    same = pictures._replace(images=np.repeat(pictures.images[:1], 8, axis=0))
    with pytest.raises(ValueError, match="needs 2 pictures that differ, with captions that differ"):
        self_test(config, same, encoder)
    with pytest.raises(ValueError, match="prepare_dataset"):
        self_test(config, pictures._replace(names=["one"] * 8), encoder)


@pytest.mark.parametrize(
    ("after", "nearest", "steps", "skipped", "outcome", "why"),
    [
        (KNOWN, (8, 0), 40, 0, "PASS", "8 of 8, shuffled 0 of 8; loss 1.00 → 0.02"),
        (KNOWN, (1, 1), 400, 0, "FAIL", "Training is right, sampling is not"),
        (KNOWN, (4, 0), 40, 0, "FAIL", "Training is right, sampling is not"),
        (Losses(0.3, 3.0), (3, 1), 400, 0, "UNDECIDED", "captions begin to matter"),
        (Losses(0.3, 1.0), (2, 1), 400, 0, "UNDECIDED", "captions begin to matter"),
        (Losses(0.1, 1.02), (2, 1), 400, 0, "UNDECIDED", "that predicts eps needs several times"),
        (Losses(0.3, 3.0), (3, 1), 299, 0, "UNDECIDED", "only 299 steps fit"),
        (Losses(0.3, 1.0), (1, 1), 400, 0, "FAIL", "captions do not matter; look at --encoder"),
        (BEFORE, (0, 0), 400, 0, "FAIL", "the loss did not fall"),
        (BEFORE, (0, 0), 300, 200, "FAIL", "200 of 300 steps were not finite"),
        (Losses(np.nan, np.nan), (0, 0), 400, 0, "FAIL", "the loss did not fall"),
    ],
)
def test_verdicts(tiny, after, nearest, steps, skipped, outcome, why):
    verdict = judge(tiny, Verdict(8, steps, skipped, 60.0, BEFORE, after, *nearest))
    assert verdict.outcome == outcome
    assert why in verdict.why


def test_pictures_are_picked_far_apart_and_no_caption_twice():
    grey = np.array([0, 1, 2, 250, 128, 64, 129])
    images = np.broadcast_to(grey.astype(np.uint8)[:, None, None, None], (7, 4, 4, 3))
    captions = ["a", "b", "c", "d", "e", "f", "g"]
    assert pick(images, captions, 3) == [0, 3, 4]
    assert pick(images, captions, 4) == [0, 3, 4, 5]
    assert pick(images, ["a", "b", "c", "A", "e", "f", "g"], 3) == [0, 5, 6]
    assert len(pick(images, captions, 8)) == 5  # 0 and 1, 128 and 129 look the same


def test_captions_that_training_never_sees_are_named(tiny):
    config = dataclasses.replace(tiny, embedding_dropout=1.0)
    verdict = judge(config, Verdict(8, 400, 0, 60.0, BEFORE, Losses(0.3, 1.0), 1, 1))
    assert verdict.outcome == "FAIL"
    assert "captions do not matter; --embedding_dropout = 1 hides them" in verdict.why
