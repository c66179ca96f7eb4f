"""The measurements against what they must be, and the way from a checkpoint to the page."""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import UNREADABLE, damaged
from flax import nnx
from PIL import Image

import checkpoint
import dataset
import evaluate
import export
import files
import pipeline
import schedule as schedules
import training
from evaluation import features, heldout, judge, report, scores
from evaluation.captions import Captions, choose, invented
from evaluation.scores import Interval, Score, difference
from model import UNet
from params import Sampling
from sharing import portable
from text_encoder import TextEncoder

# Which captions.


def test_invented_captions_join_words_of_real_ones_and_are_not_real():
    real = ["red heart", "wrapped gift", "black cat", "Red cat", "flag: Chad", "smiling face with hat"]
    made = invented(real, 100)
    assert set(made) == {"red gift", "Red gift", "wrapped heart", "wrapped cat", "black heart", "black gift"}
    assert len(made) == len(set(made))
    assert invented(real, 2) == invented(real, 2)
    assert len(invented(real, 2)) == 2
    assert invented(["flag: Chad", "sun"], 5) == []
    styles = [f"{name}, {vendor} style" for name in ("red heart", "wrapped gift") for vendor in ("One", "Two")]
    assert set(invented(styles, 100)) == {
        f"{phrase}, {vendor} style" for phrase in ("red gift", "wrapped heart") for vendor in ("One", "Two")
    }


def test_samples_are_split_over_the_three_sets():
    names, unseen = [f"a{i} b{i}" for i in range(50)], [f"c{i} d{i}" for i in range(4)]
    sets = choose(names, unseen, 40)
    assert [len(set(chosen.texts)) for chosen in sets.values()] == [26, 4, 10]
    assert [names[row] for row in sets["training"].own] == sets["training"].texts
    assert [unseen[row] for row in sets["held-out"].own] == unseen
    assert [len(chosen.texts) for chosen in choose(names[:3], [], 40).values()] == [3, 0, 6]


def test_shuffled_captions_are_all_anothers():
    own = np.array([3, 5, 8, 13, 21])
    assert sorted(scores.shuffled(own)) == own.tolist()
    assert (scores.shuffled(own) != own).all()


# Held-out loss.


@pytest.mark.parametrize("T", [1000, 50, 37, 10, 7])
def test_every_picture_is_asked_once_at_every_level_and_all_steps_are(T):
    steps = heldout.measured_steps(400, T)
    levels = (steps - 1) * training.LEVELS // T
    there = steps > 0
    assert (levels[there] == np.broadcast_to(np.arange(training.LEVELS), steps.shape)[there]).all()
    assert there.all(axis=0).sum() == there.any(axis=0).sum() == min(T, training.LEVELS)
    assert set(steps[there]) == set(range(1, T + 1)) or T == 1000
    counts = [len(set(steps[:100, i])) for i in range(training.LEVELS)]
    assert T != 1000 or min(counts) > 60  # of 100 steps: spread, not repeated


def test_the_mean_over_levels_counts_steps():
    losses = np.where(np.arange(10) < 5, 1.0, 3.0)[None].repeat(2, axis=0)
    np.testing.assert_allclose(heldout.per_picture(losses, 1000), 2)
    uneven = np.full((1, 10), np.nan)
    uneven[0, [level * 10 // 7 for level in range(7)]] = np.arange(7)
    np.testing.assert_allclose(heldout.per_picture(uneven, 7), 3)


class Weighing(nnx.Module):
    """Stands for a network: a weighted sum of all that it is given."""

    def __init__(self):
        self.weights = nnx.Param(jnp.zeros(4))

    def __call__(self, noisy, t, text_emb, text_mask, *_):
        a, b, c, d = self.weights[...]
        words = (text_emb * text_mask[..., None]).mean((1, 2))
        return a * noisy + (b * t / 50 + c * words + d)[:, None, None, None]


def losses_by_hand(weights, images, text, steps, prediction):
    """Of every picture at each level: the mean squared error of the prediction, at the level's step and seed."""
    alpha, sigma = (np.asarray(part, np.float64) for part in schedules.cosine(50))
    image, words = images / 127.5 - 1, (text[0] * text[1][..., None]).mean((1, 2))
    a, b, c, d = weights
    found = np.zeros(steps.shape)
    for (row, level), t in np.ndenumerate(steps):
        key = jax.random.key(row * training.LEVELS + level)
        noise = np.asarray(jax.random.normal(key, images.shape[1:]), np.float64)
        predicted = a * (alpha[t] * image[row] + sigma[t] * noise) + b * t / 50 + c * words[row] + d
        target = {"eps": noise, "x0": image[row], "v": alpha[t] * noise - sigma[t] * image[row]}[prediction]
        found[row, level] = ((predicted - target) ** 2).mean()
    return found


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_losses_are_the_errors_of_the_prediction_at_steps_and_noise_of_their_own(tiny, sealed, monkeypatch, prediction):
    random = np.random.default_rng(0)
    weights = np.float32([0.5, 2, 3, -0.7])
    images = random.integers(0, 256, (11, 8, 12, 3), dtype=np.uint8)
    text = random.normal(size=(11, 7, 4)).astype(np.float32), random.random((11, 7)) < 0.5
    graphdef, state = nnx.split(Weighing())
    tree = jax.tree.map(lambda _: jnp.asarray(weights), nnx.to_pure_dict(state))
    config = dataclasses.replace(tiny, prediction=prediction)
    monkeypatch.setattr(heldout, "network", lambda config, weights: nnx.merge(graphdef, nnx.State(weights)))
    monkeypatch.setattr(heldout, "build_losses", heldout.build_losses.__wrapped__)
    measure = heldout.build_measure(config, images, *text)
    with sealed():
        found = measure(tree)
    expected = losses_by_hand(weights, images, text, heldout.measured_steps(11, 50), prediction)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    alone = heldout.build_measure(config, images[:3], *(part[:3] for part in text))(tree)
    np.testing.assert_array_equal(alone, found[:3])


def test_a_network_that_diverged_has_no_loss_and_a_level_without_steps_counts_for_nothing():
    losses = np.where(np.arange(10)[None] % 2 == 1, np.nan, [[4.0]])  # T = 5: every second level has a step
    np.testing.assert_allclose(heldout.per_picture(losses, 5), [4.0])
    assert np.isnan(heldout.per_picture(np.full((2, 10), np.nan), 50)).all()


# Differences, and what is said of them.


def share_of(hits, on="training"):
    return scores.rate("accuracy", on, "pixels", np.array(hits, bool))


def test_paired_differences_see_what_independent_ones_cannot():
    random = np.random.default_rng(0)
    pictures = random.normal(10, 5, 50)
    a, b = scores.mean("loss", "held-out", "short", pictures), scores.mean("loss", "held-out", "short", pictures - 0.1)
    assert difference(a, b, paired=False) == 0
    assert difference(a, b, paired=True) == pytest.approx(-0.1)
    assert difference(b, a, paired=True) == pytest.approx(0.1)
    run = whole_results()
    assert report.mark(run, run, a, b) == "better"
    assert report.mark(run, run, b, a) == "worse"
    assert report.mark(run, whole_results(data={"fingerprint": "1"}), a, b) == ""


@pytest.mark.parametrize(("won", "marked"), [(0, False), (1, False), (4, False), (8, True)])
def test_a_few_questions_won_are_no_difference(won, marked):
    a, b = share_of([False] * 64), share_of([True] * won + [False] * (64 - won))
    assert bool(difference(a, b, paired=True)) == marked


def whole_results(**fields):
    """A results.json with a loss, a copy rate and a point of a curve over time."""
    loss = scores.mean("loss", "held-out", "short average", np.arange(4.0))
    return {
        "checkpoint": {"path": "models/final", "images": 9}, "config": {}, "data": {"fingerprint": "0"},
        "sampling": {}, "sets": {}, "scores": [loss, *copied(1, 0.5)["scores"]], "over_time": [copied(3, 0.1)],
        **fields,
    }  # fmt: skip


def test_losses_of_different_predictions_do_not_compare(tmp_path):
    worse = [scores.mean("loss", "held-out", "short average", [9.0, 9.1])]
    report.write(tmp_path / "a.json", whole_results())
    report.write(tmp_path / "b.json", whole_results(scores=worse, config={"prediction": "eps"}))
    said = report.comparison([tmp_path / "a.json", tmp_path / "b.json"])
    assert "note: [B] predicts something else than [A], so that their losses do not compare" in said
    assert " worse\n" not in said
    report.write(tmp_path / "b.json", whole_results(scores=worse))
    said = report.comparison([tmp_path / "a.json", tmp_path / "b.json"])
    assert "note" not in said
    assert " worse\n" in said


@pytest.mark.slow
def test_equal_runs_are_marked_in_one_of_twenty_comparisons():
    random = np.random.default_rng(0)
    for paired in (True, False):
        marked = [
            difference(share_of(random.random(100) < 0.2), share_of(random.random(100) < 0.2), paired=paired) != 0
            for _ in range(2000)
        ]
        assert 0.02 < np.mean(marked) < 0.07


def test_numbers_are_shown_with_as_many_digits_as_they_need():
    assert share_of([True, False]).show() == "50.0 % (9.5–90.5)"
    assert Score("KID", "", "", Interval(0.01234, 0.01, 0.0147)).show() == "0.0123 (0.0100–0.0147)"
    assert Score("distance", "", "", Interval(123.456)).show() == "123"
    assert Score("rate", "", "", Interval(0.0, -1e-17, 0.1), share=True).show() == "0.0 % (0.0–10.0)"
    assert Score("distance", "", "", Interval(1.0)).show("real") == ""


def test_copies_that_are_not_exact_show_in_the_mean():
    random = np.random.default_rng(0)
    real = {"training": random.normal(size=(60, 500)), "held-out": random.normal(size=(30, 500))}
    near = real["training"][:20] + 0.6 * random.normal(size=(20, 500))
    samples = {"training": near, "held-out": random.normal(size=(20, 500))}
    found, _ = scores.words_and_copies("pixels", samples, real, np.arange(20))
    assert scores.find(found, "copy rate", "training").value.value == 0
    assert scores.find(found, "caption accuracy, top 1").value.value == 1
    said = report.copies(found)
    assert "no exact copies that show" in said
    assert "On training captions it leans on single training pictures: d1/d2 is 0.4" in said
    assert "On held-out captions" not in said
    exact, _ = scores.words_and_copies("pixels", {"training": real["training"][:20]}, real, np.arange(20))
    assert report.copies(exact).startswith("It copies: 100.0 %")


def copied(images, low, real=0.01):
    value = Interval(low + 0.05, low, low + 0.1)
    floor = Interval(real, 0.0, real + 0.02)
    return {
        "name": f"epoch{images}", "images": images,
        "scores": [Score("copy rate", "training", "pixels", value, real=floor, better="lower", share=True)],
    }  # fmt: skip


def test_copying_sets_in_where_it_leaves_the_floor_and_its_error():
    assert "by 30 pictures (epoch30)" in report.copying_since([copied(10, 0), copied(20, 0.02), copied(30, 0.04)])
    assert "No checkpoint copies up to 20" in report.copying_since([copied(10, 0), copied(20, 0.02)])


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ([3, 2, 1], "not done: the held-out loss still fell between 1 and 2"),
        ([3, 1, 2], "passed its best: the held-out loss was lowest at 1"),
        ([3, 1, 1.0001], "not changed beyond its error since 1"),
        ([3], "one checkpoint cannot say"),
    ],
)
def test_a_run_is_done_when_the_held_out_loss_no_longer_falls(means, message):
    random = np.random.default_rng(0)
    pictures = random.normal(0, 5, 40)
    entries = [
        {
            "images": i,
            "scores": [scores.mean("loss", "held-out", "short average", pictures + mean + random.normal(0, 0.1, 40))],
        }
        for i, mean in enumerate(means)
    ]
    assert message in report.done(entries)


@pytest.mark.parametrize("damage", [
    lambda saved: saved[:-20],
    lambda saved: "[]",
    lambda saved: saved.replace('"schema": 2', '"schema": 1'),
    lambda saved: saved.replace('"scores"', '"cores"'),
    lambda saved: saved.replace('"sets"', '"stes"'),
    lambda saved: saved.replace('"each"', '"eech"', 1),
    lambda saved: saved.replace("[1.5, ", "[1.5, 1.5, ", 1),
])  # fmt: skip
def test_results_are_read_as_they_were_written_and_no_other_file_is(tmp_path, damage):
    path = tmp_path / "a.json"
    report.write(path, whole_results())
    assert report.read(path) == {**whole_results(), "schema": report.SCHEMA}
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=r"a\.json is no results\.json .*; write it anew"):
        report.read(path)


def test_results_of_any_other_kind_are_compared_or_refused_by_name(tmp_path):
    good, odd = tmp_path / "a.json", tmp_path / "b.json"
    report.write(good, whole_results())
    whole = json.loads(good.read_text())
    compared = 0
    for text in (*map(json.dumps, damaged(whole)), *UNREADABLE):
        odd.write_text(text, encoding="latin-1")
        try:
            assert report.comparison([good, odd])
            assert report.comparison([odd, good])
            compared += 1
        except ValueError as error:
            assert str(error).startswith(f"{odd} is no results.json")  # noqa: PT017
    assert compared


# Samples, by a pretended network.


@pytest.fixture(scope="module")
def split(shapes, tmp_path_factory):
    """The shapes, each three times and darkened, 24 in all; every third is held out. One caption bites HTML."""
    from PIL import Image, ImageEnhance

    root = tmp_path_factory.mktemp("split")
    (root / "image" / "Mine").mkdir(parents=True)
    rows = list(csv.DictReader((shapes / "full_emoji.csv").read_text().splitlines()))
    lines = ["#,name,split"]
    for number in range(24):
        row, size = rows[number % 8], ["small", "big", "<b>bold</b>"][number // 8]
        with Image.open(shapes / "image" / "Mine" / f"{row['#']}.png") as picture:
            darker = ImageEnhance.Brightness(picture).enhance(1 - 0.3 * (number // 8))
        darker.save(root / "image" / "Mine" / f"{number}.png")
        side = ["train", "train", "heldout"][number % 3]
        lines.append(f"{number},{size} {row['name'].split()[number % 2]}{number},{side}")
    (root / "full_emoji.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def pretended(split, tiny, monkeypatch, tmp_path):
    """Replaces DiffusionPipeline by one whose samples are noise of the seed; gives what it was asked for."""
    asked = []
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")

    class Pretended:
        def __init__(self, path, encoder=None, *, ema):
            self.config = dataclasses.replace(tiny, data=str(split), CHANNELS=4)
            self.hash, self.about = f"{path} {ema}", {"dataset": {"fingerprint": "that of others"}}

        def resolved(self, sampling):
            return sampling

        def generate_arrays(self, texts, sampling, *, seeds):
            asked.append(texts)
            return np.stack(
                [np.random.default_rng(seed).integers(0, 256, (8, 12, 4), dtype=np.uint8) for seed in seeds]
            )

    monkeypatch.setattr(pipeline, "DiffusionPipeline", Pretended)
    return asked


def test_samples_and_real_pictures_with_transparency_are_laid_on_white(pretended, split, tiny):
    subject = evaluate.load(Path("a"), evaluate.Options())
    plain = dataset.from_config(dataclasses.replace(tiny, data=str(split)))
    for on in ("training", "held-out"):
        expected = dataset.side(plain, heldout=on == "held-out").images
        np.testing.assert_allclose(subject.images[on].astype(int), expected, atol=2)
    samples = evaluate.samples_of(subject, {"training": Captions(["red disc"] * 2, [0, 1])})["training"]
    rgba = np.random.default_rng(1).integers(0, 256, (8, 12, 4), dtype=np.uint8) / 255
    expected = 255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])
    np.testing.assert_allclose(samples[1], expected, atol=0.6)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "BATCH", 5)
    subject = evaluate.load(Path("a"), evaluate.Options())
    sets = choose(subject.real["training"].names, subject.real["held-out"].names, 24)
    generate = subject.pipeline.generate_arrays

    def interrupted(texts, sampling, *, seeds):
        if len(pretended) == 2:
            raise KeyboardInterrupt
        return generate(texts, sampling, seeds=seeds)

    monkeypatch.setattr(subject.pipeline, "generate_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.samples_of(subject, sets)
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "BATCH", 5)
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    resumed = evaluate.samples_of(subject, sets)
    assert len(pretended) == len({tuple(texts) for texts in pretended}) == 7  # 12, 6 and 6 captions in batches of 5
    monkeypatch.setattr(files, "CACHE", tmp_path / "another cache")
    undisturbed = evaluate.samples_of(subject, sets)
    assert len(pretended) == 14
    for on in sets:
        np.testing.assert_array_equal(resumed[on], undisturbed[on])


def test_nothing_sampled_otherwise_is_taken_for_these_samples(pretended):
    plain = evaluate.Options(sampling=Sampling(steps=2))
    cases = [(Path("a"), plain), (Path("b"), plain), (Path("a"), dataclasses.replace(plain, seed=1))]
    cases += [(Path("a"), dataclasses.replace(plain, sampling=Sampling(steps=2, c=3)))]
    cases += [(Path("a"), dataclasses.replace(plain, ema="long"))]
    for times, (path, options) in enumerate(cases, 1):
        subject = evaluate.load(path, options)
        for _ in range(2):
            evaluate.samples_of(subject, {"training": Captions(["red disc"], [0])})
            assert len(pretended) == times


# From a checkpoint to the page.


class Letters(TextEncoder):
    """Stands for a text encoder: every letter is a token, and the empty caption a blank."""

    def __init__(self, name=""):
        self.dim = 4
        self.identity = {"name": "letters", "sha256": "0"}

    def tokenize(self, texts, length):
        return None, self(texts, length)[1]

    def __call__(self, texts, length):
        texts = [(text or " ")[:length] for text in texts]
        text_mask = np.array([[i < len(text) for i in range(length)] for text in texts])
        letters = np.array([[ord(letter) for letter in text.ljust(length)] for text in texts], np.float32)
        return np.stack([np.sin(letters * k) for k in range(1, 5)], -1) * text_mask[..., None], text_mask


class Corners(features.Extractor):
    """Stands for a feature extractor: the colours of two places."""

    def __init__(self):
        self.name, self.dim, self.identity = "corners", 6, "0"

    def __call__(self, images):
        return np.concatenate([images[:, 1, 1], images[:, 5, 5]], axis=-1).astype(np.float32) / 255


@pytest.fixture(scope="module")
def run(split, tiny, tmp_path_factory):
    """A run's folder with two checkpoints, whose weights are random."""
    config = dataclasses.replace(tiny, data=str(split), TEXT_LEN=17)
    like = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(UNet(config, 4, nnx.Rngs(0)))))
    folder = tmp_path_factory.mktemp("run") / "models"
    random = np.random.default_rng(0)
    for number, name in enumerate(("epoch1", "final"), 1):
        items = {
            f"ema_{ema}": jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), like)
            for ema in ("short", "long")
        }
        about = {
            "config": config.to_json(), "encoder": Letters().identity, "schedule": {"name": "cosine", "T": tiny.T},
            "dataset": {"fingerprint": dataset.from_config(config).fingerprint},
            "step": number, "seconds": number * 1.5, "prompts": ["red disc"],
        }  # fmt: skip
        items["train"] = {"step": np.int32(number)}
        checkpoint.Saver().save(folder / name, items, about=json.loads(json.dumps(about)), now=True)
    return folder


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """Runs evaluate.py beside the checkpoints, with an encoder and an extractor that take no time; gives its words."""
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "CACHE", tmp_path_factory.mktemp("cache"))
    for module in (pipeline, judge):
        patch.setattr(module, "TextEncoder", Letters)
    patch.setattr(features, "load", Corners)
    patch.chdir(run.parent)

    def call(capsys, *words):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        code = ""
        try:
            evaluate.main()
        except SystemExit as stop:
            code = str(stop.code)
        return "".join(capsys.readouterr()) + code

    yield call
    patch.undo()


@pytest.fixture
def call(evaluated, capsys):
    return lambda *words: evaluated(capsys, *words)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


FEW = ("--steps", "1", "--c", "1", "--samples", "24")


def test_from_a_run_to_the_page_and_beside_another(call, monkeypatch):
    monkeypatch.setattr(evaluate, "CURVE", 4)
    said = call("--checkpoint", "models", "--report", "new/a", *FEW)
    assert [line.split()[0] for line in said.splitlines() if line[:1].isdigit()] == ["3", "6"]
    assert "held-out loss" in said
    assert "new/a/report.html written" in said
    results = report.read(Path("new/a/results.json"))
    names = {score.name for score in results["scores"]}
    assert {"KID", "Fréchet distance", "R-precision, top 5", "copy rate", "loss"} <= names
    assert {score.by for score in results["scores"] if score.name == "KID"} == {"corners"}
    assert all(score.real for score in results["scores"] if score.name in ("KID", "copy rate", "R-precision, top 1"))
    assert results["notes"] == []
    assert results["checkpoint"]["path"] == "models/final"
    assert [entry["images"] for entry in results["over_time"]] == [3, 6]
    assert {name: len(saved["captions"]) for name, saved in results["sets"].items()} == {
        "training": 12, "held-out": 6, "invented": 6,
    }  # fmt: skip
    assert {(ema, on) for ema, sets in results["levels"].items() for on in sets} == {
        ("short", "held-out"), ("short", "training"), ("long", "held-out"), ("long", "training"),
    }  # fmt: skip

    page = Path("new/a/report.html").read_text()
    read = Page(page)
    assert "<b>bold" not in page
    assert "<b>bold</b>" in read.words
    assert all(source.startswith("data:image/png;base64,") for source in read.sources)
    nearest, pictures = 3 * (6 + 6 + 6), 2 * (12 + 6) + 6
    assert len(read.sources) == nearest + pictures
    assert not {"script", "link"} & set(read.tags)
    assert "Is it done?" in read.words
    assert len(Page(Path("new/a/blind.html").read_text()).sources) == 2 * 6

    monkeypatch.setattr(pipeline.DiffusionPipeline, "generate_arrays", None)  # all samples and losses are known by now
    monkeypatch.setattr(heldout, "build_losses", None)
    assert "held-out loss" in call("--checkpoint", "models", *FEW)
    said = call("--compare", "new/a/results.json", "new/a/results.json")
    assert "[B] new/a/results.json: models/final, 6 pictures seen" in said
    assert "note" not in said
    assert not any(line.endswith((" better", " worse")) for line in said.splitlines())


def test_the_blind_page_hides_which_pictures_were_drawn_and_tells_it_at_the_end(tmp_path):
    drawn, real = np.zeros((20, 8, 8, 3), np.uint8), np.full((20, 8, 8, 3), 255, np.uint8)
    report.write_blind(tmp_path / "blind.html", "final", drawn, real, [f"caption {i}" for i in range(20)])
    page = Page((tmp_path / "blind.html").read_text())
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.sources]
    dark = [picture.convert("L").getextrema() == (0, 0) for picture in shown]
    answers = re.findall(r"(\d+)\xa0(left|right)", page.words)
    assert answers == [(str(i + 1), "left" if dark[2 * i] else "right") for i in range(20)]
    assert 0 < sum(dark[::2]) < 20 == sum(dark)


@pytest.fixture
def random_samples(monkeypatch):
    def generate_arrays(self, texts, sampling, *, seeds):
        return np.stack([np.random.default_rng(seed).integers(0, 256, self.shape, dtype=np.uint8) for seed in seeds])

    monkeypatch.setattr(pipeline.DiffusionPipeline, "generate_arrays", generate_arrays)


def test_pictures_of_another_data_set_are_allowed_with_a_note(call, random_samples, shapes, monkeypatch):
    said = call("--checkpoint", "models/final", "--data", shapes, "--report", "c", *FEW)
    assert "note: the pictures are not those that the checkpoint was trained on" in said
    results = report.read(Path("c/results.json"))
    assert "not those that the checkpoint was trained on" in results["notes"][0]
    assert any("needs at least" in text for text in results["notes"])  # nothing is held out
    assert "KID" not in {score.name for score in results["scores"]}
    assert "Note: the pictures are not" in Path("c/report.html").read_text()


def test_an_exported_folder_is_evaluated_as_its_checkpoint_with_the_one_average_it_has(call, random_samples):
    drawer = pipeline.DiffusionPipeline("models/final", ema="long")
    Path("exported").mkdir()
    about = {**drawer.about, "ema": "long", "sampling": {}}
    portable.write(Path("exported"), drawer.weights, about, dtype="float32")
    call("--checkpoint", "exported", "--report", "exported", *FEW)
    found = export.measured([Path("models"), Path("exported")], {drawer.hash})
    assert found["command"] == "python evaluate.py --checkpoint exported --report exported " + " ".join(FEW)
    assert (found["checkpoint"]["ema"], found["levels"].keys()) == ("long", {"long"})
    assert {score.by for score in found["scores"] if score.name == "loss"} == {"long average"}
    assert export.measured([Path("exported")], {"of another"}) is None


def by_others(path, split, tiny, **changes):
    """What another program has drawn of 24 captions: the real pictures of those that have some, else black."""
    config = dataclasses.replace(tiny, data=str(split))
    real = {on: dataset.side(dataset.from_config(config), heldout=on == "held-out") for on in ("training", "held-out")}
    sets = choose(real["training"].names, real["held-out"].names, 24)
    images = [real[on].images[sets[on].own] for on in real] + [np.zeros((len(sets["invented"].texts), 8, 12, 3), "u1")]
    about = {"images": 9, "step": 3, "seconds": 1.5, "ema": "their", "config": {"prediction": "eps"}, "sampling": {}}
    captions = [text for chosen in sets.values() for text in chosen.texts]
    found = {"images": np.concatenate(images), "captions": captions, "about": json.dumps(about)} | changes
    np.savez(path, **{name: array for name, array in found.items() if array is not None})
    return found


def test_pictures_that_others_have_drawn_are_scored_by_the_same_measures(call, split, tiny, monkeypatch):
    by_others("real.npz", split, tiny)
    monkeypatch.setattr(pipeline.DiffusionPipeline, "generate_arrays", None)
    said = call("--checkpoint", "models/final", "--pictures", "real.npz", "--report", "real", "--samples", "24")
    assert "real/report.html written" in said
    results = report.read(Path("real/results.json"))
    found = {(score.name, score.on, score.by): score.value.value for score in results["scores"]}
    for name in ("caption accuracy, top 5", "copy rate"):  # real pictures are near themselves, with twins, and copies
        assert found[name, "training", "pixels"] == 1
    for score in results["scores"]:
        if score.name in ("KID", "Fréchet distance", "R-precision, top 1"):
            assert score.value.value == pytest.approx(score.real.value)
    assert ("KID", "held-out", "corners") in found
    assert not any(score.name == "loss" for score in results["scores"])
    assert results["checkpoint"]["path"] == "real.npz"
    assert results["checkpoint"]["images"] == 9
    assert "[B] real/results.json: real.npz, 9 pictures seen" in call(
        "--compare", "real/results.json", "real/results.json"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ["red disc"] * 24}, r"other captions than --samples 24 asks for: 'red disc', not"),
        ({"images": np.zeros((24, 4, 4, 3), "u1")}, r"are uint8 \[24, 4, 4, 3\], not uint8 \[24, 8, 12, 3\]: scale"),
        ({"images": np.zeros((24, 8, 12, 3))}, r"are float64 .*, not uint8"),
        ({"about": "{}"}, r"is no npz of images, captions and about \(KeyError"),
        ({"about": None}, r"is no npz of images, captions and about \(KeyError"),
        ({"images": np.array([{}])}, r"is no npz of images, captions and about \(ValueError"),
    ],
)
def test_pictures_of_others_that_cannot_be_scored_are_refused(call, split, tiny, changes, message):
    by_others("odd.npz", split, tiny, **changes)
    words = ("--checkpoint", "models/final", "--pictures", "odd.npz", "--samples", "24")
    assert re.search(rf"evaluate\.py: odd\.npz:? .*{message}", call(*words, "--report", "odd"))
    assert not Path("odd").exists()


def test_where_no_checkpoint_is_named_the_bundled_network_is_measured(call, random_samples, monkeypatch, tmp_path):
    drawer = pipeline.DiffusionPipeline("models/final")
    bundled = tmp_path / "pretrained"
    bundled.mkdir()
    portable.write(bundled, drawer.weights, {**drawer.about, "ema": "short", "sampling": {}}, dtype="float32")
    monkeypatch.setattr(portable, "BUNDLED", bundled)
    assert "16 captions of 16 training pictures" in call("--samples", "24")


def test_caption_accuracy_needs_no_extractor(call, random_samples, monkeypatch):
    monkeypatch.setattr(features, "load", None)
    said = call("--checkpoint", "models/final", "--samples", "24", "--c", "3")
    assert "16 captions of 16 training pictures, guidance 3 at noise levels 0.5 to 1, dpmpp_2m, 20 steps" in said
    assert "chance                     6.2%    31.2%            8" in said


def test_the_guidance_that_draws_best_becomes_the_checkpoints_own(call, monkeypatch):
    def generate_arrays(self, texts, sampling, *, seeds):
        if sampling.c == 3:  # as if it drew exactly what was asked for
            return np.stack([REAL[text] for text in texts])
        return np.stack([np.random.default_rng(seed).integers(0, 256, self.shape, dtype=np.uint8) for seed in seeds])

    pictures = dataset.from_config(pipeline.DiffusionPipeline("models/final").config)
    REAL = dict(zip(pictures.names, pictures.images, strict=True))
    monkeypatch.setattr(pipeline.DiffusionPipeline, "generate_arrays", generate_arrays)
    shutil.copytree("models/final", "mine/final")
    Path("mine/exported").mkdir()
    drawer = pipeline.DiffusionPipeline("mine/final")
    portable.write(Path("mine/exported"), drawer.weights, {**drawer.about, "ema": "short"}, dtype="float32")
    for name in ("mine/final", "mine/exported"):
        assert pipeline.recommended(name) == Sampling()
        said = call("--checkpoint", name, "--samples", "24", "--recommend", "1", "3", "7")
        assert f"{name} recommends guidance 3 at noise levels 0.5 to 1, dpmpp_2m, 20 steps" in said
        assert pipeline.recommended(name) == pipeline.DiffusionPipeline(name).sampling == Sampling(c=3)
        assert "guidance 3 at" in call("--checkpoint", name, "--samples", "2")
        assert "guidance 5 at" in call("--checkpoint", name, "--samples", "2", "--c", "5")


def test_an_option_that_a_task_would_ignore_is_refused(call):
    assert "--recommend does nothing with --report" in call("--recommend", "1", "2", "--report", "d")
    assert "--negative_prompt is of single drawings" in call("--recommend", "2", "4", "--negative_prompt", "blurry")
    assert "--compare does nothing with --checkpoint, --samples" in call(
        "--compare", "a", "b", "--checkpoint", "models/final", "--samples", "3"
    )


def test_without_an_extractor_a_report_has_the_other_scores(call, random_samples, monkeypatch):
    def load():
        raise features.FeatureError("it cannot be had")

    monkeypatch.setattr(features, "load", load)
    monkeypatch.setattr(report, "write_page", lambda *_: None)
    words = ("--checkpoint", "models/final", "--report", "d", *FEW)
    assert "note: no scores in features: it cannot be had" in call(*words)
    assert {s.by for s in report.read(Path("d/results.json"))["scores"]} == {"pixels", "short average", "long average"}


def test_an_interruption_says_how_to_go_on(call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.DiffusionPipeline, "generate_arrays", interrupted)
    assert "the same command goes on" in call("--checkpoint", "models/final", "--c", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "--samples 1: at least 2"),
        (["--checkpoint", "nowhere"], "no checkpoint at"),
        (["--compare", "a.json"], "at least two"),
        (["--pictures", "gone.npz", "--checkpoint", "models/final"], "say with --report where to write"),
        (["--pictures", "gone.npz", "--checkpoint", "models/final", "--report", "new"], "No such file"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--c", "nan"], "c = nan"),
        (["--checkpoint", "models/final", "--data", "gone"], "no folder gone: name the folder of"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, words, message):
    assert message in call(*words)
