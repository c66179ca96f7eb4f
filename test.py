"""Draw with a trained checkpoint: `python test.py [--prompts "red heart" "cat face" …]`.

Without prompts, draws the examples that the checkpoint carries: captions it was trained on, then captions it has
never seen. Writes a captioned grid and each picture into one folder.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import device


@dataclass(frozen=True)
class Options:
    checkpoint: Path = Path("models_vA0/final")  # folder written by train.py
    prompts: tuple[str, ...] = ()  # what to draw
    c: float = 7.0  # guidance: 1 follows the caption as learned, more insists on it
    steps: int | None = None  # of the sampler; 25 if nothing is said
    seed: int = 0  # of every picture's noise
    size: int = 128  # side of the pictures in the grid, pixels
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    output: Path = Path("validation_images/test")  # folder of grid.png and the single pictures


def main() -> None:
    device.reserve_memory()
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    from checkpoint import CheckpointError
    from text_encoder import EncoderError

    try:
        draw(options)
    except (CheckpointError, EncoderError, ValueError, OSError) as error:
        sys.exit(f"test.py: {error}")


def draw(options: Options) -> None:
    from grids import captioned_grid, save_png
    from pipeline import DiffusionPipeline

    if not 8 <= options.size <= 2048:
        raise ValueError(f"--size {options.size}: allowed are whole numbers of pixels from 8 to 2048")
    pipeline = DiffusionPipeline(options.checkpoint, options.encoder)
    prompts = list(options.prompts or pipeline.about["prompts"])
    start = time.perf_counter()
    images = pipeline.generate_images(prompts, c=options.c, steps=options.steps, seeds=options.seed)
    seconds = time.perf_counter() - start
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True), 1):
        name = re.sub(r"\W+", "_", prompt).strip("_")[:60]
        save_png(image, options.output / f"{number:02}_{name}.png", {"prompt": prompt, "seed": options.seed})
    grid = captioned_grid(images, prompts, columns=6, cell=options.size)
    save_png(grid, options.output / "grid.png", None)
    print(f"{options.output / 'grid.png'} and {len(prompts)} pictures beside it written; {seconds:.1f} s to draw them")


if __name__ == "__main__":
    main()
