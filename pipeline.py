"""From words to pictures: a checkpoint, its text encoder and a sampler behind one method.

    from pipeline import DiffusionPipeline
    DiffusionPipeline("models_vA0/final").generate_image("red heart", "heart.png", cfg=True, c=7)

The same prompt and seed give the same picture, whatever else is drawn beside it: each picture starts from noise of
its own seed, and the network always runs on batches of one fixed size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

import checkpoint as checkpoints
import device
import schedule as schedules
from dataloader import to_bytes
from grids import as_picture, save_png
from model import UNet
from params import Params
from samplers import ddim, guide, threshold, trailing
from text_encoder import TextEncoder

STEPS = 25  # of the sampler, where nobody says otherwise

Context = tuple[Float[Array, "l d"], Bool[Array, "l"]]  # embeddings and mask of one caption's tokens


def build_draw(config: Params, graphdef: nnx.GraphDef) -> Callable[..., UInt8[Array, "b h w c"]]:
    """The jitted function that draws a batch; it is compiled once per batch size, steps and guided or not.

    draw(weights, seeds [b], text_emb [b, l, d], text_mask [b, l], null, guidance, steps=…, guided=…) -> uint8 pictures.
    Guided drawing evaluates the network on a doubled batch; guidance itself may change without recompilation.
    """
    schedule = schedules.cosine(config.T)
    shape = (config.H, config.W, config.CHANNELS)

    @partial(jax.jit, static_argnames=("steps", "guided"))
    def draw(
        weights: dict,
        seeds: Int[Array, "b"],
        text_emb: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        null: Context,
        guidance: Float[Array, ""],
        *,
        steps: int,
        guided: bool,
    ) -> UInt8[Array, "b h w c"]:
        model = nnx.merge(graphdef, nnx.State(weights))
        if guided:
            null_emb, null_mask = (jnp.broadcast_to(part, (len(seeds), *part.shape)) for part in null)
            text_emb = jnp.concatenate([text_emb, null_emb])
            text_mask = jnp.concatenate([text_mask, null_mask])

        def denoise(noisy: Float[Array, "b h w c"], t: Int[Array, "b"]) -> Float[Array, "b h w c"]:
            copies = 2 if guided else 1
            predicted = model(jnp.tile(noisy, (copies, 1, 1, 1)), jnp.tile(t, copies), text_emb, text_mask)
            if guided:
                predicted = guide(*jnp.split(predicted, 2), guidance)
            return threshold(schedules.denoised_from(schedule, noisy, predicted, t, config.prediction))

        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)
        return to_bytes(ddim(denoise, schedule, noise, trailing(config.T, steps)))

    return draw


class DiffusionPipeline:
    """Draws pictures from prompts with the averaged weights of a checkpoint.

    Errors: CheckpointError where the checkpoint is missing, damaged or of another encoder; EncoderError where its
    encoder cannot be had; ValueError for a prompt, guidance, steps, seed or size that cannot be drawn.
    """

    def __init__(
        self,
        checkpoint: str | Path = "models_vA0/final",
        encoder: str | None = None,
        *,
        ema: Literal["short", "long"] = "short",
    ):
        """encoder: where the text encoder is, if no longer under the name that the checkpoint was trained with.
        ema: which of the two averages of the weights draws.
        """
        if ema not in ("short", "long"):
            raise ValueError(f"ema = {ema!r}: allowed are 'short' and 'long'")
        device.keep_compiled()
        path = Path(checkpoint)
        self.about = checkpoints.about(path)
        try:
            self.config = Params.from_json(self.about["config"])
            if self.about["schedule"] != {"name": schedules.NAME, "T": self.config.T}:
                raise ValueError(f"schedule {self.about['schedule']}: only {schedules.NAME!r} is known")
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"{path / 'about'}: {error}") from error
        self.encoder = TextEncoder(encoder or self.config.encoder)
        then, now = self.about["encoder"]["sha256"], self.encoder.identity["sha256"]
        if then != now:
            raise checkpoints.CheckpointError(
                f"{path} was trained with the files {then[:12]}… of {self.config.encoder}, those here are {now[:12]}…; "
                "bring the encoder that it was trained with"
            )
        graphdef, like = nnx.split(nnx.eval_shape(lambda: UNet(self.config, self.encoder.dim, nnx.Rngs(0))))
        self.weights = checkpoints.restore(path, {f"ema_{ema}": nnx.to_pure_dict(like)})[f"ema_{ema}"]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.weights)):
            raise checkpoints.CheckpointError(
                f"{path}: the weights hold non-finite numbers; take an earlier checkpoint"
            )
        self.null = tuple(part[0] for part in self.encoder([""], self.config.TEXT_LEN))
        self.batch = 16 if device.on_accelerator() else 4  # pictures per call of the network; small fits a CPU's cache
        self._draw = build_draw(self.config, graphdef)

    def generate_image(
        self,
        prompt: str,
        output_path: str | Path | None = None,
        cfg: bool = True,
        c: float = 7,
        *,
        steps: int | None = None,
        seed: int = 0,
        size: int | None = None,
    ) -> Image.Image:
        """Draw a prompt; writes a PNG where output_path is given.

        cfg: classifier-free guidance of strength c (1: the plain conditional model). size: side of the returned
        picture in pixels, resized from the model's own; None leaves it. steps: of the sampler; None takes 25.
        """
        (image,) = self.generate_images([prompt], cfg, c, steps=steps, seeds=[seed], size=size)
        if output_path is not None:
            save_png(image, Path(output_path), {"prompt": prompt, "c": c if cfg else 1, "seed": seed})
        return image

    def generate_images(
        self,
        prompts: Sequence[str],
        cfg: bool = True,
        c: float = 7,
        *,
        steps: int | None = None,
        seeds: int | Sequence[int] = 0,
        size: int | None = None,
    ) -> list[Image.Image]:
        """Draw any number of prompts, each from its own seed (or all from one)."""
        if size is not None and not 1 <= size <= 8192:
            raise ValueError(f"size = {size}: allowed are whole numbers of pixels from 1 to 8192")
        pictures = self.generate_arrays(prompts, cfg, c, steps=steps, seeds=seeds)
        images = [as_picture(picture) for picture in pictures]
        if size is None:
            return images
        height = max(1, round(size * self.config.H / self.config.W))
        return [image.resize((size, height), Image.Resampling.LANCZOS) for image in images]

    def generate_arrays(
        self,
        prompts: Sequence[str],
        cfg: bool = True,
        c: float = 7,
        *,
        steps: int | None = None,
        seeds: int | Sequence[int] = 0,
    ) -> UInt8[np.ndarray, "n h w c"]:
        """As generate_images, as one array of bytes."""
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list of prompts, or call generate_image")
        seeds = [seeds] * len(prompts) if isinstance(seeds, int | np.integer) else list(seeds)
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the prompt is empty: say in a few words what to draw")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one for each prompt")
        if not all(0 <= seed < 2**31 for seed in seeds):
            raise ValueError(f"seed = {seeds}: allowed are whole numbers from 0 to {2**31 - 1}")
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"c = {c}: allowed are finite numbers from 0 up (1 is no guidance, 7 the default)")
        steps = min(STEPS, self.config.T) if steps is None else steps
        trailing(self.config.T, steps)  # refuses wrong steps before any work

        text_emb, text_mask = self.encoder(list(prompts), self.config.TEXT_LEN)
        pictures = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            batch = (np.asarray(seeds[part], np.int32), text_emb[part], text_mask[part])
            padded = [np.resize(array, (self.batch, *array.shape[1:])) for array in batch]
            drawn = self._draw(self.weights, *padded, self.null, float(c), steps=steps, guided=cfg and c != 1)
            pictures.append(np.asarray(drawn)[: len(batch[0])])
        if not pictures:
            return np.zeros((0, self.config.H, self.config.W, self.config.CHANNELS), np.uint8)
        return np.concatenate(pictures)
