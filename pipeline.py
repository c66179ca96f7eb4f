"""From words to pictures: a checkpoint, its text encoder and a sampler behind one method.

    from pipeline import DiffusionPipeline
    DiffusionPipeline("models_vA0/final").generate_image("red heart", "heart.png", cfg=True, c=7)

The same prompt, seed and sampling give the same picture, whatever is sampled beside it: each picture's noise comes from
its own seed, and the network always runs on batches of one size. Sampling changes nothing here, so several threads may
sample at once. The whole way from prompt to pixels is DiffusionPipeline._sample.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

HERE = Path(__file__).resolve().parent
# of the names that are imported below, those that another program is likely to use too
OURS = ["checkpoint", "dataset", "files", "guidance", "images", "model", "parallel", "params", "schedule", "sharing"]
for ours in OURS:
    theirs = Path(getattr(find_spec(ours), "origin", None) or "").resolve()  # a program's own file, if it comes first
    if theirs not in (HERE / f"{ours}.py", HERE / ours / "__init__.py"):
        raise ImportError(f"{theirs} was taken for {ours} of {HERE}: rename it, or put {HERE} first on sys.path")

import dataset
import parallel
import schedule as schedules
from files import from_home, writable
from guidance import steps_within
from images import as_picture, as_rgba, load_picture, save_png
from model import abstract
from params import Params, Sampling
from samplers import SOLVERS, timesteps
from sampling import Controls, Request, build_sampler
from sharing import portable
from sharing.portable import CheckpointError
from text_encoder import TextEncoder, checked

STEPS = 20  # of the sampler, unless the user says otherwise
Seeds = int | Sequence[int]  # one for all pictures, or one for each


class Edit(NamedTuple):
    """A picture to start from: `strength` says how much of it changes, a mask where."""

    image: Image.Image | str | Path
    strength: float | None = None  # 0 … 1: share of the steps that are taken; if None 0.6, or 1 with a mask
    mask: Image.Image | str | Path | None = None  # white is sampled anew, black is kept exactly

    @property
    def share(self) -> float:
        """The strength, also where nothing is said."""
        return self.strength if self.strength is not None else 0.6 if self.mask is None else 1.0


class DiffusionPipeline:
    """Samples pictures for prompts with the averaged weights of a checkpoint.

    Errors: CheckpointError where the checkpoint is missing, damaged or of another encoder; EncoderError where its
    encoder cannot be had; ValueError for a prompt, sampling, seed or picture that cannot be sampled.
    """

    def __init__(
        self, checkpoint: str | Path | None = None, encoder: str | TextEncoder | None = None, *,
        ema: Literal["short", "long"] | None = None, guide: str | Path | None = None,
    ):  # fmt: skip
        """checkpoint: a folder that train.py or export.py wrote, or an exported one on the Hugging Face hub,
        "user/name" or "user/name@revision"; if nothing is said, models_vA0/final, or where there is none pretrained/.
        encoder: where the text encoder is, if no longer under the name that the checkpoint was trained with; or itself.
        ema: which of the two averages of the weights samples; if nothing is said, the short one, or the one that an
        exported folder holds.
        guide: an earlier or smaller checkpoint to steer away from, instead of the empty caption (autoguidance).
        """
        if ema not in (None, "short", "long"):
            raise ValueError(f"ema = {ema!r}: allowed are 'short' and 'long'")
        parallel.setup()
        own = _load(checkpoint, encoder, ema)
        other = None if guide is None else _load(guide, own.encoder, ema)
        for field in ("H", "W", "CHANNELS", "T", "TEXT_LEN", "zero_terminal_snr") if other else ():
            here, there = getattr(own.config, field), getattr(other.config, field)
            if here != there:
                raise ValueError(f"guide = {guide}: {field} is {there}, that of the checkpoint {here}; take another")
        self._assemble(own, other)

    @classmethod
    def from_weights(cls, config: Params, encoder: TextEncoder, weights: dict, *, unseen: Sequence[str] = ()):
        """A pipeline around a network that is in memory already; unseen: captions that it was not trained on."""
        self = cls.__new__(cls)
        about = {"config": config.to_json(), "sampling": {}, "unseen": unseen}
        self._assemble(_Network(about, config, encoder, weights))
        return self

    def _assemble(self, own: "_Network", guide: "_Network | None" = None) -> None:
        self.about, self.config, self.encoder, self.weights, self.ema = own
        self.sampling = Sampling.from_json(self.about["sampling"])  # unless a call says otherwise
        self._guide, self.shape = guide, (self.config.H, self.config.W, self.config.CHANNELS)
        self.schedule = schedules.from_config(self.config)
        self.batch = 16 if parallel.on_accelerator() else 1  # pictures per call; a CPU is as fast with one as with many
        self._sampler = build_sampler(self.config, guide and guide.config)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that samples: weights, configuration as it was saved, encoder, guide."""
        guide = self._guide
        identity = [self.about["config"], guide and guide.about["config"], self.encoder.identity["sha256"]]
        digest = hashlib.sha256(json.dumps(identity).encode())
        for path, leaf in jax.tree.leaves_with_path((self.weights, guide and guide.weights)):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def generate_image(
        self, prompt: str, output_path: str | Path | None = None, cfg: bool = True, c: float | None = None, *,
        steps: int | None = None, sampler: str | None = None, eta: float | None = None, seed: int = 0,
        negative_prompt: str | None = None, sampling: Sampling | None = None, edit: Edit | None = None,
    ) -> Image.Image:  # fmt: skip
        """Sample one prompt; with output_path, write it as a PNG that remembers how it was made.

        cfg and c: classifier-free guidance and its strength. All other choices are fields of `sampling`; those given by
        name here take precedence. What nobody says is as the checkpoint recommends. edit: a picture to start from.
        """
        if output_path is not None:
            path = from_home(output_path)
            if path.suffix.lower() != ".png" or path.is_dir():
                raise ValueError(f"output_path = {output_path}: name a file that ends in .png")
            writable(path.parent)
        named = dict(c=c if cfg else 1.0, steps=steps, sampler=sampler, eta=eta, negative_prompt=negative_prompt)
        named = {field: value for field, value in named.items() if value is not None}
        sampling = dataclasses.replace(sampling or self.sampling, **named)
        image = self.generate_images([prompt], sampling, seeds=seed, edit=edit)[0]
        if output_path is not None:
            save_png(image, path, self.metadata(prompt, seed, sampling, edit))
        return image

    def generate_images(
        self, prompts: Sequence[str], sampling: Sampling | None = None, *, seeds: Seeds = 0, edit: Edit | None = None
    ) -> list[Image.Image]:
        """Sample any number of prompts, each from its own seed (or all from one)."""
        return [as_picture(pixels) for pixels in self.generate_arrays(prompts, sampling, seeds=seeds, edit=edit)]

    def generate_arrays(
        self, prompts: Sequence[str], sampling: Sampling | None = None, *, seeds: Seeds = 0, edit: Edit | None = None
    ) -> UInt8[np.ndarray, "n h w c"]:
        """As generate_images, as one array of bytes."""
        batches = [pixels for _, pixels in self._sample(*self._pairs(prompts, seeds), sampling, edit)]
        return np.concatenate(batches) if batches else np.zeros((0, *self.shape), np.uint8)

    def watch(
        self, prompts: Sequence[str], sampling: Sampling | None = None, *, seeds: Seeds = 0, edit: Edit | None = None,
        every: int = 1,
    ) -> Iterator[list[Image.Image]]:  # fmt: skip
        """As generate_images, while they are sampled: after every so many steps the estimates of those begun so far."""
        if every < 1:
            raise ValueError(f"every = {every}: allowed are whole numbers from 1")
        images = []
        for first, pixels in self._sample(*self._pairs(prompts, seeds), sampling, edit, every=every):
            images[first:] = map(as_picture, pixels)
            yield list(images)

    def titles(self, prompts: Sequence[str]) -> list[str]:
        """What stands under the pictures of a grid: the prompts, with a mark at those that training has held out."""
        unseen = self.about.get("unseen", ())
        return [f"(unseen) {prompt}" if prompt in unseen else prompt for prompt in prompts]

    @staticmethod
    def _pairs(prompts: Sequence[str], seeds: Seeds) -> tuple[list[list[str]], list[list[int]]]:
        """The prompt and the seed of each picture."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
            raise ValueError(f"prompts is {prompts!r:.80}: give a list of prompts, or call generate_image for one")
        seeds = list(seeds) if isinstance(seeds, Sequence | np.ndarray) else [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one for each prompt")
        return [[prompt] for prompt in prompts], [[seed] for seed in seeds]

    def interpolate(
        self, prompts: tuple[str, str], sampling: Sampling | None = None, *, seeds: tuple[int, int] = (0, 0),
        frames: int = 8,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures on the way from one prompt and seed to another, both ends included.

        Between prompts the estimates are mixed; between seeds the noise turns along the sphere on which it lies.
        """
        if not (len(prompts) == len(seeds) == 2):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: a way has two of each, its ends")
        if not 2 <= frames <= 1000:
            raise ValueError(f"frames = {frames}: allowed are whole numbers from 2 to 1000")
        if seeds[0] != seeds[1] and self.resolved(sampling).eta > 0:
            raise ValueError("eta is above 0: fresh noise has no way between seeds; take eta = 0 or one seed")
        prompts = list(dict.fromkeys(map(checked, prompts)))  # of two that are equal, one estimate is enough
        share = np.linspace(0, 1, frames, dtype=np.float32)
        batches = self._sample([prompts] * frames, [list(seeds)] * frames, sampling, share=share)
        return [as_picture(pixels) for _, batch in batches for pixels in batch]

    def denoising(
        self, prompt: str, sampling: Sampling | None = None, *, seed: int = 0, edit: Edit | None = None
    ) -> list[Image.Image]:
        """The estimate of the picture at each step, and at the end the picture."""
        estimates = [image for [image] in self.watch([prompt], sampling, seeds=seed, edit=edit)]
        return [*estimates, estimates[-1]]

    def metadata(
        self, prompt: str, seed: int, sampling: Sampling | None = None, edit: Edit | None = None
    ) -> dict[str, str]:
        """How a picture is sampled: the text that its PNG carries, and that `python test.py --like FILE` reads."""
        sampling = self.resolved(sampling).to_json()
        about = {"prompt": prompt, "seed": str(seed), "sampling": json.dumps(sampling), "checkpoint": self.hash}
        return about | ({"strength": str(edit.share)} if edit else {})

    def resolved(self, sampling: Sampling | None) -> Sampling:
        """`sampling`, or if None what the checkpoint recommends, with nothing left open."""
        sampling = sampling or self.sampling
        eta = SOLVERS[sampling.sampler].eta if sampling.eta is None else sampling.eta
        steps = min(STEPS, self.config.T) if sampling.steps is None else sampling.steps
        return dataclasses.replace(sampling, eta=eta, steps=steps)

    def _sample(
        self, prompts: list[list[str]], seeds: list[list[int]], sampling: Sampling | None, edit: Edit | None = None, *,
        share: np.ndarray | None = None, every: int | None = None,
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "b h w c"]]]:  # fmt: skip
        """From prompts to pixels, batch by batch: the number of its first picture, and its pictures. With `every`,
        also their estimates after every so many steps.

        Each of n pictures has one prompt and one seed; or two, and is `share` [n] of the way from first to second.
        """
        n, k = len(prompts), len(prompts[0]) if prompts else 0
        if n == 0:
            return
        flat = [checked(prompt) for each in prompts for prompt in each]
        if not all(prompt.strip() for prompt in flat):
            raise ValueError("the prompt is empty: say in a few words what to draw")
        for seed in (seed for each in seeds for seed in each):
            if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**31):
                raise ValueError(f"seed = {seed}: allowed are whole numbers from 0 to {2**31 - 1}")
        sampling, guide = self.resolved(sampling), self._guide
        if guide is not None and sampling.negative_prompt:
            raise ValueError("negative_prompt and a guide exclude each other: both say what to steer away from")

        solver, times = SOLVERS[sampling.sampler], timesteps(self.schedule, sampling.steps)
        image = mask = None
        if edit is not None:
            image, mask = self._open(edit)
            times = times[-1 - max(1, round(edit.share * sampling.steps)) :]
        controls = jax.device_put(Controls(
            steps=solver.plan(self.schedule, times),
            guidance=None if sampling.c == 1 else np.float32(sampling.c),
            rescale=np.float32(sampling.rescale),
            interval=None if sampling.interval == (0.0, 1.0) else steps_within(sampling.interval, self.config.T),
            percentile=None if sampling.percentile is None else np.float32(sampling.percentile),
            eta=np.float32(sampling.eta), temperature=np.float32(sampling.temperature), image=image, mask=mask,
        ))  # fmt: skip

        text_emb, text_mask = self.encoder([*flat, sampling.negative_prompt], self.config.TEXT_LEN)
        text = np.concatenate([np.arange(n * k).reshape(n, k), np.full((n, 1), n * k)], axis=1)  # rows of text_emb
        seeds, weights, last = np.array(seeds, np.int32), (self.weights, guide and guide.weights), len(times) - 1
        go_on = partial(self._sampler.go_on, *weights, take=solver.take)
        stops = jax.device_put([*map(np.int32, range(0, last, every or last)), np.int32(last)])
        for first in range(0, n, self.batch):
            rows = np.resize(np.arange(first, min(first + self.batch, n)), self.batch)  # the last batch is filled up
            part = None if share is None else share[rows]
            request = jax.device_put(Request(seeds[rows], text_emb[text[rows]], text_mask[text[rows]], part))
            state = self._sampler.begin(request, controls)
            for done, until in pairwise(stops):
                state, images = go_on(request, controls, state, done, until)
                yield first, jax.device_get(images)[: n - first]

    def _open(self, edit: Edit) -> tuple[UInt8[np.ndarray, "h w c"], Bool[np.ndarray, "h w 1"] | None]:
        """Picture and mask of an edit; each is checked, and the strength."""
        if not 0 < edit.share <= 1:
            raise ValueError(f"strength = {edit.share}: allowed are numbers above 0 up to 1")
        size, opened = (self.config.W, self.config.H), {"mask": None}
        for name, picture, modes in (("image", edit.image, "RGB RGBA L LA P PA 1"), ("mask", edit.mask, "L 1")):
            if picture is None:
                continue
            opened[name] = picture if isinstance(picture, Image.Image) else load_picture(from_home(picture))
            if opened[name].size != size:
                sizes = " x ".join(map(str, opened[name].size)), " x ".join(map(str, size))
                raise ValueError(f"{name} is {sizes[0]}; this checkpoint draws {sizes[1]}: resize it first")
            if opened[name].mode not in modes.split():
                raise ValueError(f"{name}: its mode is {opened[name].mode}; save it in one of {modes}")
        image = dataset.fit(as_rgba(opened["image"]), *self.shape)
        mask = opened["mask"] and np.asarray(opened["mask"].convert("L"))[..., None] > 127
        return image, mask


class Saved(NamedTuple):
    """A network on the disk: what it says about itself, and the module that reads its weights."""

    path: Path
    source: ModuleType
    about: dict[str, Any]
    config: Params


def saved(name: str | Path | None) -> Saved:
    """The network of a checkpoint, found and described, but not read; CheckpointError where this cannot be done."""
    path = portable.locate(name)
    if portable.is_exported(path):
        source = portable
    else:
        import checkpoint as source  # only here: Orbax takes long to import, and an exported folder needs none
    about = source.about(path)
    try:
        config = Params.from_json(about["config"])
        if about["schedule"] != {"name": schedules.NAME, "T": config.T}:
            raise ValueError(f"schedule {about['schedule']}: only {schedules.NAME!r} is known")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: about: {error}") from error
    return Saved(path, source, about, config)


def recommended(name: str | Path | None) -> Sampling:
    """How a checkpoint is best sampled: what `evaluate.py --recommend` or its author found, or the defaults."""
    return Sampling.from_json(saved(name).about["sampling"])


class _Network(NamedTuple):
    about: dict[str, Any]  # the JSON part of its checkpoint
    config: Params
    encoder: TextEncoder
    weights: dict
    ema: str = ""  # which average of the weights it has


def _load(name: str | Path | None, encoder: TextEncoder | str | None, ema: str | None) -> _Network:
    """The network of a checkpoint with averaged weights, and its text encoder or the one given (a name or folder)."""
    path, source, about, config = saved(name)
    if not isinstance(encoder, TextEncoder):
        encoder = TextEncoder(encoder or config.encoder)
    then, now = about["encoder"]["sha256"], encoder.identity["sha256"]
    if then != now:
        raise CheckpointError(
            f"{path} was trained with the files {then[:12]}… of {config.encoder}, those here are {now[:12]}…; "
            "bring the encoder that it was trained with"
        )
    _, like = abstract(config, encoder.dim)
    ema = ema or about.get("ema", "short")
    weights = source.restore(path, {f"ema_{ema}": like})[f"ema_{ema}"]
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)):
        raise CheckpointError(f"{path}: the weights hold non-finite numbers; take an earlier checkpoint")
    return _Network(about, config, encoder, weights, ema)
