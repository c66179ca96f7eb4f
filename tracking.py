"""What a run leaves to be read later: metrics.jsonl always, TensorBoard and Weights & Biases on request.

Each line of metrics.jsonl is about the steps since the line before it. A tracker gets the same line: its numbers become
curves, its lists, which hold one number per noise level, become histograms. Sample grids are images.

A tracker has the methods write, picture and close. It is imported only if it is asked for. If it fails during a run, it
is dropped with a message, and training goes on.
"""

import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from files import dispensable, parsed, replacing

Name = Literal["tensorboard", "wandb"]
Curves, Levels = dict[str, float], dict[str, list[float]]  # of a line; the noise level next to the image comes first


class TrackerError(ValueError):
    """A tracker was asked for that cannot start; the message says what to do."""


class TensorBoard:
    """Event files, shown by `tensorboard --logdir FOLDER`; it hides what an earlier start wrote after `step`."""

    name, package, hint = "tensorboard", "tensorboardX", "is the output folder writable?"

    def __init__(self, output: Path, step: int, config: dict):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread hides its errors, then blocks
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = output / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.event, self.summary = Event, summary
        self.writer = EventsWriter(str(folder / "events"), f".{step}.{uuid.uuid4().hex[:8]}")
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, curves: Curves, levels: Levels) -> None:
        for name, value in curves.items():
            self._add(step, summary=self.summary.scalar(name, value))
        for name, values in levels.items():
            n, total, squares = len(values), sum(values), sum(value * value for value in values)
            limits = [(i + 1) / n for i in range(n)]  # share of T
            self._add(step, summary=self.summary.histogram_raw(name, 0.0, 1.0, n, total, squares, limits, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._add(step, summary=self.summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        self.writer.close()

    def _add(self, step: int, **content) -> None:
        self.writer.write_event(self.event(step=step, wall_time=time.time(), **content))
        self.writer.flush()


class Wandb:
    """A run of Weights & Biases, named after the output folder, where its id is kept, so that a resumed run goes on.

    Its curves are over the value `step`, as wandb's own step cannot go back. WANDB_PROJECT and WANDB_MODE apply.
    """

    name, package, hint = "wandb", "wandb", "run `wandb login`, or set WANDB_MODE=offline to keep the run here"

    def __init__(self, output: Path, step: int, config: dict):
        import wandb

        id_file = output / "wandb-run.txt"
        run_id = id_file.read_text().strip() if step and id_file.exists() else uuid.uuid4().hex[:8]
        self.histogram, self.image = wandb.Histogram, wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "emoji-diffusion"), name=output.name, id=run_id, resume="allow",
            dir=str(output), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("*", step_metric="step")
        id_file.write_text(f"{run_id}\n")

    def write(self, step: int, curves: Curves, levels: Levels) -> None:
        bars = {}
        for name, values in levels.items():
            edges = [i / len(values) for i in range(len(values) + 1)]  # share of T
            bars[name] = self.histogram(np_histogram=(values, edges))
        self.run.log({"step": step, **curves, **bars})

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({"step": step, name: self.image(str(path))})

    def close(self) -> None:
        self.run.finish()


Tracker = TensorBoard | Wandb
TRACKERS = {tracker.name: tracker for tracker in (TensorBoard, Wandb)}


def require(names: Sequence[Name]) -> None:
    """TrackerError where the package of a tracker is not installed; imports nothing."""
    for name in names:
        if importlib.util.find_spec(package := TRACKERS[name].package) is None:
            raise TrackerError(f"--track {name} needs {package}: pip install -r requirements-tracking.txt")


def trackers(names: Sequence[Name], output: Path, *, step: int, config: dict) -> list[Tracker]:
    """The trackers of these names for the run in `output`, new at step 0, else going on; TrackerError if one cannot."""
    started = []
    for name in dict.fromkeys(names):
        try:
            started.append(TRACKERS[name](output, step, config))
        except Exception as error:  # a tracker may raise anything; better now than after an hour
            why = f"{type(error).__name__}: {error}; {TRACKERS[name].hint}"
            raise TrackerError(f"--track {name} cannot start: {why}, or leave out --track") from error
    return started


class MetricsLog:
    """Appends to metrics.jsonl and writes to the trackers; starts by removing lines after `step`, of a run cut off.

    seconds: of training before `step`. pictures: in an epoch.
    """

    def __init__(self, path: Path, step: int, seconds: float, *, pictures: int, B: int, trackers: Sequence = ()):
        kept = ""
        for line in path.read_text(errors="replace").split("\n") if step and path.exists() else ():
            with suppress(ValueError, TypeError, KeyError):  # a line that was cut off, or is not ours
                kept += f"{line}\n" if parsed(line)["step"] <= step else ""
        with replacing(path) as beside:
            beside.write_text(kept)
        self.path, self.pictures, self.B, self.trackers = path, pictures, B, list(trackers)
        self.step, self.reported = step, seconds  # of the last line
        self.began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Time in training steps since the run began, resumptions included, pauses not."""
        return time.perf_counter() - self.began

    def write(self, step: int, metrics, more: Mapping | None = None) -> dict:
        """Add a line for the steps since the last one, from what they report (on the host); returns it.

        `more`: what else is known, numbers or lists of one number per noise level. What is not finite becomes null.
        """
        steps, skipped, seconds = step - self.step, int(metrics.skipped), self.seconds
        line = {
            "step": step,
            "images": step * self.B,
            "epoch": step * self.B / self.pictures,
            "seconds": seconds,
            "loss": _mean(metrics.loss.sum(), metrics.count.sum()),
            "loss_per_level": [*map(_mean, metrics.loss, metrics.count)],
            "grad_norm": _mean(metrics.grad_norm, steps - skipped),
            "images_per_second": steps * self.B / (seconds - self.reported),
            "skipped": skipped,
            **{name: _plain(value) for name, value in (more or {}).items()},
        }
        with dispensable(self.path):
            self._append(json.dumps(line, allow_nan=False) + "\n")
        self.step, self.reported = step, seconds
        levels = {name: [each or 0.0 for each in value] for name, value in line.items() if isinstance(value, list)}
        curves = {name: value for name, value in line.items() if value is not None and name not in {"step", *levels}}
        self._tell(lambda tracker: tracker.write(step, curves, levels))
        return line

    def _append(self, line: str) -> None:
        """Add a line, all of it or, where the disk is full, nothing."""
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError:
            os.truncate(self.path, whole)
            raise

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the trackers a PNG."""
        self._tell(lambda tracker: tracker.picture(step, name, path))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - start

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        with self.paused():
            for tracker in tuple(self.trackers):
                try:
                    tell(tracker)
                except Exception as error:  # whatever a tracker raises is not worth the run
                    self.trackers.remove(tracker)
                    what = f"{tracker.name} failed ({type(error).__name__}: {error}) and is told no more"
                    print(f"\n{what}; training goes on, {self.path} has every line", file=sys.stderr)


def _mean(total: float, count: float) -> float | None:
    return _plain(total / count) if count else None


def _plain(value):
    """A number, or a list of them, as JSON can keep it: null where it is not finite."""
    if isinstance(value, Sequence) or getattr(value, "ndim", 0):
        return [_plain(each) for each in value]
    return float(value) if value is not None and math.isfinite(value) else None
