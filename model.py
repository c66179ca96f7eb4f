"""The network: a U-Net that looks at a noisy picture, the step t and a caption, and predicts the noise
(or the velocity, or the clean picture: the network does not know which).

    pixels ─ fold PATCH × PATCH pixels into channels ─ conv
      down:  ResBlock (+ self-attention) (+ cross-attention to the caption's tokens), halve        once per resolution
      middle
      up:    the same, each block also fed the matching output of the way down, double
    norm ─ conv, initialised to zero ─ unfold ─ prediction

Training may leave out features (dropout) and tells the network how a picture was changed (augmentation); drawing gives
neither. The weights are float32; `network` computes with them in float32 or bfloat16.

The step enters every ResBlock as a scale and shift of its group norm (Dhariwal & Nichol 2021, Section 3), together
with the mean of the caption's tokens; the tokens themselves enter by cross-attention (Rombach et al. 2022, Section
3.3). Every residual branch ends in a zero-initialised layer, so that the network starts as the zero function.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from augmentation import LABELS
from kernels import Conv3x3, GroupNorm, Upsample, affine_silu
from params import Params


def patchify(image: Float[Array, "b h w c"], size: int) -> Float[Array, "b rows columns d"]:
    """Fold size × size pixels into channels (space to depth): d = size² c."""
    b, h, w, c = image.shape
    blocks = image.reshape(b, h // size, size, w // size, size, c)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


def unpatchify(folded: Float[Array, "b rows columns d"], size: int) -> Float[Array, "b h w c"]:
    """The inverse of patchify (depth to space)."""
    b, rows, columns, d = folded.shape
    blocks = folded.reshape(b, rows, columns, size, size, d // size**2)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * size, columns * size, d // size**2)


def sinusoid(t: Int[Array, "b"], size: int) -> Float[Array, "b size"]:
    """Sines and cosines of t at wavelengths from 2π to 20000π steps (Vaswani et al. 2017, Section 3.5)."""
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(size // 2) / (size // 2))
    angle = t[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class TimestampNet(nnx.Module):
    """The step t as a vector: sinusoidal embedding, then an MLP."""

    def __init__(self, T_dim: int, T_out: int, rngs: nnx.Rngs):
        self.T_dim = T_dim
        self.hidden = nnx.Linear(T_dim, T_out, rngs=rngs)
        self.out = nnx.Linear(T_out, T_out, rngs=rngs)

    def __call__(self, t: Int[Array, "b"]) -> Float[Array, "b T_out"]:
        waves = sinusoid(t, self.T_dim).astype(self.hidden.kernel.dtype)  # float32 until here: t has many values
        return self.out(nnx.silu(self.hidden(waves)))


class ResBlock(nnx.Module):
    """Two convolutions and a residual; the condition scales and shifts the second group norm."""

    def __init__(self, channels: int, out: int, config: Params, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(channels)
        self.conv1 = Conv3x3(channels, out, rngs)
        self.modulation = nnx.Linear(config.T_out, 2 * out, rngs=rngs)
        self.norm2 = GroupNorm(out)
        self.dropout = nnx.Dropout(config.dropout)
        self.conv2 = Conv3x3(out, out, rngs, zero=True)
        self.skip = nnx.Conv(channels, out, (1, 1), rngs=rngs) if channels != out else None

    def __call__(
        self, x: Float[Array, "b h w c"], condition: Float[Array, "b d"], chance: nnx.Rngs | None
    ) -> Float[Array, "b h w out"]:
        scale, shift = jnp.split(self.modulation(condition)[:, None, None, :], 2, axis=-1)
        h = self.conv1(affine_silu(x, *self.norm1.affine(x)))
        factor, offset = self.norm2.affine(h)
        h = affine_silu(h, factor * (1 + scale), offset * (1 + scale) + shift)
        h = self.conv2(self.dropout(h, deterministic=chance is None, rngs=chance))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nnx.Module):
    """Multi-head attention with a residual: over the picture itself, or over the caption's visible tokens."""

    def __init__(self, channels: int, head_dim: int, rngs: nnx.Rngs, *, context: int | None = None):
        self.head_dim = head_dim
        self.norm = GroupNorm(channels)
        self.query = nnx.Linear(channels, channels, rngs=rngs)
        self.key_value = nnx.Linear(context or channels, 2 * channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        pixels = self.norm(x).reshape(b, h * w, c)
        query = self.query(pixels).reshape(b, h * w, -1, self.head_dim)
        key, value = jnp.split(self.key_value(pixels if context is None else context), 2, axis=-1)
        key, value = (part.reshape(b, part.shape[1], -1, self.head_dim) for part in (key, value))
        visible = None if mask is None else mask[:, None, None, :]
        attended = jax.nn.dot_product_attention(query, key, value, mask=visible)
        return x + self.out(attended.reshape(b, h * w, c)).reshape(x.shape)


class Stage(nnx.Module):
    """A ResBlock, then the attentions that its resolution has."""

    def __init__(self, channels: int, out: int, level: int, text_dim: int, config: Params, rngs: nnx.Rngs):
        self.block = ResBlock(channels, out, config, rngs)
        self.self_attention = Attention(out, config.HEAD_DIM, rngs) if level in config.self_attention else None
        self.cross_attention = (
            Attention(out, config.HEAD_DIM, rngs, context=text_dim) if level in config.cross_attention else None
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        condition: Float[Array, "b d"],
        text: Float[Array, "b l e"],
        text_mask: Bool[Array, "b l"],
        chance: nnx.Rngs | None,
    ) -> Float[Array, "b h w out"]:
        x = self.block(x, condition, chance)
        if self.self_attention is not None:
            x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, text, text_mask)
        return x


class UNet(nnx.Module):
    """prediction = UNet(noisy, t, text_emb, text_mask); see the module's docstring for the plan."""

    def __init__(self, config: Params, text_dim: int, rngs: nnx.Rngs):
        dims = [config.BASE_DIM * mult for mult in config.DIM_MULTS]
        pixels = config.CHANNELS * config.PATCH**2
        last = len(dims) - 1

        def stage(channels: int, out: int, level: int) -> Stage:
            return Stage(channels, out, level, text_dim, config, rngs)

        self.patch = config.PATCH
        self.timestamp = TimestampNet(config.T_dim, config.T_out, rngs)
        self.text_norm = nnx.LayerNorm(text_dim, rngs=rngs)
        self.pooled_text = nnx.Linear(text_dim, config.T_out, rngs=rngs)
        told = {"use_bias": False, "kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.augmentation = nnx.Linear(len(LABELS), config.T_out, **told) if config.augmentation else None
        self.entry = Conv3x3(pixels, dims[0], rngs)

        channels, skips = dims[0], []
        self.down, self.halve = nnx.List(), nnx.List()
        for level, dim in enumerate(dims):
            self.down.append(nnx.List())
            for _ in range(config.BLOCKS):
                self.down[level].append(stage(channels, dim, level))
                channels = dim
                skips.append(dim)
            if level < last:
                self.halve.append(nnx.Conv(dim, dim, (3, 3), strides=2, rngs=rngs))

        self.middle = nnx.List([stage(channels, channels, last), ResBlock(channels, channels, config, rngs)])

        self.up, self.double = nnx.List(), nnx.List()
        for level, dim in reversed(list(enumerate(dims))):
            self.up.append(nnx.List())
            for _ in range(config.BLOCKS):
                self.up[last - level].append(stage(channels + skips.pop(), dim, level))
                channels = dim
            if level > 0:
                self.double.append(Upsample(dim, dim, rngs))

        self.exit_norm = GroupNorm(channels)
        self.exit = Conv3x3(channels, pixels, rngs, zero=True)

    def __call__(
        self,
        noisy: Float[Array, "b h w c"],
        t: Int[Array, "b"],
        text_emb: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        augmentation: Float[Array, "b labels"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w c"]:
        """augmentation: how much of each change the pictures have had, none if left out; dropout_key: for training."""
        chance = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        text = self.text_norm(text_emb)
        visible = text_mask[:, :, None].astype(text.dtype)
        pooled = (text * visible).sum(axis=1) / visible.sum(axis=1)
        condition = self.timestamp(t) + self.pooled_text(pooled)
        if self.augmentation is not None and augmentation is not None:
            condition = condition + self.augmentation(augmentation)
        condition = nnx.silu(condition)

        x = self.entry(patchify(noisy, self.patch))
        skips = []
        for level, stages in enumerate(self.down):
            for stage in stages:
                x = stage(x, condition, text, text_mask, chance)
                skips.append(x)
            if level < len(self.halve):
                x = self.halve[level](x)

        stage, block = self.middle
        x = block(stage(x, condition, text, text_mask, chance), condition, chance)

        for level, stages in enumerate(self.up):
            for stage in stages:
                x = stage(jnp.concatenate([x, skips.pop()], axis=-1), condition, text, text_mask, chance)
            if level < len(self.double):
                x = self.double[level](x)

        return unpatchify(self.exit(affine_silu(x, *self.exit_norm.affine(x))), self.patch)


def network(config: Params, graphdef: nnx.GraphDef, weights: dict) -> Callable[..., Float[Array, "b h w c"]]:
    """The function that a UNet with these weights is, float32 outside and `config.compute` inside."""

    def cast(tree, dtype):
        def one(leaf: Array) -> Array:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, tree)

    model = nnx.merge(graphdef, nnx.State(cast(weights, config.compute)))
    return lambda *inputs: cast(model(*cast(inputs, config.compute)), jnp.float32)
