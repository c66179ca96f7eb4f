"""The ablation's bookkeeping: what is measured once is not trained again, unless its configuration has changed."""

import dataclasses
import json
import math

import ablation
import jax.numpy as jnp
import numpy as np
import pytest

import schedule


def measured(shift):
    """What a run shows whose error is e^shift at every level of two held-out pictures."""
    return {
        "pictures": 512, "log_error": [[shift] * 10, [1 + shift] * 10],
        "top1": 0.25, "top5": 0.5, "median_rank": 3.0, "own_distance": 40.0,
    }  # fmt: skip


def rows(names):
    """Rows of the table, as if each of these runs had just been measured."""
    configs = ablation.configs(1)
    each = {name: {"config": configs[name].to_json(), **measured(shift)} for name, shift in names.items()}
    return json.loads(json.dumps(each))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_errors_compare_as_those_of_the_velocity(tiny, prediction):
    config = dataclasses.replace(tiny, prediction=prediction)
    noise_schedule, t = schedule.from_config(config), jnp.array([1, 17, 50])
    image, noise, mistake = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5, 2)), jnp.float32)
    alpha, sigma = schedule.mix_at(noise_schedule, t)
    noisy, v = alpha * image + sigma * noise, alpha * noise - sigma * image + mistake
    denoised = alpha * noisy - sigma * v
    eps = (noisy - alpha * denoised) / sigma
    right, predicted = (noise, image, v - mistake), (eps, denoised, v)
    of = ["eps", "x0", "v"].index(prediction)
    losses = np.mean((predicted[of] - right[of]) ** 2, axis=(1, 2, 3))
    expected = np.mean(mistake**2, axis=(1, 2, 3))
    np.testing.assert_allclose(ablation.in_velocity(losses, t, config), expected, rtol=1e-3)


def test_only_the_network_decides_the_pace():
    networks = [network for network, _ in ablation.RUNS.values()]
    assert set(networks) == set(ablation.NETWORKS)
    assert {field for _, changes in ablation.RUNS.values() for field in changes} <= {
        "prediction", "loss_weight", "dropout", "augmentation",
    }  # fmt: skip


def test_runs_see_as_many_pictures_as_their_network_gets_through():
    pace = {name: ablation.NETWORKS[network][0] for name, (network, _) in ablation.RUNS.items()}
    for name, config in ablation.configs(30).items():
        seen = config.epochs * ablation.PICTURES
        assert abs(seen - 1800 * pace[name.removesuffix(", seed 1")]) <= ablation.PICTURES / 2


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
    others = rows({"eps": 1.0})
    ablated.write_text(json.dumps({"1 minutes": rows({"v": 0.0}), "2 minutes": others}))
    trained = []
    monkeypatch.setattr(ablation, "train", lambda output, config, core: trained.append(config))
    monkeypatch.setattr(ablation, "measure", lambda output, core: measured(math.log(2)))
    for _ in range(2):
        ended()
        table = capsys.readouterr().out.splitlines()[-2:]
        assert [row.split(" | ")[:3] for row in table] == [
            ["| v", "512", "1.000 ± 0.000"], ["| eps", "512", "2.000 ± 0.000"],
        ]  # fmt: skip
    assert trained == [ablation.configs(1)["eps"]]
    kept = json.loads(ablated.read_text())
    assert kept["2 minutes"] == others
    assert kept["1 minutes"]["eps"] == rows({"eps": math.log(2)})["eps"]
    assert sum(line.strip().startswith('"config": {') for line in ablated.read_text().splitlines()) == 3


@pytest.mark.parametrize("edit", [{"learning_rate": 1e-3}, {"unknown": 1}, {"epochs": 2}])
def test_an_edited_run_is_trained_anew_in_a_folder_of_its_own(ablated, monkeypatch, capsys, edit):
    before = rows({"v": 0.0, "eps": 0.0})
    before["v"]["config"] |= edit
    ablated.write_text(json.dumps({"1 minutes": before}))
    trained = []
    monkeypatch.setattr(ablation, "train", lambda output, config, core: trained.append(output.name))
    monkeypatch.setattr(ablation, "measure", lambda output, core: measured(1.0))
    ended()
    config = ablation.configs(1)["v"]
    assert trained == [ablation.folder("v", config)]
    assert ablation.folder("v", dataclasses.replace(config, learning_rate=1e-3)) != trained[0]
    assert json.loads(ablated.read_text())["1 minutes"]["v"] == rows({"v": 1.0})["v"]
    assert "| eps | 512 | 0.368 " in capsys.readouterr().out


def test_a_run_that_fails_stops_no_other_and_is_told(ablated, monkeypatch, capsys):
    def train(output, config, core):
        if config == ablation.configs(1)["v"]:
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


def test_the_table_that_is_kept_holds_every_run():
    kept = json.loads(ablation.ROOT.joinpath("benchmarks/ablation.json").read_text())["30 minutes"]
    for name, config in ablation.configs(30).items():
        assert ablation.measured(kept[name], config), name
