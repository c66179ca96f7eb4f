"""From words to pictures: a checkpoint, its text encoder and a sampler behind one method.

    from pipeline import DiffusionPipeline
    DiffusionPipeline("models_vA0/final").generate_image("red heart", "heart.png", cfg=True, c=7)

The same prompt, seed and sampling give the same picture, whatever else is drawn beside it: each picture starts from
noise of its own seed, and the network always runs on batches of one fixed size. Drawing changes nothing here, so
several threads may draw at once.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

import checkpoint as checkpoints
import dataset
import parallel
import schedule as schedules
from files import writable
from images import as_picture, on_white, save_png, to_float
from model import UNet
from params import Params, Sampling
from samplers import solver, timesteps
from sampling import Controls, Request, build_draw, noise_of, slerp
from text_encoder import TextEncoder

STEPS = 20  # of the sampler, where nobody says otherwise


class Edit(NamedTuple):
    """A picture to start from: redrawn as far as `strength` says, or only where the mask is white."""

    image: Image.Image | str | Path
    strength: float | None = None  # 0 … 1: share of the walk from noise to picture; 0.6, or with a mask 1, if None
    mask: Image.Image | str | Path | None = None  # white is drawn anew, black is kept exactly


@dataclass(frozen=True)
class Origin:
    prompt: str
    seed: int
    sampling: Sampling  # with nothing left open
    checkpoint: str  # hash of all that draws (DiffusionPipeline.hash)
    size: int | None = None  # width that the picture was enlarged to
    strength: float | None = None  # of the picture that it started from …
    image: str | None = None  # … whose hash this is …
    mask: str | None = None  # … and this its mask's

    def to_text(self) -> dict[str, str]:
        """Entries of a PNG's text: the fields that say something."""
        fields = {**vars(self), "sampling": json.dumps(self.sampling.to_json())}
        return {name: str(value) for name, value in fields.items() if value is not None}

    @classmethod
    def read(cls, path: Path) -> "Origin":
        """What a PNG remembers; ValueError where it is none of ours."""
        with Image.open(path) as picture:
            text = getattr(picture, "text", {})
        read = {
            "seed": int,
            "size": int,
            "strength": float,
            "sampling": lambda text: Sampling.from_json(json.loads(text)),
        }
        own = {field.name for field in dataclasses.fields(cls)} & set(text)  # other programs may have added theirs
        try:
            return cls(**{name: read.get(name, str)(text[name]) for name in own})
        except (TypeError, ValueError) as error:
            why = f"does not say how it was drawn ({error})"
            raise ValueError(f"{path} {why}; name a PNG written by test.py or generate_image") from error


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


class DiffusionPipeline:
    """Draws pictures from prompts with the averaged weights of a checkpoint.

    Errors: CheckpointError where the checkpoint is missing, damaged or of another encoder; EncoderError where its
    encoder cannot be had; ValueError for a prompt, sampling, seed, picture or size that cannot be drawn.
    """

    def __init__(
        self,
        checkpoint: str | Path = "models_vA0/final",
        encoder: str | None = None,
        *,
        ema: Literal["short", "long"] = "short",
        guide: str | Path | None = None,
    ):
        """encoder: where the text encoder is, if no longer under the name that the checkpoint was trained with.
        ema: which of the two averages of the weights draws.
        guide: an earlier or smaller checkpoint to steer away from, instead of the empty caption (autoguidance).
        """
        if ema not in ("short", "long"):
            raise ValueError(f"ema = {ema!r}: allowed are 'short' and 'long'")
        parallel.setup()
        self.about, config = _about(Path(checkpoint))
        encoder = TextEncoder(encoder or config.encoder)
        graphdef, weights = _network(Path(checkpoint), self.about, config, encoder, ema)
        worse = None
        if guide is not None:
            about, other = _about(Path(guide))
            for field in ("H", "W", "CHANNELS", "T", "TEXT_LEN", "zero_terminal_snr"):
                if getattr(other, field) != getattr(config, field):
                    both = f"{getattr(other, field)}, that of {checkpoint} {getattr(config, field)}"
                    raise ValueError(f"guide = {guide}: its {field} is {both}; take a checkpoint of the same pictures")
            worse = (other, *_network(Path(guide), about, other, encoder, ema))
        self._assemble(config, encoder, graphdef, weights, worse)

    @classmethod
    def from_weights(
        cls, config: Params, encoder: TextEncoder, graphdef: nnx.GraphDef, weights: dict
    ) -> "DiffusionPipeline":
        """A pipeline around a network that is in memory already."""
        self = cls.__new__(cls)
        self._assemble(config, encoder, graphdef, weights)
        return self

    def _assemble(
        self,
        config: Params,
        encoder: TextEncoder,
        graphdef: nnx.GraphDef,
        weights: dict,
        guide: tuple[Params, nnx.GraphDef, dict] | None = None,
    ) -> None:
        self.config, self.encoder, self.weights = config, encoder, weights
        self.guide_config, self.guide_weights = (guide[0], guide[2]) if guide else (None, None)
        self.shape = (config.H, config.W, config.CHANNELS)
        self.schedule = schedules.from_config(config)
        self.batch = 16 if parallel.on_accelerator() else 1  # pictures per call; a CPU is as fast with one as with many
        self._draw = build_draw(config, graphdef, guide and guide[:2])

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that draws: weights, configuration, encoder, guide."""
        guide = self.guide_config and self.guide_config.to_json()
        identity = [self.config.to_json(), guide, self.encoder.identity["sha256"]]
        digest = hashlib.sha256(json.dumps(identity).encode())
        for path, leaf in jax.tree.leaves_with_path((self.weights, self.guide_weights)):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def generate_image(
        self,
        prompt: str,
        output_path: str | Path | None = None,
        cfg: bool = True,
        c: float | None = None,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        sampling: Sampling | None = None,
        edit: Edit | None = None,
        size: int | None = None,
    ) -> Image.Image:
        """Draw one prompt; with output_path, write it as a PNG that remembers how it was drawn.

        cfg and c: classifier-free guidance and its strength, 7 if nothing is said. size: width of the picture in
        pixels, enlarged smoothly; the network's own if nothing is said. All other choices are fields of `sampling`, of
        which those given by name here take precedence. edit: a picture to start from.
        """
        named = {"c": c if cfg else 1.0, "steps": steps, "sampler": sampler, "eta": eta}
        named = {
            field: value for field, value in {**named, "negative_prompt": negative_prompt}.items() if value is not None
        }
        sampling = dataclasses.replace(sampling or Sampling(), **named)
        path = output_path and Path(output_path)
        if path:
            origin = self.origin(prompt, seed, sampling, edit=edit, size=size)  # refuses what is wrong before any work
            if path.suffix.lower() != ".png" or path.is_dir():
                raise ValueError(f"output_path = {output_path}: name a file that ends in .png")
            writable(path.parent)
        image = self.generate_images([prompt], sampling, seeds=seed, edit=edit, size=size)[0]
        if path:
            save_png(image, path, origin.to_text())
        return image

    def generate_images(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        edit: Edit | None = None,
        size: int | None = None,
    ) -> list[Image.Image]:
        """Draw any number of prompts, each from its own seed (or all from one)."""
        if size is not None and not (isinstance(size, int) and 1 <= size <= 8192):
            raise ValueError(f"size = {size}: allowed are whole numbers of pixels from 1 to 8192")
        images = [as_picture(picture) for picture in self.generate_arrays(prompts, sampling, seeds=seeds, edit=edit)]
        if size is None:
            return images
        height = max(1, round(size * self.config.H / self.config.W))
        return [image.resize((size, height), Image.Resampling.LANCZOS) for image in images]

    def generate_arrays(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        edit: Edit | None = None,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """As generate_images, as one array of bytes."""
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list of prompts, or call generate_image")
        seeds = list(seeds) if isinstance(seeds, Sequence | np.ndarray) else [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one for each prompt")
        captions = [[prompt] for prompt in prompts]
        return self._drawn(captions, np.ones((len(prompts), 1)), self._noise(seeds), seeds, sampling, edit)[0]

    def interpolate(
        self,
        prompts: tuple[str, str],
        sampling: Sampling | None = None,
        *,
        seeds: tuple[int, int] = (0, 0),
        frames: int = 8,
    ) -> list[Image.Image]:
        """Pictures on the way from one prompt and seed to another, both ends included.

        Prompts are mixed by mixing their estimates, seeds along the sphere on which their noise lies.
        """
        if not 2 <= frames <= 1000:
            raise ValueError(f"frames = {frames}: allowed are whole numbers from 2 to 1000")
        if seeds[0] != seeds[1] and self.resolved(sampling or Sampling()).eta > 0:
            raise ValueError(
                "eta is above 0: fresh noise has no way from one seed to another; take eta = 0 or one seed"
            )
        share = np.linspace(0, 1, frames, dtype=np.float32)
        noise = slerp(*self._noise(seeds), share)
        mix = np.stack([1 - share, share], axis=1)
        captions = [list(prompts)] * frames
        if prompts[0] == prompts[1]:  # one estimate is enough
            mix, captions = np.ones((frames, 1)), [[prompts[0]]] * frames
        drawn, _ = self._drawn(captions, mix, noise, [seeds[0]] * frames, sampling)
        return [as_picture(picture) for picture in drawn]

    def denoising(
        self, prompt: str, sampling: Sampling | None = None, *, seed: int = 0, edit: Edit | None = None
    ) -> list[Image.Image]:
        """What the network takes the picture to be at each step, and at the end the picture."""
        drawn, steps = self._drawn([[prompt]], np.ones((1, 1)), self._noise([seed]), [seed], sampling, edit, trace=True)
        return [as_picture(picture) for picture in (*steps[0], drawn[0])]

    def origin(
        self,
        prompt: str,
        seed: int,
        sampling: Sampling | None = None,
        *,
        edit: Edit | None = None,
        size: int | None = None,
    ) -> Origin:
        """How a picture is drawn, completely: what a PNG remembers."""
        sampling = self.resolved(sampling or Sampling())
        strength, known, drawn = self._known(edit) if edit else (None, None, None)
        pictures = [None if picture is None else sha256(picture) for picture in (known, drawn)]
        return Origin(prompt, seed, sampling, self.hash, size, strength, *pictures)

    def like(self, origin: Origin, edit: Edit | None = None) -> Image.Image:
        """The picture that `origin` tells of, again; `edit` brings the picture and mask that it started from."""
        if origin.checkpoint != self.hash:
            raise ValueError(
                f"the picture was drawn by checkpoint {origin.checkpoint[:12]}…, this one is {self.hash[:12]}…; "
                "name its own (and the ema and guide that drew it)"
            )
        edit = edit and edit._replace(strength=origin.strength)
        again = self.origin(origin.prompt, origin.seed, origin.sampling, edit=edit, size=origin.size)
        for field in ("image", "mask"):
            then, now = getattr(origin, field), getattr(again, field)
            if then != now:
                missing = "it started from one; bring it" if now is None else "it started from another or none"
                raise ValueError(f"{field} is not what the picture was drawn with: {missing}")
        options = {"seeds": origin.seed, "edit": edit, "size": origin.size}
        return self.generate_images([origin.prompt], origin.sampling, **options)[0]

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with nothing left open."""
        eta = solver(sampling.sampler).eta if sampling.eta is None else sampling.eta
        steps = min(STEPS, self.config.T) if sampling.steps is None else sampling.steps
        timesteps(self.schedule, sampling.spacing, steps)  # refuses wrong ones before any work
        return dataclasses.replace(sampling, eta=float(eta), steps=steps)

    def _noise(self, seeds: Sequence[int]) -> Float[np.ndarray, "n h w c"]:
        for seed in seeds:
            if not (isinstance(seed, int | np.integer) and 0 <= seed < 2**31):
                raise ValueError(f"seed = {seed}: allowed are whole numbers from 0 to {2**31 - 1}")
        drawn = [noise_of(jax.device_put(np.int32(seed)), self.shape) for seed in seeds]
        return np.array(jax.device_get(drawn)).reshape(len(seeds), *self.shape)

    def _drawn(
        self,
        captions: list[list[str]],
        mix: Float[np.ndarray, "n k"],
        noise: Float[np.ndarray, "n h w c"],
        seeds: Sequence[int],
        sampling: Sampling | None,
        edit: Edit | None = None,
        trace: bool = False,
    ) -> tuple[UInt8[np.ndarray, "n h w c"], UInt8[np.ndarray, "n s h w c"] | None]:
        """Pictures from k captions each and the noise that they start from, in batches of one size."""
        if not captions:
            return np.zeros((0, *self.shape), np.uint8), None
        if any(not prompt.strip() for each in captions for prompt in each):
            raise ValueError("the prompt is empty: say in a few words what to draw")
        sampling = self.resolved(sampling or Sampling())
        if self.guide_weights is not None and sampling.negative_prompt:
            raise ValueError("negative_prompt and a guide exclude each other: both say what to steer away from")
        along = timesteps(self.schedule, sampling.spacing, sampling.steps)
        known = drawn = None
        if edit is not None:
            strength, image, mask = self._known(edit)
            along = along[-1 - max(1, round(strength * sampling.steps)) :]
            image = np.asarray(to_float(jnp.asarray(image)))
            noise = self.schedule.alpha[along[0]].item() * image + self.schedule.sigma[along[0]].item() * noise
            if mask is not None:
                known, drawn = (np.broadcast_to(part, (len(noise), *part.shape)) for part in (image, mask))

        n = len(captions)
        flat = [prompt for each in captions for prompt in each]
        text = self.encoder([*flat, sampling.negative_prompt], self.config.TEXT_LEN)
        captioned = (part[:-1].reshape(n, -1, *part.shape[1:]) for part in text)
        noise, mix, seeds = np.asarray(noise, np.float32), np.asarray(mix, np.float32), np.asarray(seeds, np.int32)
        every = Request(noise, seeds, *captioned, mix, known, drawn)
        controls = jax.device_put(self._controls(sampling, *(part[-1] for part in text)))
        pictures, steps = [], []
        for first in range(0, n, self.batch):
            part = jax.tree.map(lambda array, first=first: array[first : first + self.batch], every)
            padded = jax.tree.map(lambda array: np.resize(array, (self.batch, *array.shape[1:])), part)
            options = {"sampler": sampling.sampler, "along": tuple(along.tolist()), "trace": trace}
            request = jax.device_put(padded)
            image, on_the_way = self._draw(self.weights, self.guide_weights, request, controls, **options)
            pictures.append(self._finished(image, sampling)[: len(part.seeds)])
            steps += [self._finished(on_the_way, sampling)[: len(part.seeds)]] if trace else []
        return np.concatenate(pictures), np.concatenate(steps) if trace else None

    def _controls(
        self, sampling: Sampling, negative_emb: Float[np.ndarray, "l d"], negative_mask: Bool[np.ndarray, "l"]
    ) -> Controls:
        return Controls(
            guidance=None if sampling.c == 1 else np.float32(sampling.c),
            rescale=np.float32(sampling.rescale),
            interval=None if sampling.interval == (0.0, 1.0) else np.float32(sampling.interval),
            percentile=None if sampling.percentile is None else np.float32(sampling.percentile),
            eta=np.float32(sampling.eta),
            temperature=np.float32(sampling.temperature),
            negative_emb=negative_emb,
            negative_mask=negative_mask,
        )

    def _finished(self, image: UInt8[Array, "b ... c"], sampling: Sampling) -> UInt8[np.ndarray, "b ... c"]:
        image = jax.device_get(image)
        return on_white(image) if sampling.on_white and self.config.CHANNELS == 4 else image

    def _known(self, edit: Edit) -> tuple[float, UInt8[np.ndarray, "h w c"], Bool[np.ndarray, "h w 1"] | None]:
        """Strength, picture and mask of an edit, each checked."""
        strength = edit.strength if edit.strength is not None else 0.6 if edit.mask is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength = {strength}: allowed are numbers above 0 up to 1")
        image = self._opened("image", edit.image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ValueError(f"image: its mode is {image.mode}; save it as an RGB or RGBA PNG")
        known = dataset.fit(image.convert("RGBA"), *self.shape)
        if edit.mask is None:
            return strength, known, None
        mask = self._opened("mask", edit.mask)
        if mask.mode not in ("1", "L"):
            raise ValueError(f"mask: its mode is {mask.mode}; save it in grey (L) or black and white (1)")
        return strength, known, np.asarray(mask.convert("L"))[..., None] > 127

    def _opened(self, name: str, picture: Image.Image | str | Path) -> Image.Image:
        if not isinstance(picture, Image.Image):
            picture = Image.open(picture)
        if picture.size != (self.config.W, self.config.H):
            sizes = f"{picture.width} x {picture.height}; this checkpoint draws {self.config.W} x {self.config.H}"
            raise ValueError(f"{name} is {sizes}: resize it first")
        return picture


def _about(path: Path) -> tuple[dict[str, Any], Params]:
    """The JSON part of a checkpoint and the configuration in it."""
    about = checkpoints.about(path)
    try:
        config = Params.from_json(about["config"])
        if about["schedule"] != {"name": schedules.NAME, "T": config.T}:
            raise ValueError(f"schedule {about['schedule']}: only {schedules.NAME!r} is known")
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(f"{path / 'about'}: {error}") from error
    return about, config


def _network(path: Path, about: dict, config: Params, encoder: TextEncoder, ema: str) -> tuple[nnx.GraphDef, dict]:
    """Structure and averaged weights of a checkpoint that was trained with `encoder`."""
    then, now = about["encoder"]["sha256"], encoder.identity["sha256"]
    if then != now:
        raise checkpoints.CheckpointError(
            f"{path} was trained with the files {then[:12]}… of {config.encoder}, those here are {now[:12]}…; "
            "bring the encoder that it was trained with"
        )
    graphdef, like = nnx.split(nnx.eval_shape(lambda: UNet(config, encoder.dim, nnx.Rngs(0))))
    weights = checkpoints.restore(path, {f"ema_{ema}": nnx.to_pure_dict(like)})[f"ema_{ema}"]
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)):
        raise checkpoints.CheckpointError(f"{path}: the weights hold non-finite numbers; take an earlier checkpoint")
    return graphdef, weights
