"""A run under way: what is due after a step, and what a run writes: metrics, checkpoints and sample grids."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import checkpoint
import parallel
import training
from images import captioned_grid, save_png
from params import Params
from pipeline import DiffusionPipeline
from text_encoder import TextEncoder
from tracking import MetricsLog
from training import Metrics, TrainState

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
    graphdef: nnx.GraphDef
    concepts: int  # in a pass over the data
    about: dict  # what a checkpoint says about the run
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
        """Steps to take in one program: `steps_per_call` at its multiples if nothing is due before that, else 1."""
        inside = range(self.step + 1, self.step + steps_per_call)
        aligned = self.step % steps_per_call == 0 and self.step + steps_per_call <= self.last_step
        return steps_per_call if aligned and not any(self.due(step).logging for step in inside) else 1

    def compile(self, train_step: Callable, *arguments: Any) -> Callable:
        """The program of a training step for arguments of these shapes."""
        print("compiling the training step; the next run reads it from .cache/xla", flush=True)
        with self.paused():
            return train_step.lower(*arguments).compile()

    def paused(self) -> AbstractContextManager:
        """Time that does not count as training."""
        return self.log.paused() if self.log else nullcontext()

    def save(self, state: TrainState, name: str, *, now: bool = False) -> Path:
        """Write a checkpoint: in the background, or before this returns."""
        if self.log:
            epoch = self.step * self.config.B / self.concepts
            about = {**self.about, "epoch": epoch, "step": self.step, "seconds": self.log.seconds}
            with self.paused():
                self.saver.save(self.output / name, training.to_checkpoint(state), about, now=now)
        return self.output / name

    def sample(self, state: TrainState, name: str) -> Path:
        """A grid of the same prompts from the same seeds every time, from the averaged weights."""
        path, prompts = self.grids / f"{name}.png", self.about["prompts"]
        if self.log:
            with self.paused():
                weights = parallel.unreplicate(state.ema.short)
                pipeline = DiffusionPipeline.from_weights(self.config, self.encoder, self.graphdef, weights)
                images = pipeline.generate_arrays(prompts, seeds=range(len(prompts)))
                save_png(captioned_grid(images, prompts, columns=6, cell=96), path)
                self.log.picture(self.step, "samples", path)
        return path

    def report(self, state: TrainState, loss: Any, bar: tqdm, *, heldout: bool) -> tuple[TrainState, str]:
        """Write a line of metrics; gives the state with empty metrics, and a fault if no step succeeds any more.

        `loss` is that of the last step. `heldout`: measure the loss on held-out pictures too.
        """
        rate = self._learning_rate(state.step)
        metrics, loss, rate = jax.device_get((state.metrics, loss, rate))
        fault = self.diagnosis(state, metrics, loss) if metrics.streak >= HOPELESS else ""
        if self.log:
            with self.paused():
                more = self.heldout_loss(parallel.unreplicate(state.ema.short)) if heldout else {}
            line = self.log.write(self.step, metrics, {"learning_rate": rate, **more})
            bar.set_postfix({name: line[name] for name in ("loss", "skipped") if line[name]})
        return state._replace(metrics=parallel.replicate(training.zero_metrics(int(metrics.streak)))), fault

    @cached_property
    def _learning_rate(self) -> Callable:
        """Of the step that led to a step, on the device."""
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
