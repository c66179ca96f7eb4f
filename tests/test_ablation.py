"""The ablation's bookkeeping: what is measured once is not trained again."""

import json
import math

import ablation
import pytest


def measured(shift):
    """What a run shows whose error is e^shift at every level of two held-out pictures."""
    return {
        "pictures": 512, "log_error": [[shift] * 10, [1 + shift] * 10],
        "top1": 0.25, "top5": 0.5, "median_rank": 3.0, "own_distance": 40.0,
    }  # fmt: skip


def test_the_rate_of_every_run_is_known():
    assert {(config.PATCH, config.BASE_DIM) for config in ablation.configs().values()} == set(ablation.PACE)


@pytest.fixture
def ablated(tmp_path, monkeypatch):
    """Run the ablation for a minute a run in an empty folder; the path of what it keeps."""
    monkeypatch.setattr(ablation, "__file__", str(tmp_path / "ablation.py"))
    words = ["--minutes", "1", "--only", "v", "eps", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ablation.py", *words])
    return tmp_path / "ablation.json"


def ended(said=None):
    with pytest.raises(SystemExit) as end:
        ablation.main()
    assert end.value.code == said


def test_a_measured_run_is_only_shown_and_a_new_one_is_kept(ablated, monkeypatch, capsys):
    others = {"eps": measured(1.0)}
    ablated.write_text(json.dumps({"1 minutes": {"v": measured(0.0)}, "2 minutes": others}))
    trained = []
    monkeypatch.setattr(ablation, "train", lambda output, config, minutes, core: trained.append(output.name))
    monkeypatch.setattr(ablation, "measure", lambda output, core: measured(math.log(2)))
    for _ in range(2):
        ended()
        table = capsys.readouterr().out.splitlines()[-2:]
        assert [row.split(" | ")[:3] for row in table] == [
            ["| v", "512", "1.000 ± 0.000"], ["| eps", "512", "2.000 ± 0.000"],
        ]  # fmt: skip
    assert trained == ["eps"]
    assert json.loads(ablated.read_text())["2 minutes"] == others


def test_a_run_that_fails_stops_no_other_and_is_told(ablated, monkeypatch, capsys):
    def train(output, config, minutes, core):
        if output.name == "v":
            raise RuntimeError("stopped")

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "measure", lambda output, core: measured(0.0))
    ended("stopped")
    assert list(json.loads(ablated.read_text())["1 minutes"]) == ["eps"]
    assert "| eps |" in capsys.readouterr().out


def test_a_run_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablation.py", "--only", "w"])
    with pytest.raises(SystemExit, match=r"--only w: allowed are v, "):
        ablation.main()
