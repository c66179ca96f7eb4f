"""Sample from a trained checkpoint: `python test.py [--prompts "red heart" "cat face" …]`.

Without prompts, takes the examples that the checkpoint carries: captions it was trained on, then captions it has
never seen. Without a checkpoint, takes models_vA0/final or, where there is none, the bundled network in pretrained/.
Writes a captioned grid and each picture into one folder; a picture's PNG says how it was made.

    python test.py --prompts "cat face" --c 3 --sampler ddpm      other choices (all are below)
    python test.py --prompts "cat face" --to "dog face"           from one prompt to another, a strip and a GIF
    python test.py --prompts "cat face" --animate                 each picture's way from noise, as a GIF
    python test.py --prompts "cat face" --image me.png            a picture changed; with --mask, in part
    python test.py --like validation_images/test/01_cat_face.png  that picture again, or with what you change, in a
                                                                  folder beside it
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files
from params import Sampling

if TYPE_CHECKING:
    from pipeline import DiffusionPipeline, Edit


@dataclass(frozen=True)
class Options:
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    checkpoint: Path | None = None  # of train.py, export.py or the hub (USER/NAME); models_vA0/final, else pretrained
    ema: Literal["short", "long"] | None = None  # which average of the weights samples; short, or the only one there
    guide: Path | None = None  # an earlier or smaller checkpoint to steer away from, instead of the empty caption
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    prompts: tuple[str, ...] = ()  # what to draw
    seed: int = 0  # of every picture's noise
    size: int = 128  # side of the pictures in grids and GIFs, pixels
    output: Path = Path("validation_images/test")  # folder of grid.png and the single pictures
    image: Path | None = None  # a picture to start from
    strength: float | None = None  # share of the way from noise that is sampled anew, 0 … 1; 0.6, or with a mask 1
    mask: Path | None = None  # grey picture: white is sampled anew, black keeps the pixels of --image exactly
    to: str | None = None  # a second prompt: interpolate from the first one to it
    to_seed: int | None = None  # a second seed: interpolate from the first one to it
    frames: int = 8  # pictures of such an interpolation
    animate: bool = False  # write a GIF of each picture's way from noise
    like: Path | None = None  # start from the prompt, the seed and the choices that this PNG was sampled with


def main() -> None:
    files.secure_streams()
    settings = {"description": __doc__, "use_underscores": True, "config": (tyro.conf.FlagCreatePairsOff,)}
    try:
        options = tyro.cli(Options, **settings)
        options = tyro.cli(Options, default=defaults(options), **settings)
        print(run(files.expanded(options)))
    except (ValueError, OSError) as error:
        sys.exit(f"test.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing but whole pictures was written")


def defaults(options: Options) -> Options:
    """What is sampled where the command line says nothing: as --like was, or as the checkpoint recommends."""
    from pipeline import recommended  # imported here, as all that is slow, so that --help is instant

    if options.like:
        return remembered(files.from_home(options.like))
    return Options(recommended(options.checkpoint))


def text_of(path: Path) -> dict[str, str]:
    """The text that a PNG carries: how it was sampled."""
    from images import reading

    with reading(path) as picture:
        return dict(getattr(picture, "text", {}))


def remembered(path: Path) -> Options:
    """Options that sample what a PNG shows, into a folder named after it."""
    from samplers import SOLVERS

    text = text_of(path)
    try:
        saved = files.parsed(text["sampling"])
        if saved.get("spacing", "trailing") != "trailing":
            raise ValueError(f"it knew steps with spacing {saved['spacing']!r}")
        sampling = Sampling.from_json(saved)
        if sampling.eta == SOLVERS[sampling.sampler].eta:
            sampling = replace(sampling, eta=None)  # so that another sampler brings its own
        numbers = (("seed", int), ("strength", float), ("to_seed", int), ("frames", int))
        more = {name: kind(text[name]) for name, kind in numbers if name in text}
        return Options(sampling, prompts=(text["prompt"],), to=text.get("to"), output=path.with_suffix(""), **more)
    except KeyError:
        raise ValueError(f"{path} does not say how it was sampled; name a PNG of test.py or generate_image") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was sampled by another version of this program: {error}") from None


def refuse(options: Options) -> None:
    """Raise ValueError for options that contradict each other."""
    default = Options()
    given = {field for field in vars(options) if getattr(options, field) != getattr(default, field)}
    if given & {"to", "to_seed"}:
        if len(options.prompts) > 1:
            raise ValueError(f"--to and --to_seed lead from one prompt, not {len(options.prompts)}: give one")
        if ignored := given & {"image", "mask", "strength", "animate"}:
            named = ", ".join(f"--{field}" for field in sorted(ignored))
            raise ValueError(f"--to and {named} ask for different things: give one of them at a time")
    elif "frames" in given:
        raise ValueError("--frames is about a way: say where it leads with --to or --to_seed")
    if given & {"mask", "strength"} and "image" not in given:
        which = f"the one that {options.like} was changed from" if options.like else "it"
        raise ValueError(f"--mask and --strength are about a picture to start from: name {which} with --image")
    if not 8 <= options.size <= 2048:
        raise ValueError(f"--size {options.size}: allowed are whole numbers of pixels from 8 to 2048")


def run(options: Options) -> str:
    """Do what the options ask for; returns what was written where."""
    refuse(options)
    from pipeline import DiffusionPipeline, Edit

    files.writable(options.output)
    pipeline = DiffusionPipeline(options.checkpoint, options.encoder, ema=options.ema, guide=options.guide)
    if options.like and text_of(options.like).get("checkpoint") != pipeline.hash:
        print(f"note: {options.like} was sampled with other weights: see --checkpoint, --ema, --guide", file=sys.stderr)
    prompts = options.prompts or pipeline.about["prompts"]
    edit = options.image and Edit(options.image, options.strength, options.mask)
    if options.to is not None or options.to_seed is not None:
        return interpolate(options, pipeline, prompts[0])
    return sample(options, pipeline, prompts, edit)


def sample(options: Options, pipeline: "DiffusionPipeline", prompts: Sequence[str], edit: "Edit | None") -> str:
    """Each prompt's picture, a grid of all, and on request a GIF of each one's way from noise."""
    from images import captioned_grid, save_gif, save_png

    sampling, seed = options.sampling, options.seed
    began = time.perf_counter()
    if options.animate:
        films = [pipeline.denoising(prompt, sampling, seed=seed, edit=edit) for prompt in prompts]
        images = [film[-1] for film in films]
    else:
        images = pipeline.generate_images(prompts, sampling, seeds=seed, edit=edit)
    seconds = time.perf_counter() - began
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = options.output / f"{number + 1:02}_{file_name(prompt)}.png"
        save_png(image, path, pipeline.metadata(prompt, seed, sampling, edit))
        if options.animate:
            save_gif(films[number], path.with_suffix(".gif"), cell=options.size)
    path, gifs = options.output / "grid.png", " with a GIF each" if options.animate else ""
    told = pipeline.resolved(sampling).told()
    save_png(captioned_grid(images, pipeline.titles(prompts), columns=6, cell=options.size), path)
    return f"{path} and {len(prompts)} pictures beside it{gifs} written; {seconds:.1f} s to sample them with {told}"


def interpolate(options: Options, pipeline: "DiffusionPipeline", prompt: str) -> str:
    """A strip and a GIF of the way from one prompt and seed to another."""
    from images import captioned_grid, save_gif, save_png

    sampling, seed = options.sampling, options.seed
    to = prompt if options.to is None else options.to
    to_seed = seed if options.to_seed is None else options.to_seed
    images = pipeline.interpolate((prompt, to), sampling, seeds=(seed, to_seed), frames=options.frames)
    captions = [f"{i / (len(images) - 1):.0%}" for i in range(len(images))]
    captions[0], captions[-1] = f"{prompt}, seed {seed}", f"{to}, seed {to_seed}"
    path = options.output / f"{file_name(prompt)}_{seed}_to_{file_name(to)}_{to_seed}.png"
    way = {"to": to, "to_seed": str(to_seed), "frames": str(len(images))}
    metadata = pipeline.metadata(prompt, seed, sampling) | way
    save_png(captioned_grid(images, captions, columns=len(images), cell=options.size), path, metadata)
    save_gif([*images, *images[-2::-1]], path.with_suffix(".gif"), cell=options.size)
    return f"{path} and {path.with_suffix('.gif').name} written: {len(images)} pictures from {prompt!r} to {to!r}"


def file_name(prompt: str) -> str:
    return re.sub(r"\W+", "_", prompt).strip("_").encode()[:60].decode(errors="ignore")


if __name__ == "__main__":
    main()
