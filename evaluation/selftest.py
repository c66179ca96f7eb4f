"""Does the code learn, and does text steer the picture? An answer on one's own data in under two minutes.

The network of a run is trained on one batch, a few captioned pictures, until it knows them by heart. Every diffusion
model can do that, so one that cannot has a fault that no longer run will mend. Then two questions follow:

    loss        with the captions exchanged, the pictures must be harder to denoise than with their own, at high noise,
                where the picture itself is hardly visible
    drawings    each caption, drawn from one and the same noise, must come out nearest to its own picture

From one noise only the captions can tell the drawings apart: a network that ignores them draws one picture n times.
Training step, data and drawing are those of a real run; only the batch and the warm-up are shorter.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

import dataloader
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
NOTICED, STEERED = 1.01, 8.0  # times the loss at high noise with the captions exchanged; what is ignored gives 1


class Measured(NamedTuple):
    """Loss of the averaged weights; its questions, and the noise in them, are the same each time."""

    loss: float
    own: float  # at high noise, each picture with its own caption
    exchanged: float  # each with another's

    @property
    def ratio(self) -> float:
        return self.exchanged / self.own


class Drawings(NamedTuple):
    own: int  # nearest to the picture of their caption
    exchanged: int  # nearest to the picture that another's caption belongs to


class Evidence(NamedTuple):
    pictures: int
    steps: int
    skipped: int  # of the steps, because they were not finite
    seconds: float
    before: Measured
    after: Measured
    drawings: Drawings | None  # None where the loss did not fall
    alike: bool  # whether all captions have the same embedding


class Verdict(NamedTuple):
    outcome: Literal["PASS", "FAIL", "UNDECIDED"]
    why: str  # in plain words, with what to look at
    evidence: Evidence

    def __str__(self) -> str:
        n, steps, _, seconds, before, after, drawings, _ = self.evidence
        lines = [
            f"{n} pictures, {steps} steps, {seconds:.0f} s",
            f"loss            {before.loss:.3f} → {after.loss:.3f}",
            f"at high noise   {after.own:.3f} with their own captions, {after.exchanged:.3f} with captions shuffled "
            f"({after.ratio:.2f} times)",
        ]
        if drawings:
            lines.append(
                f"drawings        {drawings.own} of {n} nearest to their own picture, "
                f"{drawings.exchanged} of {n} with captions shuffled"
            )
        return "\n".join([*lines, f"{self.outcome}: {self.why}"])


def pick(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str], most: int = PICTURES) -> list[int]:
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
    pictures = select(pictures, pick(pictures.images, pictures.names))
    images, captions, n = pictures.images, pictures.names, len(pictures.names)
    if n < 2:
        raise DatasetError(
            "--self_test needs 2 pictures that differ, with captions that differ, and the dataset has none: see "
            "python prepare_dataset.py --check"
        )
    print(f"self-test: learning {n} pictures by heart: {', '.join(captions)}", flush=True)

    size = parallel.mesh().size
    B = -(-n // size) * size  # on many devices some pictures come twice
    plain = {"accumulate": 1, "augmentation": 0.0, "dropout": 0.0, "caption_variants": 0.0, "decay": "constant"}
    config = dataclasses.replace(config, B=B, warmup=min(config.warmup, WARMUP), **plain)
    init_key, keys = training.streams(config.seed)
    data = dataloader.load(pictures, encoder, config)
    graphdef = training.structure(config, encoder.dim)
    state = training.init(config, encoder.dim, init_key)
    losses = heldout.build_losses(config, graphdef)
    text_emb, text_mask = encoder(captions, config.TEXT_LEN)
    own, others = np.arange(n), shuffled(range(n))
    high = np.flatnonzero(heldout.questions(1, config.T)[0])[-3:]  # levels

    def measure() -> Measured:
        weights, texts = (
            parallel.unreplicate(state.ema.short),
            [(text_emb[who], text_mask[who]) for who in (own, others)],
        )
        each = [heldout.loss_per_level(losses, weights, images, *text, T=config.T) for text in texts]
        loss = heldout.per_picture(each[0], config.T).mean()
        return Measured(float(loss), *(float(some[:, high].mean()) for some in each))

    before = after = measure()
    state, data, keys = parallel.replicate((state, data, keys))
    train_step = training.build_train_step(config, graphdef).lower(state, data, keys).compile()
    steps, ready = 0, time.perf_counter()
    end = start + seconds - max(10, (ready - start) / 2)  # leaves time to compile the drawing, and to draw
    with tqdm(unit=" steps", leave=False, disable=None) as bar:
        while time.perf_counter() < end and not done(steps, before, after):
            state, loss = train_step(state, data, keys)
            loss.block_until_ready()
            steps += 1
            bar.update()
            if steps % EVERY == 0:
                after = measure()
                bar.set_postfix(loss=f"{after.loss:.3f}", shuffled=f"{after.ratio:.1f} times")
    after = measure() if steps % EVERY else after

    drawings = None
    if after.loss < FELL * before.loss:
        pipeline = DiffusionPipeline.from_weights(config, encoder, graphdef, parallel.unreplicate(state.ema.short))
        drawn = pipeline.generate_arrays(captions, Sampling(c=1.0), seeds=0)
        distance = metrics.distances(drawn, images)
        drawings = Drawings(*(int((metrics.ranks(distance, whose) == 0).sum()) for whose in (own, others)))
    alike = bool((text_emb == text_emb[:1]).all())
    skipped, took = int(state.records.skipped), time.perf_counter() - start
    return judged(config, Evidence(n, steps, skipped, took, before, after, drawings, alike))


def done(steps: int, before: Measured, after: Measured) -> bool:
    """Whether more steps would change no verdict."""
    share = after.loss / before.loss
    stuck = steps >= ENOUGH and not share < UNMOVED
    return steps >= MOST or stuck or (share < FELL and after.ratio > STEERED)


def judged(config: Params, evidence: Evidence) -> Verdict:
    """What the evidence says of code, data and configuration, the surest fault first."""
    n, steps, skipped, _, before, after, drawings, alike = evidence
    loss = f"loss {before.loss:.2f} → {after.loss:.2f}"
    fell, steered = after.loss < FELL * before.loss, after.ratio > STEERED
    if drawings and drawings.own > max(n / 2, drawings.exchanged) and after.ratio > NOTICED:
        outcome = "PASS"
        why = (
            f"the code learns, and text steers the picture ({drawings.own} of {n}, shuffled {drawings.exchanged} of "
            f"{n}; {loss}). If a run does not learn, look at its data (python prepare_dataset.py --check), at "
            "--learning_rate and at how long it trains"
        )
    elif skipped > steps / 2:
        outcome = "FAIL"
        why = (
            f"{skipped} of {steps} steps were not finite and changed nothing. Lower --learning_rate = "
            f"{config.learning_rate:g}; if that does not help, the captions' embeddings or the pictures hold NaN"
        )
    elif steps < ENOUGH and not (fell and steered):
        outcome = "UNDECIDED"
        why = (
            f"only {steps} steps fit into two minutes on this machine ({loss}); {ENOUGH} would say more. Close other "
            "programs, or take a smaller network: python train.py quick --self_test"
        )
    elif not fell:
        outcome = "FAIL"
        why = (
            f"the loss did not fall ({loss} in {steps} steps). Look at --learning_rate = {config.learning_rate:g} "
            f"(2e-4 to 1e-3 is usual) and --clip = {config.clip:g}; if both are usual, a change to model.py, "
            "schedule.py or training.py broke learning: python -m pytest says where"
        )
    elif not after.ratio > NOTICED and drawings.own <= 1:  # one of n, where all drawings are the same
        if alike:
            cause = f"the encoder {config.encoder} gives all of them the same numbers: take another --encoder"
        elif config.embedding_dropout > 0.5:
            cause = f"--embedding_dropout = {config.embedding_dropout:g} hides them from training: 0.1 is usual"
        else:
            cause = f"look at --encoder {config.encoder}, --cross_attention, and changes to model.py"
        outcome, why = "FAIL", f"the loss fell ({loss}), but captions do not matter; {cause}"
    elif steered:
        outcome = "FAIL"
        why = (
            f"the loss fell ({loss}) and captions matter to it, but the drawings do not show them ({drawings.own} of "
            f"{n}). Training is right, drawing is not: look at changes to samplers.py, guidance.py and sampling.py"
        )
    else:
        outcome = "UNDECIDED"
        why = (
            f"captions begin to matter, but {steps} steps were too few for drawings that show it ({drawings.own} of "
            f"{n}; {loss}). Raise --learning_rate, or train a while and ask python evaluate.py. "
            "A network that predicts eps needs several times the steps of one that predicts v"
        )
    return Verdict(outcome, why, evidence)
