"""What a run leaves to be read later: metrics.jsonl, one line of means per `log_every` steps."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from files import replacing


class MetricsLog:
    """Appends to a metrics.jsonl; lines past `step`, of a run that was cut off, are dropped first."""

    def __init__(self, path: Path, step: int, seconds: float, *, pictures: int, B: int):
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a line that was cut off
                    kept += [line] if json.loads(line)["step"] <= step else []
        with replacing(path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept))
        self.path, self.pictures, self.B = path, pictures, B
        self.step, self.since = step, time.perf_counter()
        self.began = self.since - seconds

    @property
    def seconds(self) -> float:
        """Time in training steps since the run began, resumptions included, pauses not."""
        return time.perf_counter() - self.began

    def write(self, step: int, records, **more) -> dict:
        """Add a line for the steps since the last one, from their training.Records on the host; returns it."""
        taken = step - self.step
        line = {
            "step": step,
            "images": step * self.B,
            "epoch": step * self.B / self.pictures,
            "seconds": self.seconds,
            "loss": float(records.loss.sum() / records.count.sum()) if records.count.any() else None,
            "loss_per_level": [
                float(loss / count) if count else None for loss, count in zip(records.loss, records.count, strict=True)
            ],
            "grad_norm": float(records.grad_norm / (taken - records.skipped)) if taken > records.skipped else None,
            "skipped": int(records.skipped),
            "images_per_second": taken * self.B / (time.perf_counter() - self.since),
            **more,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.step, self.since = step, time.perf_counter()
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self.since += paused
        self.began += paused
