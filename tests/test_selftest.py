"""The self-test passes where text steers the picture, and says so where it does not."""

import dataclasses

import numpy as np
import pytest

import dataset
from evaluation import selftest
from evaluation.selftest import Drawings, Evidence, Measured, judged, pick, self_test
from text_encoder import TextEncoder

BEFORE, KNOWN = Measured(1.0, 1.0, 1.0), Measured(0.02, 0.01, 0.2)


@pytest.fixture(scope="module")
def pictures(tiny):
    return dataset.from_config(tiny)


@pytest.fixture(scope="module")
def encoder(tiny):
    return TextEncoder(tiny.encoder)


class SameForAll(TextEncoder):
    """A text encoder that says nothing."""

    identity = {"name": "nothing", "sha256": "0"}  # noqa: RUF012

    def __call__(self, texts, length):
        emb, mask = super().__call__(texts, length)
        return np.zeros_like(emb), np.ones_like(mask)


def test_a_network_that_learns_passes(tiny, pictures, encoder):
    config = dataclasses.replace(tiny, prediction="v")
    verdict = self_test(config, pictures, encoder, seconds=600)
    assert verdict.outcome == "PASS", verdict
    found = verdict.evidence
    assert (found.pictures, found.steps % selftest.EVERY) == (8, 0)
    assert found.drawings.own > 4 >= found.drawings.exchanged
    assert found.after.ratio > selftest.STEERED
    assert f"{found.drawings.own} of 8 nearest to their own picture" in str(verdict)
    assert "PASS: the code learns, and text steers the picture" in str(verdict)


def test_captions_that_say_nothing_fail(tiny, pictures, monkeypatch):
    monkeypatch.setattr(selftest, "MOST", selftest.ENOUGH)
    verdict = self_test(tiny, pictures, SameForAll(tiny.encoder), seconds=600)
    assert verdict.outcome == "FAIL", verdict
    assert "captions do not matter; the encoder" in verdict.why
    assert verdict.evidence.drawings.own <= 1  # all drawings are the same
    assert verdict.evidence.after.ratio == pytest.approx(1)


def test_a_network_that_stands_still_fails_early(tiny, pictures, encoder):
    config = dataclasses.replace(tiny, learning_rate=0.0)
    verdict = self_test(config, pictures, encoder, seconds=600)
    assert (verdict.outcome, verdict.evidence.drawings, verdict.evidence.steps) == ("FAIL", None, selftest.ENOUGH)
    assert "the loss did not fall" in verdict.why
    assert "--learning_rate = 0 " in verdict.why


def test_no_time_is_no_verdict(tiny, pictures, encoder):
    verdict = self_test(tiny, dataset.select(pictures, [0, 1]), encoder, seconds=0)
    assert (verdict.outcome, verdict.evidence.pictures, verdict.evidence.steps) == ("UNDECIDED", 2, 0)
    assert "only 0 steps fit" in verdict.why
    assert "quick --self_test" in verdict.why


def test_pictures_that_cannot_be_told_apart_are_refused(tiny, pictures, encoder):
    same = pictures._replace(images=np.repeat(pictures.images[:1], 8, axis=0))
    with pytest.raises(ValueError, match="needs 2 pictures that differ, with captions that differ"):
        self_test(tiny, same, encoder)
    with pytest.raises(ValueError, match="prepare_dataset"):
        self_test(tiny, pictures._replace(names=["one"] * 8), encoder)


@pytest.mark.parametrize(
    ("after", "drawings", "steps", "skipped", "outcome", "why"),
    [
        (KNOWN, Drawings(8, 0), 40, 0, "PASS", "8 of 8, shuffled 0 of 8; loss 1.00 → 0.02"),
        (KNOWN, Drawings(1, 1), 400, 0, "FAIL", "Training is right, drawing is not"),
        (KNOWN, Drawings(4, 0), 40, 0, "FAIL", "Training is right, drawing is not"),
        (Measured(0.3, 0.1, 0.3), Drawings(3, 1), 400, 0, "UNDECIDED", "captions begin to matter"),
        (Measured(0.3, 0.1, 0.1), Drawings(2, 1), 400, 0, "UNDECIDED", "captions begin to matter"),
        (Measured(0.1, 0.1, 0.102), Drawings(2, 1), 400, 0, "UNDECIDED", "that predicts eps needs several times"),
        (Measured(0.3, 0.1, 0.3), Drawings(3, 1), 299, 0, "UNDECIDED", "only 299 steps fit"),
        (Measured(0.3, 0.1, 0.1), Drawings(1, 1), 400, 0, "FAIL", "captions do not matter; look at --encoder"),
        (BEFORE, None, 400, 0, "FAIL", "the loss did not fall"),
        (BEFORE, None, 300, 200, "FAIL", "200 of 300 steps were not finite"),
        (Measured(np.nan, np.nan, np.nan), None, 400, 0, "FAIL", "the loss did not fall"),
    ],
)
def test_verdicts(tiny, after, drawings, steps, skipped, outcome, why):
    verdict = judged(tiny, Evidence(8, steps, skipped, 60.0, BEFORE, after, drawings, alike=False))
    assert verdict.outcome == outcome
    assert why in verdict.why


def test_pictures_are_picked_far_apart_and_no_caption_twice():
    grey = np.array([0, 1, 2, 250, 128, 64, 129])
    images = np.broadcast_to(grey.astype(np.uint8)[:, None, None, None], (7, 4, 4, 3))
    captions = ["a", "b", "c", "d", "e", "f", "g"]
    assert pick(images, captions, 3) == [0, 3, 4]
    assert pick(images, captions, 4) == [0, 3, 4, 5]
    assert pick(images, ["a", "b", "c", "A", "e", "f", "g"], 3) == [0, 5, 6]
    assert len(pick(images, captions)) == 5  # 0 and 1, 128 and 129 look the same


def test_captions_that_training_never_sees_are_named(tiny):
    config, after = dataclasses.replace(tiny, embedding_dropout=1.0), Measured(0.3, 0.1, 0.1)
    verdict = judged(config, Evidence(8, 400, 0, 60.0, BEFORE, after, Drawings(1, 1), alike=False))
    assert verdict.outcome == "FAIL"
    assert "captions do not matter; --embedding_dropout = 1 hides them" in verdict.why
