"""metrics.jsonl, and what the trackers are told; TensorBoard's event files are read back, wandb runs offline."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from damage import UNREADABLE, damaged
from PIL import Image

import tracking
from tracking import MetricsLog

ROOT = Path(__file__).parent.parent
MORE = {"learning_rate": 1e-3, "heldout_loss": np.float32(0.5), "heldout_loss_per_level": np.array([0.25, np.nan])}


def metrics(loss=(3.0, 0.0), count=(6.0, 0.0), grad_norm=1.0, skipped=0):
    """What training reports of some steps, in two noise levels."""
    return SimpleNamespace(
        loss=np.array(loss), count=np.array(count), grad_norm=np.float32(grad_norm), skipped=np.int32(skipped)
    )


class Listener:
    """A tracker that remembers what it was told, and fails when told `deaf_to`."""

    name = "listener"

    def __init__(self, deaf_to=""):
        self.heard, self.deaf_to = [], deaf_to

    def _hear(self, what, *told):
        if what == self.deaf_to:
            raise ConnectionError("no route to host")
        self.heard.append((what, *told))

    def write(self, step, curves, levels):
        self._hear("write", step, curves, levels)

    def picture(self, step, name, path):
        self._hear("picture", step, name, path)

    def close(self):
        self._hear("close")


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_line_has_all_that_is_known_and_the_trackers_hear_it(tmp_path):
    listener = Listener()
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 0.0, pictures=10, B=3, trackers=[listener])
    line = log.write(4, metrics(skipped=2), MORE)
    log.picture(4, "samples", tmp_path / "a.png")
    log.close()
    assert lines(log.path) == [line]
    assert (line["grad_norm"], line["skipped"], line["learning_rate"]) == (0.5, 2, 1e-3)  # of the two finite steps
    assert (line["heldout_loss"], line["heldout_loss_per_level"]) == (0.5, [0.25, None])
    levels = {"loss_per_level": [0.5, 0.0], "heldout_loss_per_level": [0.25, 0.0]}
    curves = {name: value for name, value in line.items() if name not in ("step", *levels)}
    assert listener.heard == [("write", 4, curves, levels), ("picture", 4, "samples", tmp_path / "a.png"), ("close",)]


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 0.0, pictures=10, B=3, trackers=[listener := Listener()])
    log.write(2, metrics((0.0, 0.0), (0.0, 0.0), 0.0, skipped=2), {"heldout_loss": float("inf")})
    (line,) = lines(log.path)
    assert (line["loss"], line["grad_norm"], line["heldout_loss"]) == (None, None, None)
    assert not {"loss", "grad_norm", "heldout_loss"} & listener.heard[0][2].keys()


@pytest.mark.parametrize("fault", ["write", "picture", "close"])
def test_a_tracker_that_fails_is_dropped_with_a_word_and_the_others_go_on(tmp_path, capsys, fault):
    deaf, other = Listener(fault), Listener()
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 0.0, pictures=10, B=3, trackers=[deaf, other])
    for step in (2, 4):
        log.write(step, metrics())
        log.picture(step, "samples", tmp_path)
    log.close()
    said = capsys.readouterr().err
    assert said.count("listener failed (ConnectionError: no route to host)") == 1
    assert "training goes on" in said
    assert [told[0] for told in other.heard] == ["write", "picture"] * 2 + ["close"]
    assert len(lines(log.path)) == 2


def test_lines_that_cannot_be_written_are_said_once_and_leave_nothing_torn(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", 0, 0.0, pictures=10, B=3, trackers=[listener := Listener()])
    log.write(2, metrics())
    before, limits = log.path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
        for step in 4, 6:
            log.write(step, metrics())
            assert log.path.read_text() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(8, metrics())
    assert [line["step"] for line in lines(log.path)] == [2, 8]
    assert [told[1] for told in listener.heard] == [2, 4, 6, 8]
    assert capsys.readouterr().err == f"\n{log.path} cannot be written (File too large); going on without it\n"


def test_what_trackers_take_is_no_training_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])

    class Slow(Listener):
        def write(self, step, curves, levels):
            now[0] += 50

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 7.0, pictures=10, B=3, trackers=[Slow()])
    now[0] += 2
    assert log.write(4, metrics())["seconds"] == 9
    with log.paused():
        now[0] += 20
    assert log.seconds == 9
    now[0] += 1
    assert log.write(6, metrics())["images_per_second"] == 6


def events(folder):
    """The events of every file in a TensorBoard folder, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        left = path.read_bytes()
        while left:
            (size,) = struct.unpack("<Q", left[:8])
            found.append(Event.FromString(left[12 : 12 + size]))
            left = left[12 + size + 4 :]
    return found


def test_tensorboard_has_curves_bars_and_pictures_and_goes_on_where_the_run_does(tmp_path):
    grid = tmp_path / "grid.png"
    Image.new("RGB", (12, 8), "red").save(grid)
    for start, steps in (0, (2, 4)), (2, (4,)):
        (board,) = tracking.trackers(["tensorboard"], tmp_path, step=start, config={})
        for step in steps:
            board.write(step, {"loss": 0.5 / step}, {"loss_per_level": [0.5, 0.25]})
            board.picture(step, "samples", grid)
        board.close()
    found = events(tmp_path / "tensorboard")
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [1, 3]  # what is newer than the checkpoint is hidden
    values = [(event.step, value) for event in found for value in event.summary.value]
    assert [(step, value.tag) for step, value in values[:3]] == [(2, "loss"), (2, "loss_per_level"), (2, "samples")]
    assert values[0][1].simple_value == 0.25
    bars = values[1][1].histo
    assert (list(bars.bucket), list(bars.bucket_limit), bars.min, bars.max) == ([0.5, 0.25], [0.5, 1.0], 0, 1)
    assert (values[2][1].image.height, values[2][1].image.width) == (8, 12)
    assert [step for step, _ in values] == [2] * 3 + [4] * 6


def test_wandb_goes_on_with_the_run_that_the_folder_remembers(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        import tracking
        Path("grid.png").write_bytes(Path(sys.argv[1]).read_bytes())
        for start in 0, 2, 0:
            (tracker,) = tracking.trackers(["wandb"], Path("run"), step=start, config={"B": 3 + start})
            tracker.write(start + 2, {"loss": 0.5}, {"loss_per_level": [0.5, 0.25]})
            tracker.picture(start + 2, "samples", Path("grid.png"))
            print("kept", Path("run/wandb-run.txt").read_text().strip(), tracker.run.id, tracker.run.config["B"])
            tracker.close()
    """
    grid = tmp_path / "a.png"
    Image.new("RGB", (12, 8), "red").save(grid)
    (tmp_path / "run").mkdir()
    offline = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(grid)], cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second, third = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("kept"))
    assert first[0] == first[1] == second[0] == second[1] != third[0] == third[1]
    assert (first[2], second[2]) == ("3", "5")
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert sorted(path.stem.removeprefix("run-") for path in runs) == sorted([first[0], first[0], third[0]])
    assert all(len(list(path.parent.glob("files/media/images/*.png"))) == 1 for path in runs)


def test_a_resumed_run_keeps_the_whole_lines_up_to_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 6}\n{"step": 4}\n{"step"\n{"step": 3}')
    MetricsLog(path, 4, 0.0, pictures=10, B=3).write(6, metrics())
    assert [line["step"] for line in lines(path)] == [2, 4, 3, 6]
    MetricsLog(path, 0, 0.0, pictures=10, B=3)
    assert lines(path) == []


def test_a_resumed_run_passes_over_lines_of_any_other_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = [json.dumps(line) for line in damaged({"step": 2})] + [text for text in UNREADABLE if text != "\xff"]
    path.write_bytes("\n".join(['{"step": 1}', *odd, '{"step": 3}']).encode() + b"\n\xff\n")
    MetricsLog(path, 4, 0.0, pictures=10, B=3).write(6, metrics())
    found = [line["step"] for line in lines(path)]
    assert found[0] == 1
    assert found[-2:] == [3, 6]


def test_a_tracker_that_is_not_installed_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in "tensorboard", "wandb":
        with pytest.raises(ValueError, match=rf"--track {name} needs .*: pip install -r requirements-tracking\.txt"):
            tracking.require([name])


def test_a_tracker_that_cannot_start_says_why_before_training(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ValueError, match=r"--track tensorboard cannot start: FileExistsError: .*leave out --track"):
        tracking.trackers(["tensorboard"], tmp_path, step=0, config={})


def test_trackers_are_imported_only_where_they_are_chosen():
    code = "import sys, tracking; tracking.require(['tensorboard', 'wandb']); "
    code += "print(tracking.trackers([], None, step=0, config={}), {'tensorboardX', 'wandb'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "[] set()\n"
