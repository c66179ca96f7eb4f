"""Draw with a trained checkpoint: `python test.py [--prompts "red heart" "cat face" …]`.

Without prompts, draws the examples that the checkpoint carries: captions it was trained on, then captions it has
never seen. Writes a captioned grid and each picture into one folder; a picture's PNG says how it was drawn.

    python test.py --prompts "cat face" --c 3 --sampler ddpm      other choices (all are below)
    python test.py --prompts "cat face" --to "dog face"           from one prompt to another, a strip and a GIF
    python test.py --prompts "cat face" --animate                 the drawing itself, as a GIF
    python test.py --prompts "cat face" --image me.png            a picture redrawn; with --mask, in part
    python test.py --sweep_c 1 3 7 --sweep_steps 5 10 20          guidance against steps
    python test.py --like validation_images/test/01_cat_face.png  the same picture again
"""

import dataclasses
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from files import writable
from params import Sampling


@dataclass(frozen=True)
class Options:
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    checkpoint: Path = Path("models_vA0/final")  # folder written by train.py
    ema: Literal["short", "long"] = "short"  # which average of the weights draws
    guide: Path | None = None  # an earlier or smaller checkpoint to steer away from, instead of the empty caption
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    prompts: tuple[str, ...] = ()  # what to draw
    seed: int = 0  # of every picture's noise
    size: int = 128  # side of the pictures in grids and GIFs, pixels
    output: Path = Path("validation_images/test")  # folder of grid.png and the single pictures
    image: Path | None = None  # a picture to start from
    strength: float | None = None  # share of the way from noise that is drawn anew, 0 … 1; 0.6, or with a mask 1
    mask: Path | None = None  # grey picture: white is drawn anew, black keeps the pixels of --image exactly
    to: str | None = None  # a second prompt: draw the way from the first one to it
    to_seed: int | None = None  # a second seed: draw the way from the first one to it
    frames: int = 8  # pictures on such a way
    animate: bool = False  # write a GIF of the drawing of each picture
    like: Path | None = None  # draw this PNG again
    sweep_c: tuple[float, ...] = ()  # a grid of these guidances …
    sweep_steps: tuple[int, ...] = ()  # … against these numbers of steps


def main() -> None:
    from_flags = (tyro.conf.FlagCreatePairsOff,)
    try:
        options = tyro.cli(Options, description=__doc__, use_underscores=True, config=from_flags)
    except ValueError as error:  # of Sampling, which says which field is wrong and what is allowed
        sys.exit(f"test.py: {error}")
    import parallel
    from checkpoint import CheckpointError
    from text_encoder import EncoderError

    parallel.setup()
    try:
        print(draw(options))
    except (CheckpointError, EncoderError, ValueError, OSError) as error:
        sys.exit(f"test.py: {error}")


def draw(options: Options) -> str:
    """Do what the options ask for; what was written where."""
    one_thing_at_a_time(options)
    if not 8 <= options.size <= 2048:
        raise ValueError(f"--size {options.size}: allowed are whole numbers of pixels from 8 to 2048")
    if options.image is None and (options.mask or options.strength is not None):
        raise ValueError("--mask and --strength are about a picture to start from: name it with --image")
    writable(options.output)
    from pipeline import DiffusionPipeline, Edit

    pipeline = DiffusionPipeline(options.checkpoint, options.encoder, ema=options.ema, guide=options.guide)
    edit = options.image and Edit(options.image, options.strength, options.mask)
    if options.like:
        return again(pipeline, options, edit)
    prompts = list(options.prompts or pipeline.about["prompts"])
    if options.to is not None or options.to_seed is not None:
        return on_the_way(pipeline, options, prompts[0])
    if options.sweep_c or options.sweep_steps:
        return sweep(pipeline, options, prompts[0], edit)
    return pictures(pipeline, options, prompts, edit)


MODES = {  # what else goes with each of them
    "--like": {"output", "image", "mask"},
    "--to": {"to_seed", "frames", "output", "size"},
    "--to_seed": {"to", "frames", "output", "size"},
    "--sweep_c": {"sweep_steps", "output", "size", "image", "mask", "strength"},
    "--sweep_steps": {"sweep_c", "output", "size", "image", "mask", "strength"},
}


def one_thing_at_a_time(options: Options) -> None:
    """Refuse options that would be ignored beside the one that says what to do."""
    default = Options()
    given = {field for field in vars(options) if getattr(options, field) != getattr(default, field)}
    for mode, beside in MODES.items():
        if mode[2:] not in given:
            continue
        beside = beside | {mode[2:], "checkpoint", "encoder", "ema", "guide"}
        if mode != "--like":
            beside |= {"sampling", "prompts", "seed"}
            if len(options.prompts) > 1:
                raise ValueError(f"{mode} draws one prompt, not {len(options.prompts)}: give one with --prompts")
        if ignored := given - beside:
            named = ", ".join("the sampling" if field == "sampling" else f"--{field}" for field in sorted(ignored))
            raise ValueError(f"{mode} and {named} ask for different things: give one of them at a time")
    if "frames" in given and not given & {"to", "to_seed"}:
        raise ValueError("--frames is about a way: say where it leads with --to or --to_seed")


def pictures(pipeline, options: Options, prompts: list[str], edit) -> str:
    from images import captioned_grid, save_gif, save_png

    start = time.perf_counter()
    if options.animate:
        films = [pipeline.denoising(prompt, options.sampling, seed=options.seed, edit=edit) for prompt in prompts]
        images = [film[-1] for film in films]
    else:
        images = pipeline.generate_images(prompts, options.sampling, seeds=options.seed, edit=edit)
    seconds = time.perf_counter() - start
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True), 1):
        path = options.output / f"{number:02}_{file_name(prompt)}.png"
        save_png(image, path, pipeline.origin(prompt, options.seed, options.sampling, edit=edit).to_text())
        if options.animate:
            save_gif(films[number - 1], path.with_suffix(".gif"), cell=options.size)
    save_png(captioned_grid(images, prompts, columns=6, cell=options.size), options.output / "grid.png")
    beside = f"{len(prompts)} pictures beside it{' with a GIF each' if options.animate else ''}"
    return f"{options.output / 'grid.png'} and {beside} written; {seconds:.1f} s to draw them"


def on_the_way(pipeline, options: Options, prompt: str) -> str:
    from images import captioned_grid, save_gif, save_png

    to = prompt if options.to is None else options.to
    seeds = (options.seed, options.seed if options.to_seed is None else options.to_seed)
    images = pipeline.interpolate((prompt, to), options.sampling, seeds=seeds, frames=options.frames)
    shares = [f"{i / (len(images) - 1):.0%}" for i in range(len(images))]
    shares[0], shares[-1] = f"{prompt}, seed {seeds[0]}", f"{to}, seed {seeds[1]}"
    path = options.output / f"{file_name(prompt)}_{seeds[0]}_to_{file_name(to)}_{seeds[1]}.png"
    told = pipeline.origin(prompt, seeds[0], options.sampling).to_text() | {"to": to, "to_seed": str(seeds[1])}
    save_png(captioned_grid(images, shares, columns=len(images), cell=options.size), path, told)
    save_gif([*images, *images[-2::-1]], path.with_suffix(".gif"), cell=options.size)
    return f"{path} and {path.with_suffix('.gif').name} written: {len(images)} pictures from {prompt!r} to {to!r}"


def sweep(pipeline, options: Options, prompt: str, edit) -> str:
    from images import captioned_grid, save_png

    guidances = options.sweep_c or (options.sampling.c,)
    steps = options.sweep_steps or (pipeline.resolved(options.sampling).steps,)
    every = [dataclasses.replace(options.sampling, c=c, steps=n) for n in steps for c in guidances]
    every = [pipeline.resolved(sampling) for sampling in every]  # refuses a wrong one before the first is drawn
    images = [pipeline.generate_images([prompt], each, seeds=options.seed, edit=edit)[0] for each in every]
    captions = [f"c {each.c:g}, {each.steps} steps" for each in every]
    path = options.output / f"sweep_{file_name(prompt)}.png"
    told = {"prompt": prompt, "seed": options.seed, "checkpoint": pipeline.hash, "sampling": every}
    save_png(captioned_grid(images, captions, columns=len(guidances), cell=options.size), path, told)
    return f"{path} written: {prompt!r}, guidance from left to right, steps from top to bottom"


def again(pipeline, options: Options, edit) -> str:
    import numpy as np
    from PIL import Image

    from images import save_png
    from pipeline import Origin

    origin = Origin.read(options.like)
    image = pipeline.like(origin, edit)
    with Image.open(options.like) as picture:
        same = np.array_equal(np.asarray(picture), np.asarray(image))
    path = options.output / f"like_{options.like.stem}.png"
    save_png(image, path, origin.to_text())
    verdict = "the same, pixel for pixel" if same else "but not the same to the last bit, as on another machine"
    return f"{path} written: {verdict}"


def file_name(prompt: str) -> str:
    return re.sub(r"\W+", "_", prompt).strip("_").encode()[:60].decode(errors="ignore")


if __name__ == "__main__":
    main()
