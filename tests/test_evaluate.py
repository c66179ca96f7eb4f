"""The measurements against what they must be, and the way from a checkpoint to the page."""

import csv
import dataclasses
import json
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoint
import evaluate
import files
import schedule as schedules
import training
from dataloader import Batch
from evaluate import choose, invented
from evaluation import features, heldout, metrics, report, scores
from evaluation.scores import Interval, Score, difference
from model import UNet
from params import Sampling
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


def test_samples_are_split_over_the_three_sets_and_each_has_its_seed():
    names, unseen = [f"a{i} b{i}" for i in range(50)], [f"c{i} d{i}" for i in range(4)]
    sets = choose(names, unseen, 40, seed=7)
    assert [len(chosen.texts) for chosen in sets.values()] == [26, 4, 10]
    assert [seed for chosen in sets.values() for seed in chosen.seeds] == list(range(7, 47))
    assert [names[row] for row in sets["training"].own] == sets["training"].texts
    assert [unseen[row] for row in sets["held-out"].own] == unseen
    assert [len(chosen.texts) for chosen in choose(names[:3], [], 40, seed=0).values()] == [3, 0, 6]


def test_nobody_keeps_his_own_caption():
    own = np.array([3, 5, 8, 13, 21])
    assert sorted(scores.shuffled(own)) == own.tolist()
    assert (scores.shuffled(own) != own).all()


# Held-out loss.


@pytest.mark.parametrize("T", [1000, 50, 37, 10, 7])
def test_every_picture_is_asked_once_at_every_level_and_all_steps_are(T):
    steps = heldout.questions(400, T)
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


class Nothing(nnx.Module):
    """A network that always says the same."""

    def __init__(self):
        self.said = nnx.Param(jnp.zeros(()))

    def __call__(self, noisy, t, text_emb, text_mask):
        return jnp.zeros_like(noisy) + self.said[...]


def test_a_network_that_says_nothing_loses_what_theory_says(tiny, sealed):
    """Of a prediction of 0 the loss is the mean square of the target: 1 for noise, image² for the clean image."""
    graphdef, weights = nnx.split(Nothing())
    weights = nnx.to_pure_dict(weights)
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 12, 3), dtype=np.uint8)
    text = np.zeros((11, 7, 4), np.float32), np.ones((11, 7), bool)
    for prediction, expected in ("eps", 1), ("x0", ((images / 127.5 - 1) ** 2).mean((1, 2, 3))):
        measure = heldout.build_losses(dataclasses.replace(tiny, prediction=prediction), graphdef)
        with sealed():
            found = heldout.loss_per_level(measure, weights, images, *text, T=tiny.T)
        assert found.shape == (11, 10)
        tolerance = 0.2 if prediction == "eps" else 1e-4
        np.testing.assert_allclose(heldout.per_picture(found, tiny.T), expected, rtol=tolerance)
        alone = heldout.loss_per_level(measure, weights, images[:3], *(part[:3] for part in text), T=tiny.T)
        np.testing.assert_array_equal(alone, found[:3])


def test_the_loss_is_that_of_training(tiny):
    encoder_dim = 4
    graphdef = training.structure(tiny, encoder_dim)
    random = np.random.default_rng(1)
    like = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(UNet(tiny, encoder_dim, nnx.Rngs(0)))))
    weights = jax.tree.map(lambda w: jnp.asarray(0.1 * random.normal(size=w.shape), jnp.float32), like)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    emb, mask = jax.random.normal(jax.random.key(2), (2, 7, 4)), jnp.ones((2, 7), bool)

    noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (8, 12, 3)))(jnp.arange(2))
    measure = heldout.build_losses(tiny, graphdef)
    batch, t = Batch(jnp.asarray(images / 127.5 - 1, jnp.float32), emb, mask), jnp.array([3, 40])

    @jax.jit
    def as_trained(weights):
        model = nnx.merge(graphdef, nnx.State(weights))
        return training.loss_at(model, batch, noise, t, schedules.cosine(tiny.T), tiny.prediction)

    expected = as_trained(weights)
    found = measure(weights, images, emb, mask, t, np.arange(2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# Differences.


def share_of(hits, on="training"):
    return scores.rate("accuracy", on, "pixels", np.array(hits, bool))


def test_paired_differences_see_what_independent_ones_cannot():
    random = np.random.default_rng(0)
    pictures = random.normal(10, 5, 50)
    a, b = scores.mean("loss", "held-out", "short", pictures), scores.mean("loss", "held-out", "short", pictures - 0.1)
    assert not difference(a, b, paired=False).beyond
    assert difference(a, b, paired=True).beyond
    assert difference(a, b, paired=True).value == pytest.approx(-0.1)
    assert difference(a, b, paired=True).verdict("lower") == "better"
    assert difference(b, a, paired=True).verdict("lower") == "worse"


@pytest.mark.parametrize(("won", "marked"), [(0, False), (1, False), (4, False), (8, True)])
def test_a_few_questions_won_are_no_difference(won, marked):
    a, b = share_of([False] * 64), share_of([True] * won + [False] * (64 - won))
    assert difference(a, b, paired=True).beyond == marked


def test_losses_of_different_predictions_do_not_compare(whole, tmp_path):
    other = {
        **whole,
        "config": {"prediction": "eps"},
        "scores": [scores.mean("loss", "held-out", "short average", [9.0, 9.1])],
    }
    for name, results in ("a", whole), ("b", other):
        report.write(tmp_path / f"{name}.json", results)
    said = report.comparison([tmp_path / "a.json", tmp_path / "b.json"])
    assert "note: [B] predicts something else than [A], so that their losses do not compare" in said
    assert " worse\n" not in said
    report.write(tmp_path / "b.json", {**other, "config": whole["config"]})
    said = report.comparison([tmp_path / "a.json", tmp_path / "b.json"])
    assert "note" not in said
    assert " worse\n" in said


@pytest.mark.slow
def test_equal_runs_are_marked_in_one_of_twenty_comparisons():
    random = np.random.default_rng(0)
    for paired in (True, False):
        marked = [
            difference(share_of(random.random(100) < 0.2), share_of(random.random(100) < 0.2), paired=paired).beyond
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
    training, heldout = random.normal(size=(60, 500)), random.normal(size=(30, 500))
    drawn = {"training": training[:20] + 0.6 * random.normal(size=(20, 500)), "held-out": random.normal(size=(20, 500))}
    near = {on: metrics.neighbours(rows, training) for on, rows in drawn.items()}
    found = list(scores.copies("pixels", near, metrics.neighbours(heldout, training)))
    results = {"scores": found, "over_time": []}
    assert scores.find(found, "copy rate", "training").value.value == 0
    said = report.summary(results)["Does it copy?"]
    assert "no exact copies that show" in said
    assert "On training captions it leans on single training pictures: the nearest is at 0.4" in said
    assert "On held-out captions" not in said
    exact = {"training": metrics.neighbours(training[:20], training)}
    results["scores"] = list(scores.copies("pixels", exact, metrics.neighbours(heldout, training)))
    assert report.summary(results)["Does it copy?"].startswith("It copies: 100.0 %")


def copied(images, low, real=0.01):
    value = Interval(low + 0.05, low, low + 0.1)
    floor = Interval(real, 0.0, real + 0.02)
    return {
        "name": f"epoch{images}", "images": images,
        "scores": [Score("copy rate", "training", "pixels", value, real=floor, better="lower", share=True)],
    }  # fmt: skip


def test_copying_sets_in_where_it_leaves_the_floor_and_its_error():
    assert "by 30 pictures (epoch30)" in report.copying_sets_in([copied(10, 0), copied(20, 0.02), copied(30, 0.04)])
    assert "No checkpoint copies up to 20" in report.copying_sets_in([copied(10, 0), copied(20, 0.02)])


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


# From a checkpoint to the page.


@pytest.fixture(scope="module")
def split(shapes, tmp_path_factory):
    """The shapes, each three times and brightened, 24 in all; every third is held out. One caption bites HTML."""
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


@pytest.fixture(scope="module")
def run(split, tiny, tmp_path_factory):
    """A run's folder with two checkpoints, whose weights are random."""
    import dataset

    config = dataclasses.replace(tiny, data=str(split), TEXT_LEN=17)
    encoder = TextEncoder(tiny.encoder)
    state = training.init(config, encoder.dim, jax.random.key(0))
    folder = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(0)
    for number, name in enumerate(("epoch1", "final"), 1):
        noise = [
            jax.tree.map(lambda w: np.asarray(0.1 * random.normal(size=w.shape), np.float32), state.weights)
            for _ in range(2)
        ]
        about = {
            "config": config.to_json(), "encoder": encoder.identity, "schedule": {"name": "cosine", "T": tiny.T},
            "dataset": {"fingerprint": dataset.from_config(config).fingerprint},
            "step": number, "seconds": number * 1.5,
            "prompts": ["red disc"],
        }  # fmt: skip
        items = {"ema_short": noise[0], "ema_long": noise[1], "train": {"step": state.step}}
        checkpoint.save(folder / name, items, about=json.loads(json.dumps(about)))
    lines = [{"images": 3 * i, "loss": 1 / i} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def call(run, tmp_path, monkeypatch, capsys):
    """Run evaluate.py on a copy of the run, with an extractor that takes no time and an empty cache."""
    shutil.copytree(run, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    kept = files.CACHE
    for folder in kept.iterdir():  # all but what this module keeps
        if folder.name not in {"drawn", "features", "judge"}:
            (tmp_path / "cache").mkdir(exist_ok=True)
            (tmp_path / "cache" / folder.name).symlink_to(folder.resolve())
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")

    class Corners(features.Extractor):
        def __init__(self):
            self.name, self.dim, self.identity = "corners", 6, "0"

        def __call__(self, images):
            return np.concatenate([images[:, 1, 1], images[:, 5, 5]], axis=-1).astype(np.float32)[:, :6] / 255

    load = features.load
    monkeypatch.setattr(features, "load", lambda name: Corners() if name == features.DEFAULT else load(name))

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        code = ""
        try:
            evaluate.main()
        except SystemExit as stop:
            code = str(stop.code)
        return "".join(capsys.readouterr()) + code

    return called


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


FEW = ("--steps", "2", "--samples", "24")


def test_from_a_checkpoint_to_the_page_and_beside_another(call, monkeypatch):
    said = call("--checkpoint", "models", *FEW)
    assert [line.split()[0] for line in said.splitlines() if line[:1].isdigit()] == ["3", "6"]
    assert "held-out loss" in said
    assert "models/epoch1:" not in call("--checkpoint", "models", *FEW)  # known by now

    said = call("--checkpoint", "models/final", "--report", "new/a", *FEW)
    assert "new/a/report.html written" in said
    results = report.read(Path("new/a/results.json"))
    names = {score.name for score in results["scores"]}
    assert {"KID", "Fréchet distance", "R-precision, top 5", "copy rate", "loss", "coverage"} <= names
    assert {score.by for score in results["scores"] if score.name == "KID"} == {"corners"}
    assert all(score.real for score in results["scores"] if score.name in ("KID", "copy rate", "R-precision, top 1"))
    assert results["notes"] == []
    assert [entry["images"] for entry in results["over_time"]] == [3, 6]
    assert {name: len(saved["captions"]) for name, saved in results["sets"].items()} == {
        "training": 12, "held-out": 6, "invented": 6,
    }  # fmt: skip
    assert sum(results["seconds"].values()) > 0
    with np.load("new/a/drawn.npz") as drawn:
        assert drawn["held-out"].shape == (6, 8, 12, 3)

    page = Path("new/a/report.html").read_text()
    read = Page(page)
    assert "<b>bold" not in page
    assert "<b>bold</b>" in read.words
    assert all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert not {"script", "link"} & set(read.tags)
    for figure in ("levels", "over_time", "training", "held-out", "invented", "neighbours"):
        assert Path(f"new/a/{figure}.png").stat().st_size > 500

    call("--checkpoint", "models/epoch1", "--report", "b", *FEW)
    said = call("--compare", "new/a/results.json", "b/results.json")
    assert "[B] b/results.json: models/epoch1, 3 pictures seen" in said
    assert "note" not in said
    itself = call("--compare", "new/a/results.json", "new/a/results.json")
    assert not any(line.endswith((" better", " worse")) for line in itself.splitlines())


def test_an_interrupted_report_goes_on_and_ends_the_same(call, monkeypatch):
    draw, drawn = evaluate.draw, []

    def interrupted(subject, texts, seeds, options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.extend([texts])
        return draw(subject, texts, seeds, options)

    monkeypatch.setattr(evaluate, "BATCH", 5)
    monkeypatch.setattr(evaluate, "losses", lambda subject: ([], {"short": {}, "long": {}}))
    monkeypatch.setattr(evaluate, "draw", interrupted)
    words = ("--checkpoint", "models/final", "--report", "a", *FEW)
    assert "the same command goes on" in call(*words)
    assert not Path("a/results.json").exists()
    monkeypatch.setattr(evaluate, "draw", lambda *args: drawn.append(args[1]) or draw(*args))
    call(*words)
    assert len(drawn) == len({tuple(texts) for texts in drawn}) == 7  # 12, 6 and 6 captions in batches of 5
    resumed = json.loads(Path("a/results.json").read_text())
    pictures = Path("a/drawn.npz").read_bytes()
    shutil.rmtree(files.CACHE / "drawn")
    call(*words)
    undisturbed = json.loads(Path("a/results.json").read_text())
    for results in (resumed, undisturbed):
        del results["seconds"]
    assert resumed == undisturbed
    with np.load("a/drawn.npz") as again:
        Path("earlier.npz").write_bytes(pictures)
        with np.load("earlier.npz") as before:
            for on in again.files:
                np.testing.assert_array_equal(again[on], before[on])


def test_pictures_of_another_data_set_are_allowed_with_a_note(call, shapes):
    said = call("--checkpoint", "models/final", "--data", shapes, "--report", "a", *FEW)
    assert "note: the pictures are not those that the checkpoint was trained on" in said
    results = report.read(Path("a/results.json"))
    assert "not those that the checkpoint was trained on" in results["notes"][0]
    assert any("needs at least" in text for text in results["notes"])  # nothing is held out
    assert "KID" not in {score.name for score in results["scores"]}
    assert "Note: the pictures are not" in Path("a/report.html").read_text()


def test_nothing_drawn_otherwise_is_taken_for_these_drawings(call, monkeypatch):
    drawn = []

    def draw(subject, texts, *_):
        drawn.append(texts)
        return {"images": np.zeros((len(texts), 8, 12, 3), np.uint8)}

    monkeypatch.setattr(evaluate, "draw", draw)
    options = evaluate.Options(checkpoint=Path("models/final"), sampling=Sampling(steps=2))
    subject = evaluate.load(options.checkpoint, options)
    others = [
        evaluate.load(Path("models/epoch1"), options),
        evaluate.load(options.checkpoint, replace(options, ema="long")),
    ]
    otherwise = [replace(options, sampling=Sampling(steps=2, c=3)), replace(options, sampling=Sampling(steps=3))]
    cases = [(subject, options, 0), *((subject, how, 0) for how in otherwise)]
    cases += [(subject, options, 1), *((other, options, 0) for other in others)]
    for times, (now, how, seed) in enumerate(cases, 1):
        for _ in range(2):
            evaluate.drawings(now, {"training": evaluate.Captions(["red disc"], [0], [seed])}, how)
            assert len(drawn) == times


def test_plain_evaluation_needs_no_extractor(call):
    said = call("--checkpoint", "models/final", *FEW)
    assert "16 captions of 16 training pictures, guidance 7" in said
    assert "chance                     6.2%    31.2%            8" in said
    assert not Path("over_time.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "--samples 1: at least 2"),
        (["--checkpoint", "nowhere"], "no checkpoint at"),
        (["--compare", "a.json"], "at least two"),
        (["--report", "page", "--extractor", "nowhere"], "feature extractor 'nowhere': there is no such file"),
        (["--compare", "a.json", "b.json"], "a.json"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, words, message):
    assert message in call(*words)


@pytest.fixture(scope="module")
def whole():
    score = scores.mean("loss", "held-out", "short average", np.arange(4.0))
    return {
        "schema": 1, "checkpoint": {"path": "models/final", "images": 9}, "config": {}, "data": {"fingerprint": "0"},
        "sampling": {}, "sets": {}, "scores": [score, copied(1, 0.5)["scores"][0]], "levels": {},
        "over_time": [copied(3, 0.1)], "training_loss": [], "seconds": {}, "notes": [],
    }  # fmt: skip


def test_results_are_read_as_they_were_written(whole, tmp_path):
    report.write(tmp_path / "a.json", whole)
    assert report.read(tmp_path / "a.json") == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: saved[:-20], "a.json is not JSON"),
        (lambda saved: "[]", "holds no object"),
        (lambda saved: saved.replace('"schema": 1', '"schema": 2'), "schema is 2, this version reads 1"),
        (lambda saved: saved.replace('"sets"', '"stes"'), "a.json: sets is missing"),
        (lambda saved: saved.replace('"notes": []', '"notes": 3'), "notes is 3, not of type list"),
        (lambda saved: saved.replace('"fingerprint"', '"f"'), "data.fingerprint is missing"),
        (lambda saved: saved.replace("[1.5, ", '["much", ', 1), r"scores\[0\] is damaged .*'much' is no number"),
        (lambda saved: saved.replace("[1.5, ", "[", 1), r"scores\[0\] is damaged"),
        (lambda saved: saved.replace('"images": 3', '"images": "3"'), r"over_time\[0\].images"),
    ],
)
def test_a_corrupt_results_file_is_refused_by_file_and_field(whole, tmp_path, damage, message):
    path = tmp_path / "a.json"
    report.write(path, whole)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=message):
        report.read(path)


def test_without_matplotlib_a_report_says_so_before_it_draws(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is missing: pip install -r requirements-dev.txt" in call(
        "--checkpoint", "models/final", "--report", "a", *FEW
    )
