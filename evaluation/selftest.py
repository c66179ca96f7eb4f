"""Does the code learn, and does text steer the picture? An answer on one's own data in under two minutes.

The network of a run is trained on one batch, a few captioned pictures, until it knows them by heart. Every diffusion
model can do that, so one that cannot has a fault that no longer run will mend. Then two questions follow:

    loss        with the captions shuffled, the pictures must be harder to denoise than with their own, at high noise,
                where the picture itself is hardly visible
    samples     a sample for each caption, all from the same noise, must be nearest to the caption's own picture

From one noise only the captions can tell the samples apart: a network that ignores them makes one picture n times.
Training step, data and sampler are those of a real run; only the batch and the warm-up are shorter.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

import dataloader
import ema
import parallel
import training
from dataset import DatasetError, Pictures, select
from evaluation import heldout, metrics
from evaluation.scores import shuffled, spread
from params import Params, Sampling
from pipeline import DiffusionPipeline
from text_encoder import TextEncoder

PICTURES, CANDIDATES = 8, 512  # learned by heart, and looked at to choose those
SECONDS = 115.0  # of wall clock in all
EVERY = 100  # steps between two looks at the loss
ENOUGH, MOST = 300, 3000  # steps in which a network that can learn has begun to, and has long since
WARMUP = 20  # steps
UNMOVED, FELL = 0.98, 0.9  # share of the first loss that is left
NOTICED, STEERED = 1.01, 8.0  # times the loss at high noise with the captions shuffled; what is ignored gives 1


class Losses(NamedTuple):
    """Of the averaged weights, at the same steps t and with the same noise each time."""

    loss: float
    ratio: float  # how many times as large it is at high noise with the captions shuffled


class Verdict(NamedTuple):
    """What was seen; and once that is judged, what it says of code, data and configuration."""

    pictures: int
    steps: int
    skipped: int  # of the steps, because they were not finite
    seconds: float
    before: Losses
    after: Losses
    own: int = 0  # samples nearest to their own picture; none are made where the loss did not fall
    other: int = 0  # the same with captions shuffled
    alike: bool = False  # whether all captions have the same embedding
    outcome: Literal["PASS", "FAIL", "UNDECIDED", ""] = ""
    why: str = ""  # in plain words, with what to look at

    def __str__(self) -> str:
        return (
            f"{self.pictures} pictures, {self.steps} steps, {self.seconds:.0f} s\n"
            f"loss            {self.before.loss:.3f} → {self.after.loss:.3f}\n"
            f"at high noise   {self.after.ratio:.2f} times as large with captions shuffled\n"
            f"samples         {self.own} nearest to their own picture, {self.other} with captions shuffled\n"
            f"{self.outcome}: {self.why}"
        )


def pick(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str], most: int) -> list[int]:
    """Rows of at most `most` pictures, no caption twice, each as far as can be from those picked before it."""
    first = {captions[row].casefold(): row for row in spread(len(captions), CANDIDATES)[::-1]}
    rows = np.sort(list(first.values()))
    apart = metrics.distances(images[rows], images[rows])
    picked, nearest = [0], apart[0]
    while len(picked) < most and nearest.max() > 1:  # of 255: else they look the same
        picked.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, apart[picked[-1]])
    return sorted(rows[picked].tolist())


def self_test(config: Params, pictures: Pictures, encoder: TextEncoder, *, seconds: float = SECONDS) -> Verdict:
    """Learn a few of the pictures by heart, and judge; DatasetError where there are fewer than two to tell apart."""
    start = time.perf_counter()
    pictures = select(pictures, pick(pictures.images, pictures.names, PICTURES))
    images, captions, n = pictures.images, pictures.names, len(pictures.names)
    if n < 2:
        raise DatasetError(
            "--self_test needs 2 pictures that differ, with captions that differ, and the dataset has none: see "
            "python prepare_dataset.py --check"
        )
    print(f"self-test: learning {n} pictures by heart: {', '.join(captions)}", flush=True)
    devices = parallel.mesh().size
    plain = {"accumulate": 1, "augmentation": 0.0, "dropout": 0.0, "caption_variants": 0.0, "decay": "constant"}
    plain |= {"B": -(-n // devices) * devices, "warmup": min(config.warmup, WARMUP)}  # some pictures may come twice
    config = dataclasses.replace(config, **plain)

    source = dataloader.load(pictures, encoder, config)
    state, key = training.start(config, encoder.dim)
    text = encoder(captions, config.TEXT_LEN)
    measure = build_measure(config, images, text)
    before = after = measure(state.ema.short)
    train_step, update_averages = training.build_train_step(config), ema.build_update(config)
    steps, end = 0, start + seconds
    with tqdm(unit=" steps", leave=False, disable=None) as bar:
        while time.perf_counter() < end and not done(steps, before, after):
            state, loss = train_step(state, *source.at(steps, 1), key)
            loss.block_until_ready()
            steps += 1
            if steps % ema.EVERY == 0:
                state = state._replace(ema=update_averages(state.ema, state.weights, state.step))
            bar.update()
            if steps == 1:  # all of that was compiling; leaves time to compile the sampler, and to sample
                end -= max(10, (time.perf_counter() - start) / 2)
            if steps % EVERY == 0:
                after = measure(state.ema.short)
                bar.set_postfix(loss=f"{after.loss:.3f}", shuffled=f"{after.ratio:.1f} times")

    state = state._replace(ema=update_averages(state.ema, state.weights, state.step))
    after, own, other = measure(state.ema.short), 0, 0
    if after.loss < FELL * before.loss:
        pipeline = DiffusionPipeline.from_weights(config, encoder, parallel.unreplicate(state.ema.short))
        distance = metrics.distances(pipeline.generate_arrays(captions, Sampling(c=1.0), seeds=0), images)
        own, other = (int((metrics.ranks(distance, rows) == 0).sum()) for rows in (np.arange(n), shuffled(range(n))))
    alike, skipped = bool((text[0] == text[0][:1]).all()), int(state.metrics.skipped)
    seen = Verdict(n, steps, skipped, time.perf_counter() - start, before, after, own, other, alike)
    return judge(config, seen)


def build_measure(config: Params, images: np.ndarray, text: tuple) -> Callable[[dict], Losses]:
    """The function measure(weights) -> Losses of these pictures."""
    high = np.flatnonzero(heldout.questions(1, config.T)[0])[-3:]  # levels
    others = (part[shuffled(range(len(images)))] for part in text)
    measure_own = heldout.build_measure(config, images, *text)
    measure_shuffled = heldout.build_measure(config, images, *others)

    def measure(weights: dict) -> Losses:
        weights = parallel.unreplicate(weights)
        own, other = measure_own(weights), measure_shuffled(weights)
        loss, ratio = heldout.per_picture(own, config.T).mean(), other[:, high].mean() / own[:, high].mean()
        return Losses(float(loss), float(ratio))

    return measure


def done(steps: int, before: Losses, after: Losses) -> bool:
    """Whether more steps would change no verdict."""
    share = after.loss / before.loss
    stuck = steps >= ENOUGH and not share < UNMOVED
    return steps >= MOST or stuck or (share < FELL and after.ratio > STEERED)


def judge(config: Params, seen: Verdict) -> Verdict:
    """The outcome and why: the first case that holds."""
    n, steps, skipped, _, before, after, own, other, alike, *_ = seen
    fell, noticed, steered = after.loss < FELL * before.loss, after.ratio > NOTICED, after.ratio > STEERED
    loss, rate = f"loss {before.loss:.2f} → {after.loss:.2f}", f"--learning_rate = {config.learning_rate:g}"
    cause = f"look at --encoder {config.encoder}, --cross_attention, and changes to model.py"
    if config.embedding_dropout > 0.5:
        cause = f"--embedding_dropout = {config.embedding_dropout:g} hides them from training: 0.1 is usual"
    if alike:
        cause = f"the encoder {config.encoder} gives all of them the same numbers: take another --encoder"
    cases = [
        (
            noticed and own > max(n / 2, other), "PASS",
            f"the code learns, and text steers the picture ({own} of {n}, shuffled {other} of {n}; {loss}). If a run "
            "does not learn, look at its data (python prepare_dataset.py --check), --learning_rate and length",
        ),
        (
            skipped > steps / 2, "FAIL",
            f"{skipped} of {steps} steps were not finite and changed nothing. Lower {rate}; if that does not help, the "
            "captions' embeddings or the pictures hold NaN",
        ),
        (
            steps < ENOUGH and not (fell and steered), "UNDECIDED",
            f"only {steps} steps fit into two minutes on this machine ({loss}); {ENOUGH} would say more. Close other "
            "programs, or take a smaller network: python train.py quick --self_test",
        ),
        (
            not fell, "FAIL",
            f"the loss did not fall ({loss} in {steps} steps). Look at {rate} (2e-4 to 1e-3 is usual) and --clip = "
            f"{config.clip:g}; if both are usual, a change to model.py, schedule.py or training.py broke learning: "
            "python -m pytest says where",
        ),
        (
            not noticed and own <= 1, "FAIL",  # one of n, where all samples are the same
            f"the loss fell ({loss}), but captions do not matter; {cause}",
        ),
        (
            steered, "FAIL",
            f"the loss fell ({loss}) and captions matter to it, but the samples do not show them ({own} of {n}). "
            "Training is right, sampling is not: look at changes to samplers.py, guidance.py and sampling.py",
        ),
        (
            True, "UNDECIDED",
            f"captions begin to matter, but {steps} steps were too few for samples that show it ({own} of {n}; "
            f"{loss}). Raise --learning_rate, or train a while and ask python evaluate.py. A network that predicts eps "
            "needs several times the steps of one that predicts v",
        ),
    ]  # fmt: skip
    outcome, why = next((outcome, why) for holds, outcome, why in cases if holds)
    return seen._replace(outcome=outcome, why=why)
