"""What a run leaves to be read later: metrics.jsonl always, TensorBoard and Weights & Biases where they are chosen.

A line of metrics.jsonl tells of the steps since the line before. To a tracker its numbers are curves, and its lists,
which hold one number per noise level, are bars; sample grids are pictures. A tracker is a guest: it is imported only
where it is chosen, and one that fails while a run goes on is dropped with a word, for the run matters more.
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
from typing import Literal, Protocol

from files import replacing

Name = Literal["tensorboard", "wandb"]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class TrackerError(ValueError):
    """A tracker was asked for that cannot start; the message says what to do."""


class Tracker(Protocol):
    """Somewhere to look at a run while it trains. Whatever it raises, it is not asked again."""

    name: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def levels(self, step: int, name: str, values: list[float]) -> None:
        """One number per noise level, the image side first."""

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files; `tensorboard --logdir FOLDER` shows them, and nothing that an earlier start wrote past `step`."""

    name = "tensorboard"

    def __init__(self, folder: Path, step: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread hides its errors, then blocks
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self.event, self.summary = Event, summary
        self.writer = EventsWriter(str(folder / "events"), f".{step}.{uuid.uuid4().hex[:8]}")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self.summary.scalar(name, value))

    def levels(self, step: int, name: str, values: list[float]) -> None:
        n = len(values)
        limits = [(i + 1) / n for i in range(n)]  # share of T
        bars = self.summary.histogram_raw(name, 0.0, 1.0, n, sum(values), sum(v * v for v in values), limits, values)
        self._write(step, summary=bars)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._write(step, summary=self.summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        self.writer.close()

    def _write(self, step: int, **what) -> None:
        self.writer.write_event(self.event(step=step, wall_time=time.time(), **what))
        self.writer.flush()


class Wandb:
    """A run of Weights & Biases, named after the output folder, which keeps its id for a resumption.

    Its curves are drawn over `step`, which may go back when a run resumes from a checkpoint: wandb takes that from an
    ordinary value, where its own step would drop the lines. WANDB_PROJECT, WANDB_MODE and the like apply.
    """

    name = "wandb"

    def __init__(self, output: Path, step: int, config: dict):
        import wandb

        kept = output / "wandb-run.txt"
        identity = kept.read_text().strip() if step and kept.exists() else uuid.uuid4().hex[:8]
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "emoji-diffusion"),
            name=output.name,
            id=identity,
            resume="allow",
            dir=str(output),
            settings=wandb.Settings(console="off"),
        )
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("*", step_metric="step")
        kept.write_text(f"{identity}\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def levels(self, step: int, name: str, values: list[float]) -> None:
        edges = [i / len(values) for i in range(len(values) + 1)]  # share of T
        self.run.log({"step": step, name: self.wandb.Histogram(np_histogram=(values, edges))})

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({"step": step, name: self.wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


def require(names: Sequence[Name]) -> None:
    """TrackerError where the package of a tracker is not installed; imports nothing."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise TrackerError(f"--track {name} needs {PACKAGES[name]}: pip install -r requirements-tracking.txt")


def trackers(names: Sequence[Name], output: Path, *, step: int, config: dict) -> list[Tracker]:
    """The chosen trackers of the run in `output`, begun anew at step 0; TrackerError if one cannot."""
    require(names)
    start = {
        "tensorboard": lambda: TensorBoard(output / "tensorboard", step),
        "wandb": lambda: Wandb(output, step, config),
    }
    help = {
        "tensorboard": "is the output folder writable?",
        "wandb": "run `wandb login`, or set WANDB_MODE=offline to keep the run here",
    }
    started = []
    for name in dict.fromkeys(names):
        try:
            started.append(start[name]())
        except Exception as error:  # a tracker may raise anything; better now than after an hour
            raise TrackerError(
                f"--track {name} cannot start: {type(error).__name__}: {error}; {help[name]}, or leave out --track"
            ) from error
    return started


class MetricsLog:
    """Appends to a metrics.jsonl and tells the trackers; lines past `step`, of a run that was cut off, go first."""

    def __init__(
        self, path: Path, step: int, seconds: float, *, pictures: int, B: int, trackers: Sequence[Tracker] = ()
    ):
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a line that was cut off
                    kept += [line] if json.loads(line)["step"] <= step else []
        with replacing(path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept))
        self.path, self.pictures, self.B, self.trackers = path, pictures, B, list(trackers)
        self.step, self.since = step, time.perf_counter()
        self.began = self.since - seconds

    @property
    def seconds(self) -> float:
        """Time in training steps since the run began, resumptions included, pauses not."""
        return time.perf_counter() - self.began

    def write(self, step: int, records, more: Mapping | None = None) -> dict:
        """Add a line for the steps since the last one, from their training.Records on the host; returns it.

        `more` is what else is known at this step, numbers or lists of one number per noise level: learning_rate,
        heldout_loss, heldout_loss_per_level. What is not finite is written as null.
        """
        steps, skipped = step - self.step, int(records.skipped)
        line = {
            "step": step,
            "images": step * self.B,
            "epoch": step * self.B / self.pictures,
            "seconds": self.seconds,
            "loss": _mean(records.loss.sum(), records.count.sum()),
            "loss_per_level": list(map(_mean, records.loss, records.count)),
            "grad_norm": _mean(records.grad_norm, steps - skipped),
            "images_per_second": steps * self.B / (time.perf_counter() - self.since),
            "skipped": skipped,
            **{name: _plain(value) for name, value in (more or {}).items()},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.step, self.since = step, time.perf_counter()
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self._tell(lambda tracker: tracker.scalars(step, numbers))
        for name, value in line.items():
            if isinstance(value, list):
                bars = [level or 0.0 for level in value]
                self._tell(lambda tracker, name=name, bars=bars: tracker.levels(step, name, bars))
        return line

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the trackers a PNG."""
        self._tell(lambda tracker: tracker.picture(step, name, path))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self.since += paused
        self.began += paused

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        with self.paused():
            for tracker in tuple(self.trackers):
                try:
                    tell(tracker)
                except Exception as error:  # whatever a tracker raises is not worth the run
                    self.trackers.remove(tracker)
                    print(
                        f"\n{tracker.name} failed ({type(error).__name__}: {error}) and is told no more; "
                        f"training goes on, {self.path} has every line",
                        file=sys.stderr,
                    )


def _mean(total: float, count: float) -> float | None:
    return _plain(total / count) if count else None


def _plain(value):
    """A number, or a list of them, as JSON can keep it: null where it is not finite."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Sequence) or getattr(value, "ndim", 0):
        return [_plain(each) for each in value]
    return float(value) if math.isfinite(value) else None
