"""The comparison, with scripts that only pretend to train and to evaluate."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import text_encoder
from evaluation import compare_encoders, report, scores


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the script with encoders whose names say how good they are; gives what it said and which scripts it ran."""
    monkeypatch.chdir(tmp_path)
    ran, failing = [], []

    def pretend(script, *words):
        words = list(map(str, words))
        ran.append((script, words))
        if failing:
            raise failing.pop()
        if script == "train.py":
            Path(words[words.index("--output") + 1], "final").mkdir(parents=True)
            return
        folder = Path(words[words.index("--report") + 1])
        good = int(folder.parent.name.split("-")[-1])
        hits = np.arange(100) < good
        report.write(folder / "results.json", {
            "schema": 1, "checkpoint": {"path": "final", "images": 1000}, "config": {}, "data": {"fingerprint": "0"},
            "sampling": {}, "sets": {"training": {"captions": ["a"]}}, "levels": {}, "over_time": [],
            "training_loss": [], "seconds": {}, "notes": [],
            "scores": [scores.rate("caption accuracy, top 1", "training", "pixels", hits)],
        })  # fmt: skip

    monkeypatch.setattr(compare_encoders, "run_script", pretend)

    def called(*words):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["compare_encoders", *map(str, words)])
        code = ""
        try:
            compare_encoders.main()
        except SystemExit as stop:
            code = str(stop.code)
        return "".join(capsys.readouterr()) + code, list(ran)

    called.failing = failing
    return called


THREE = ("quick", "--encoders", "some/bert-50", "some/bert-55", "some/bert-20", "--minutes", "3", "--output", "o")


def test_each_encoder_is_trained_alike_and_evaluated(call):
    said, ran = call(*THREE)
    assert [script for script, _ in ran] == ["train.py", "evaluate.py"] * 3
    trained = [words for script, words in ran if script == "train.py"]
    assert [words[words.index("--encoder") + 1] for words in trained] == list(THREE[2:5])
    assert all(words[words.index("--minutes") + 1] == "3.0" and words[0] == "quick" for words in trained)
    assert len({words[words.index("--output") + 1] for words in trained}) == 3
    table = Path("o/encoders.md").read_text()
    assert table.strip() in said
    rows = [line for line in table.splitlines() if line.startswith("| some")]
    assert [row.split("|")[3].split()[-1] for row in rows] == ["(40.4–59.6)", "(45.2–64.4)", "worse"]
    assert [row.split("|")[2].strip() for row in rows] == ["1,000"] * 3
    assert "held-out loss" not in table  # nothing was held out
    assert call(*THREE)[1] == []  # all is done


def test_what_was_interrupted_goes_on(call):
    call.failing.append(KeyboardInterrupt())
    said, _ = call(*THREE)
    assert "the same command goes on" in said
    _, ran = call(*THREE)
    assert ["--resume" in words for script, words in ran if script == "train.py"] == [True, True, True]


def test_a_folder_is_named_in_full_and_its_variant_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert text_encoder.resolved("mine:words") == f"{tmp_path / 'mine'}:words"
    assert text_encoder.resolved("mine") == str(tmp_path / "mine")
    assert text_encoder.resolved("some/bert@v2:random") == "some/bert@v2:random"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quikc"], "no preset 'quikc'; allowed are quick, cpu"),
        (["quick", "--encoders", "a", "a"], "one or more different"),
        (["quick", "--minutes", "0"], "--minutes 0: allowed are numbers above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words, message):
    said, ran = call(*words)
    assert message in said
    assert ran == []


def test_another_comparison_is_not_mixed_in(call):
    call(*THREE)
    said, ran = call(*THREE, "--samples", "8")
    assert "o holds another comparison (--samples was 256)" in said
    assert ran == []


def test_an_error_of_a_script_stops_the_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train\.py stopped with an error"):
        compare_encoders.run_script("train.py", "quikc")


def test_help_names_the_command_and_needs_nothing_that_loads_slowly(call):
    said, _ = call("--help")
    assert "usage: python -m evaluation.compare_encoders" in said
    code = "import sys, evaluation.compare_encoders, evaluation.plot\n"
    code += "print({'jax', 'pandas', 'flax', 'transformers', 'matplotlib'} & set(sys.modules))"
    root = compare_encoders.ROOT
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"
