"""The page of app.py, on which people draw: what it shows, and what it answers.

Pictures are sent inside the page, and saving one gives the file that `generate_image` writes. What is uploaded is read
by images.py alone. `build` puts the page together from its tabs, and `draw` and `way` are also its API.
"""

import base64
import html
import inspect
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
from gradio.components.base import Component, server
from gradio.components.image_editor import AcceptBlobs, EditorData, EditorDataBlobs
from gradio.data_classes import FileData
from PIL import Image

from dataset import fit
from images import as_picture, as_rgba, captioned_grid, load_picture, on_white, save_gif, save_png
from params import Fields, Sampling, SolverName, within
from pipeline import DiffusionPipeline, Edit

LETTERS = 300  # of a prompt
STEPS = 100  # of the solver, at most
WAITING = 16  # requests, before more are sent away
UPLOAD = 16 * 2**20  # bytes of a file
CELL = 192  # side of the pictures in strips and GIFs, pixels
EVERY = 2  # steps between two previews

CSS = """
.gradio-container { max-width: 1080px !important; margin: auto }
.cards { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; padding-top: 8px }
.card { margin: 0; text-align: center }
.card:only-child, .card.wide { grid-column: 1 / -1 }
.card:only-child { max-width: 320px }
.card img { width: 100%; border: 1px solid var(--border-color-primary); border-radius: 8px;
            background: repeating-conic-gradient(#ddd 0 25%, #fff 0 50%) 0 0 / 20px 20px }
.card figcaption { overflow-wrap: anywhere }
.empty { padding: 25% 5%; text-align: center; border: 1px dashed var(--border-color-primary); border-radius: 8px }
"""


@dataclass(frozen=True)
class Asked(Fields):
    """What people choose beside the fields of Sampling."""

    number: int = within(1, 1, 4)  # of pictures
    frames: int = within(6, 2, 12)  # of a way between two prompts
    seed: int = within(0, 0, 2**31 - 1)
    strength: float = within(0.6, 0.2, 1)  # how much of a picture to start from may change


def editor(**options: Any) -> gr.ImageEditor:
    """For a picture and what is painted on it. It hands on what was uploaded as it is, for images.py to read.

    Not a class of its own, because gradio would write a file beside this one.
    """
    pad = gr.ImageEditor(**options)
    keep = pad.accept_blobs

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        if len(data.files[0][1]) > UPLOAD or str(data.data["index"]) not in ("0", "None", "null", ""):
            raise gr.Error("This picture is too large.")
        while len(pad.blob_storage) >= WAITING:  # sketches that nobody has drawn from
            pad.blob_storage.pop(next(iter(pad.blob_storage)), None)
        keep(data)

    def preprocess(payload: EditorData | None) -> EditorData | EditorDataBlobs | None:
        return pad.blob_storage.pop(payload.id, None) if payload and payload.id else payload

    pad.accept_blobs, pad.preprocess = accept_blobs, preprocess
    return pad


def draw(
    pipeline: DiffusionPipeline, prompt: str, number: int, seed: int, c: float, steps: int, sampler: str,
    negative: str, transparent: bool, sketch: EditorData | EditorDataBlobs | None, strength: float,
) -> Iterator[str]:  # fmt: skip
    """HTML of the pictures of one prompt from as many seeds: as they come into being, then as files to save."""
    asked = Asked(number=number, seed=seed, strength=strength)
    sampling = sampling_of(pipeline, c, steps, sampler, negative)
    edit = edit_of(sketch, asked.strength, pipeline.shape)
    prompts = [short(prompt)] * asked.number
    seeds = [(asked.seed + i) % 2**31 for i in range(asked.number)]
    yield said("Drawing … The first picture by heun, with guidance 1 or from a picture takes longer.")
    began, images = time.perf_counter(), []

    def shown(image: Image.Image) -> Image.Image:
        return image if transparent or image.mode != "RGBA" else as_picture(on_white(np.asarray(image)))

    for images in pipeline.watch(prompts, sampling, seeds=seeds, edit=edit, every=EVERY):
        begun = zip(images, seeds, strict=False)
        yield cards(card(written(save_png, shown(image)), f"seed {seed}") for image, seed in begun)
    seconds, finished = time.perf_counter() - began, []
    for image, seed in zip(images, seeds, strict=True):
        data = written(save_png, shown(image), pipeline.metadata(prompt, seed, sampling, edit))
        finished.append(card(data, f"seed {seed}", name=f"{prompt} {seed}"))
    yield cards(finished) + said(f"Drawn in {seconds:.1f} s. Each file remembers how it was drawn.")


def way(
    pipeline: DiffusionPipeline, prompt: str, to: str, frames: int, seed: int, c: float, steps: int, sampler: str,
    negative: str,
) -> Iterator[str]:  # fmt: skip
    """HTML of the way from one prompt to another: a GIF, and a strip whose PNG says how it was drawn."""
    asked, sampling = Asked(frames=frames, seed=seed), sampling_of(pipeline, c, steps, sampler, negative)
    prompt, to = short(prompt), short(to)
    yield said(f"Drawing {asked.frames} pictures on the way …")
    images = pipeline.interpolate((prompt, to), sampling, seeds=(asked.seed, asked.seed), frames=asked.frames)
    captions = [prompt, *(f"{i / (len(images) - 1):.0%}" for i in range(1, len(images) - 1)), to]
    strip = captioned_grid(images, captions, columns=len(images), cell=CELL)
    metadata = {"to": to, "to_seed": str(asked.seed), "frames": str(asked.frames)}
    metadata |= pipeline.metadata(prompt, asked.seed, sampling)
    name, film, strip = f"{prompt} to {to}", [*images, *images[-2::-1]], written(save_png, strip, metadata)
    film = card(written(save_gif, film, cell=CELL), name, name=name, kind="gif")
    yield cards([film, card(strip, "", name=name, shape="wide")])


def sampling_of(pipeline: DiffusionPipeline, c: float, steps: int, sampler: str, negative: str) -> Sampling:
    """What is asked for; in all else, what the checkpoint recommends."""
    return replace(pipeline.sampling, c=c, steps=steps, sampler=sampler, negative_prompt=short(negative))


def short(text: str) -> str:
    if isinstance(text, str) and len(text) > LETTERS:
        raise ValueError(f"the text has {len(text)} letters: at most {LETTERS} are read")
    return text


def edit_of(sketch: EditorData | EditorDataBlobs | None, strength: float, shape: tuple[int, int, int]) -> Edit | None:
    """A picture to start from, scaled to the size of the model's; where it is painted on, only that is drawn anew."""
    if sketch is None or sketch.background is None:
        return None
    height, width, _ = shape
    image = as_picture(fit(opened(sketch.background), height, width, 4))
    paint = fit(opened(sketch.layers[0]), height, width, 4)[..., 3:] if sketch.layers and sketch.layers[0] else None
    if paint is None or paint.max() < 128:
        return Edit(image, strength)
    return Edit(image, mask=as_picture(paint))


def opened(part: FileData | bytes) -> Image.Image:
    """One part of a sketch, in eight bits of sRGB and alpha; raises PictureError."""
    if isinstance(part, FileData):
        return as_rgba(load_picture(Path(part.path)))
    with tempfile.NamedTemporaryFile() as file:
        file.write(part)
        file.flush()
        return as_rgba(load_picture(Path(file.name)))


def written(save: Callable, *what: Any, **options: Any) -> bytes:
    """The bytes of the file that save_png or save_gif writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(what[0], path := Path(folder, "picture"), *what[1:], **options)
        return path.read_bytes()


def card(data: bytes, caption: str, *, name: str = "", kind: str = "png", shape: str = "") -> str:
    """A picture with its caption, and with a link to save it if it has a name."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    file = re.sub(r"\W+", "_", name).strip("_")[:60] or "picture"
    link = f' <a download="{file}.{kind}" href="{source}">save {kind.upper()}</a>' if name else ""
    caption = html.escape(caption)
    image = f'<img alt="{caption}" src="{source}">'
    return f'<figure class="card {shape}">{image}<figcaption>{caption}{link}</figcaption></figure>'


def cards(each: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(each)}</div>'


def said(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


# The page


def slider(field: str, label: str, step: float) -> gr.Slider:
    """A slider for a field of Asked."""
    low, high = Asked.__dataclass_fields__[field].metadata["range"]
    return gr.Slider(low, high, getattr(Asked(), field), step=step, label=label)


def picture_tab(captions: list[str]) -> tuple[list[Component], list]:
    """Asks for pictures of one prompt, from noise or from a picture; its inputs, and what starts drawing."""
    prompt = gr.Textbox(label="What to draw", max_length=LETTERS, value=captions[0])
    gr.Examples([[text] for text in captions[:8]], prompt, label="Captions to try")
    number = slider("number", "How many", step=1)
    with gr.Accordion("Start from a picture", open=False):
        gr.Markdown("What you paint over is drawn anew. Paint nothing to change the whole picture.")
        sketch = editor(
            show_label=False, format="png", canvas_size=(512, 512), layers=False, transforms=(),
            sources=("upload", "clipboard"),
            brush=gr.Brush(default_size=24, colors=["#e0457b"], color_mode="fixed"),
        )  # fmt: skip
        strength = slider("strength", "How much may change, if nothing is painted", step=0.05)
    button = gr.Button("Draw", variant="primary")
    return [prompt, number, sketch, strength], [button.click, prompt.submit]


def way_tab(captions: list[str]) -> tuple[list[Component], list]:
    """Asks for the way from one prompt to another; its inputs, and what starts drawing."""
    start = gr.Textbox(label="From", max_length=LETTERS, value=captions[0])
    end = gr.Textbox(label="To", max_length=LETTERS, value=captions[-1])
    frames = slider("frames", "Pictures on the way", step=1)
    button = gr.Button("Draw the way", variant="primary")
    return [start, end, frames], [button.click]


def choices(pipeline: DiffusionPipeline) -> tuple[list[Component], Component]:
    """Asks for what both tabs need: seed, guidance, steps, solver and what to avoid; and for a background."""
    default, (low, high) = pipeline.resolved(None), Asked.__dataclass_fields__["seed"].metadata["range"]
    with gr.Row():
        seed = gr.Number(Asked().seed, label="Seed", precision=0, minimum=low, maximum=high)
        dice = gr.Button("🎲 Another seed")
    dice.click(None, js=f"() => Math.floor(Math.random() * {high})", outputs=seed, api_visibility="private")
    weak, strong = min(1, default.c), max(15, default.c)
    c = gr.Slider(weak, strong, default.c, step=0.5, label="Guidance: how closely to follow the words")
    most = max(min(STEPS, pipeline.config.T), default.steps)
    steps = gr.Slider(1, most, default.steps, step=1, label="Steps: more are slower and more exact")
    sampler = gr.Dropdown(get_args(SolverName), value=default.sampler, label="Solver")
    negative = gr.Textbox(default.negative_prompt, label="What to avoid", max_length=LETTERS)
    transparent = gr.Checkbox(True, label="Transparent background", visible=pipeline.config.CHANNELS == 4)
    return [seed, c, steps, sampler, negative], transparent


def answering(respond: Callable[..., Iterator[str]], pipeline: DiffusionPipeline) -> Callable[..., Iterator[str]]:
    """`respond` by this pipeline, with what cannot be drawn shown as a message."""

    def answered(*inputs: Any) -> Iterator[str]:
        try:
            yield from respond(pipeline, *inputs)
        except (ValueError, OSError) as error:
            raise gr.Error(
                html.escape(str(error), quote=False), title="This cannot be drawn", print_exception=False
            ) from None

    answered.__signature__ = inspect.signature(partial(respond, pipeline))  # its names are those of the API
    return answered


def build(pipeline: DiffusionPipeline, about: str) -> gr.Blocks:
    """The page; `about` is its line on who draws."""
    captions = pipeline.about["prompts"]
    with gr.Blocks(title="Draw emoji", delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Draw emoji\nSay in a few words what to draw.\n\n{about}")
        with gr.Row():
            with gr.Column():
                with gr.Tab("A picture"):
                    (prompt, number, sketch, strength), drawing = picture_tab(captions)
                with gr.Tab("From one prompt to another"):
                    ends, walking = way_tab(captions)
                with gr.Accordion("More choices", open=False):
                    shared, transparent = choices(pipeline)
            with gr.Column():
                result = gr.HTML('<p class="empty">Your pictures appear here.</p>')

        asked = [prompt, number, *shared, transparent, sketch, strength]
        one = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress": "minimal"}
        gr.on(drawing, answering(draw, pipeline), asked, result, api_name="draw", **one)
        gr.on(walking, answering(way, pipeline), [*ends, *shared], result, api_name="way", **one)
    return page.queue(max_size=WAITING)


def launch(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page from other threads; returns its address."""
    system = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, theme=system, css=CSS,
        footer_links=[], run_history=False, ssr_mode=False, max_file_size=UPLOAD,
    )  # fmt: skip
    return address
