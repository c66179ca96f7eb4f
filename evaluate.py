"""Measure a checkpoint: does the caption steer the picture? `python evaluate.py [--checkpoint FOLDER]`.

Draws each training caption (up to --samples of them, spread over the data) and looks for the nearest training picture,
by pixel distance. Caption accuracy is the share for which that is the caption's own picture; with the captions
shuffled it must fall to chance.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import device


@dataclass(frozen=True)
class Options:
    checkpoint: Path = Path("models_vA0/final")  # folder written by train.py
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    data: Path | None = None  # dataset, where it is no longer where the checkpoint was trained
    samples: int = 256  # pictures to draw
    c: float = 7.0  # guidance
    steps: int | None = None  # of the sampler; 20 if nothing is said
    seed: int = 0  # the first picture's; each has the next one


def main() -> None:
    device.reserve_memory()
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    import dataset
    from checkpoint import CheckpointError
    from text_encoder import EncoderError

    try:
        evaluate(options)
    except (dataset.DatasetError, CheckpointError, EncoderError, ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")


def evaluate(options: Options) -> None:
    import numpy as np
    from tqdm import tqdm

    import dataset
    import metrics
    from pipeline import DiffusionPipeline
    from sampling import Sampling

    if options.samples < 2:
        raise ValueError(f"--samples {options.samples}: at least 2 are needed")
    pipeline = DiffusionPipeline(options.checkpoint, options.encoder)
    config = pipeline.config
    pictures = dataset.of(config, options.data)
    if pictures.fingerprint != pipeline.about["dataset"]["fingerprint"]:
        print("note: the pictures are not those that the checkpoint was trained on")
    training = np.flatnonzero(~pictures.heldout)
    images, names = pictures.images[training], [pictures.names[row] for row in training]
    own = np.unique(np.linspace(0, len(names) - 1, min(options.samples, len(names))).astype(int))

    drawn = []
    for start in tqdm(range(0, len(own), 16), unit=" batches", disable=None):
        rows = own[start : start + 16]
        seeds = [options.seed + start + i for i in range(len(rows))]
        drawn.append(
            pipeline.generate_arrays(
                [names[row] for row in rows], Sampling(options.c, steps=options.steps), seeds=seeds
            )
        )
    distance = metrics.distances(np.concatenate(drawn), images)
    shuffled = np.random.default_rng(options.seed).permutation(own)

    print(f"{len(own)} captions of {len(names)} training pictures, guidance {options.c:g}")
    print(f"{'':22}{'nearest':>9}{'top 5':>9}{'median rank':>13}")
    for label, rows in (("its own caption", own), ("captions shuffled", shuffled)):
        rank = metrics.ranks(distance, rows)
        print(f"{label:22}{metrics.top(rank, 1):9.1%}{metrics.top(rank, 5):9.1%}{np.median(rank) + 1:13.0f}")
    print(f"{'chance':22}{1 / len(names):9.1%}{min(1, 5 / len(names)):9.1%}{(len(names) + 1) / 2:13.0f}")


if __name__ == "__main__":
    main()
