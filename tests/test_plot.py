"""The picture of runs side by side: what is in it, and what is refused."""

import json
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from evaluation import plot


def write(folder, *, n=40, heldout_every=0, loss=0.9):
    folder.mkdir(parents=True)
    lines = []
    for i in range(1, n + 1):
        now = loss * i**-0.5
        line = {"step": i, "images": 8 * i, "loss": now, "loss_per_level": [now, None, 2 * now]}
        if heldout_every and i % heldout_every == 0:
            line |= {"heldout_loss": 1.1 * now, "heldout_loss_per_level": [1.1 * now, None, 3 * now]}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that plot() draws, which it would close."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


def dashed(axes):
    return [line for line in axes.lines if line.is_dashed()]


def test_runs_are_side_by_side_and_heldout_losses_dashed_in_their_colours(tmp_path, figures):
    runs = write(tmp_path / "a", heldout_every=10), write(tmp_path / "b", n=60)
    output = tmp_path / "new" / "curves.png"
    plot.plot(plot.Options(runs, output))
    with Image.open(output) as picture:
        assert picture.size == (1200, 432)
    (figure,) = figures
    curves, levels = figure.axes
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == [str(runs[0]), str(runs[1]), "held-out pictures"]
    (held, _), (held_levels,) = dashed(curves), dashed(levels)  # the other is of the legend
    np.testing.assert_allclose(held.get_xdata(), [80, 160, 240, 320])
    assert held.get_color() == held_levels.get_color() == curves.lines[0].get_color() != curves.lines[3].get_color()
    np.testing.assert_allclose(held_levels.get_xdata(), [1 / 6, 1 / 2, 5 / 6])
    np.testing.assert_allclose(held_levels.get_ydata(), 0.9 * 40**-0.5 * np.array([1.1, np.nan, 3]))
    last = 0.9 * np.mean(np.arange(55, 61) ** -0.5)
    np.testing.assert_allclose(levels.lines[-1].get_ydata(), last * np.array([1, np.nan, 2]))
    pale, smooth = curves.lines[3:5]
    np.testing.assert_allclose(pale.get_ydata(), 0.9 * np.arange(1, 61) ** -0.5)
    np.testing.assert_allclose(smooth.get_ydata()[30], pale.get_ydata()[28:33].mean(), rtol=1e-2)


def test_without_heldout_losses_nothing_is_dashed(tmp_path, figures):
    plot.plot(plot.Options((write(tmp_path / "a", n=1),), tmp_path / "a.png"))
    curves, levels = figures[0].axes
    assert not dashed(curves) + dashed(levels)
    assert len(curves.get_legend().get_texts()) == 1


def test_a_line_without_a_loss_leaves_a_gap(tmp_path, figures):
    run = write(tmp_path / "a", n=3)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.9', '"loss": null', 1))
    plot.plot(plot.Options((run,), tmp_path / "a.png"))
    assert np.isnan(figures[0].axes[0].lines[0].get_ydata()).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": 8, "loss"', r"metrics.jsonl line 2 is not JSON .*; delete that line"),
        ('{"images": 8, "loss": 1}', "metrics.jsonl line 2 has no 'loss_per_level': another version wrote it"),
        (None, "metrics.jsonl has no lines yet"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, text, message):
    run = write(tmp_path / "a", n=1)
    path = run / "metrics.jsonl"
    path.write_text("" if text is None else path.read_text() + text)
    with pytest.raises(ValueError, match=message):
        plot.read(run)


def test_no_run_and_no_folder_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name at least one folder"):
        plot.plot(plot.Options(()))
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"plot: there is no .*metrics\.jsonl: name the --output folder"):
        plot.main()
