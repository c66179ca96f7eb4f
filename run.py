"""A run: how it starts or goes on, what is due after a step, and the metrics, checkpoints and grids that it writes."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import checkpoint
import dataset
import ema
import files
import parallel
import schedule
import tracking
import training
from dataset import Pictures
from evaluation import heldout
from evaluation.scores import spread
from images import captioned_grid, save_png
from params import Params
from pipeline import DiffusionPipeline
from text_encoder import TextEncoder
from tracking import MetricsLog
from training import Metrics, TrainState

SAMPLES = 12  # pictures in a grid
HOPELESS = 3  # steps in a row whose loss or gradient is not finite


class Due(NamedTuple):
    """What follows a step."""

    epoch: int  # whole passes up to here
    sampling: bool  # a grid
    saving: bool  # a checkpoint
    logging: bool  # a line of metrics


@dataclass
class Run:
    config: Params
    output: Path  # folder of the checkpoints and metrics.jsonl
    grids: Path  # folder of the sample grids
    encoder: TextEncoder
    concepts: int  # in a pass over the data
    about: dict  # what a checkpoint says about the run
    key: jax.Array  # of all steps
    heldout_loss: Callable[[dict], dict]
    step: int  # taken so far
    log: MetricsLog | None  # None where another process is the main one
    saver: checkpoint.Saver | None = None  # of the loop

    @property
    def last_step(self) -> int:
        return -(-self.config.epochs * self.concepts // self.config.B)

    def due(self, step: int) -> Due:
        """What follows this step. It depends on the step alone, so that a resumed run does the same."""
        epoch, before = (i * self.config.B // self.concepts for i in (step, step - 1))
        sampling, saving = (epoch // n > before // n for n in (self.config.sample_every, self.config.save_every))
        logging = step % self.config.log_every == 0 or sampling or saving or step == self.last_step
        return Due(epoch, sampling, saving, logging)

    def steps_in_call(self, steps_per_call: int) -> int:
        """Steps to take in one program: `steps_per_call` at its multiples, if nothing is due in between, else 1."""
        inside = range(self.step + 1, self.step + steps_per_call)
        aligned = self.step % steps_per_call == 0 and self.step + steps_per_call <= self.last_step
        return steps_per_call if aligned and not any(self.due(step).logging for step in inside) else 1

    def compile(self, train_step: Callable, *arguments: Any) -> Callable:
        """The program of a training step for arguments of these shapes."""
        print(f"compiling the training step; the next run reads it from {files.CACHE / 'xla'}", flush=True)
        with self.log.paused() if self.log else nullcontext():
            program = train_step.lower(*arguments).compile()
            files.trim_memory()  # a quarter of a gigabyte, of `quick`
        return program

    def start_from(self, state: TrainState, network: Path) -> TrainState:
        """The state before the first step, with the averaged weights of another network in the place of random ones."""
        given = DiffusionPipeline(network, self.encoder)
        parallel.check_equal(start_from=given.hash)
        self.about["started_from"] = given.hash
        print(f"starting with the averaged weights of {network}, {given.hash[:12]}…")
        weights, averages = parallel.replicate((given.weights, ema.start(given.weights)))
        return state._replace(weights=weights, ema=averages)

    def save(self, state: TrainState, name: str, *, now: bool = False) -> Path:
        """Write a checkpoint: in the background, or before this returns."""
        if self.log:
            epoch = self.step * self.config.B / self.concepts
            about = {**self.about, "epoch": epoch, "step": self.step, "seconds": self.log.seconds}
            with self.log.paused():
                self.saver.save(self.output / name, training.to_checkpoint(state), about, now=now)
        return self.output / name

    def rescue(self, state: TrainState, update_averages: Callable) -> None:
        """Save before an error ends the run, if that is still possible: what broke a step took its arrays with it."""
        if not self.log:
            return
        try:
            averages = update_averages(state.ema, state.weights, state.step)
            path = self.save(state._replace(ema=averages), "stopped", now=True)
        except Exception as error:
            print(f"\nthe state of step {self.step} could not be saved: {error}", file=sys.stderr)
        else:
            print(f"\nan error ends the run; {path} was written before, and --resume goes on from it", flush=True)

    def sample(self, state: TrainState, name: str) -> Path | None:
        """A grid of the same prompts from the same seeds every time, from averaged weights; None if not written."""
        path, prompts = self.grids / f"{name}.png", self.about["prompts"]
        if self.log:
            with files.dispensable(self.grids), self.log.paused():
                weights = parallel.unreplicate(state.ema.short)
                unseen = self.about["unseen"]
                pipeline = DiffusionPipeline.from_weights(self.config, self.encoder, weights, unseen=unseen)
                images = pipeline.generate_arrays(prompts, seeds=range(len(prompts)))
                save_png(captioned_grid(images, pipeline.titles(prompts), columns=6, cell=96), path)
                self.log.picture(self.step, "samples", path)
                return path
        return None

    def report(self, state: TrainState, loss: Any, bar: tqdm, *, heldout: bool) -> tuple[TrainState, str]:
        """Write a line of metrics; gives the state with empty metrics, and a fault if no step succeeds any more.

        `loss` is that of the last step. `heldout`: measure the loss on held-out pictures too.
        """
        rate = self._learning_rate(state.step)
        metrics, loss, rate = jax.device_get((state.metrics, loss, rate))
        fault = self.diagnosis(state, metrics, loss) if metrics.streak >= HOPELESS else ""
        if self.log:
            with self.log.paused():
                more = self.heldout_loss(parallel.unreplicate(state.ema.short)) if heldout else {}
            line = self.log.write(self.step, metrics, {"learning_rate": rate, **more})
            bar.set_postfix({name: line[name] for name in ("loss", "skipped") if line[name]}, refresh=False)
        return state._replace(metrics=parallel.replicate(training.zero_metrics(int(metrics.streak)))), fault

    @cached_property
    def _learning_rate(self) -> Callable:
        """Rate of the last step, on the device; exact where no step was skipped."""
        rate = training.learning_rate(self.config, self.last_step)
        return jax.jit(lambda step: rate(step - 1))

    def diagnosis(self, state: TrainState, metrics: Metrics, loss: Any) -> str:
        """What is known of steps that were skipped because they were not finite, and what to do about it."""
        largest = max(float(np.abs(leaf).max(initial=0)) for leaf in jax.device_get(jax.tree.leaves(state.weights)))
        where = "their gradient, while the loss was finite"
        cure = "python -m pytest says whether a change broke the network"
        if self.config.compute == "bfloat16":
            cure = "--compute float32 rounds less"
        if not np.isfinite(loss):
            where, cure = "their loss already", "look for captions or pictures that are broken"
        return (
            f"train.py: up to step {self.step}, {metrics.streak} steps in a row were not finite, {where}, and changed "
            f"no weight (the largest is {largest:.3g}). Lower --learning_rate or --clip; if it comes back, {cure}"
        )


def start(
    config: Params, output: Path, newest: Path | None, encoder: TextEncoder, pictures: Pictures, track: tuple[str, ...]
) -> tuple[Run, TrainState]:
    """The run and its state, new or as `newest` left them; raises CheckpointError where that is of other data."""
    shown, unseen = (dataset.side(pictures, heldout=side) for side in (False, True))
    state, key = training.start(config, encoder.dim)
    about = {
        "version": training.VERSION,
        "config": config.to_json(),
        "encoder": encoder.identity,
        "schedule": {"name": schedule.NAME, "T": config.T},
        "dataset": {"fingerprint": pictures.fingerprint, "pictures": len(shown.names)},
        "prompts": example_prompts(shown.names, unseen.names),
    }
    step, seconds = 0, 0.0
    if newest is not None:
        saved = checkpoint.about(newest)
        for part in ("schedule", "encoder", "dataset"):
            if saved[part] != about[part]:
                what = f"the {part} of {newest} was {saved[part]}, now it is {about[part]}"
                raise checkpoint.CheckpointError(f"--resume: {what}; train a new run with --output FOLDER")
        step, seconds = saved["step"], saved["seconds"]
        restored = checkpoint.restore(newest, training.to_checkpoint(state))
        state = parallel.replicate(training.from_checkpoint(restored))
        about |= {part: saved[part] for part in ("prompts", "started_from") if part in saved}
        print(f"resumed from {newest}, step {step}, with its configuration instead of a preset's")
    heldout_names = set(unseen.names)
    about["unseen"] = [prompt for prompt in about["prompts"] if prompt in heldout_names]
    parallel.check_equal(**{part: about[part] for part in ("config", "encoder", "dataset")}, step=step)

    files.trim_memory()
    concepts, log = len(set(shown.indexes)), None
    if parallel.is_main():
        trackers = tracking.trackers(track, output, step=step, config=config.to_json())
        path = output / "metrics.jsonl"
        log = tracking.MetricsLog(path, step, seconds, pictures=concepts, B=config.B, trackers=trackers)
    run = Run(
        config, output, grid_folder(output), encoder, concepts, about, key,
        heldout.build_monitor(config, unseen, encoder), step, log,
    )  # fmt: skip
    return run, state


def example_prompts(captions: list[str], heldout: list[str]) -> list[str]:
    """Captions for the sample grids, spread over the data: three in four trained on, the others held out."""
    unseen = [heldout[row] for row in spread(len(heldout), SAMPLES // 4)]
    return [captions[row] for row in spread(len(captions), SAMPLES - len(unseen))] + unseen


def grid_folder(output: Path) -> Path:
    """Where the sample grids of a run go: beside those of others, or into its own folder if that may not be written."""
    folder = Path("validation_images", "-".join(part for part in output.parts if part.strip("/.")) or "run")
    try:
        files.writable(folder)
    except OSError:
        return output / "grids"
    return folder
