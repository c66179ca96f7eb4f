"""The network: a U-Net from a noisy image, its step t and a caption to the noise, the velocity or the clean image.

    noisy ─ patchify ─ convolution
      down     stages, the output of each kept as a skip; halve         at each resolution; the last is not halved
      middle   stage, ResBlock
      up       stages, each given the last skip left; double            at each resolution; the first is not doubled
    group norm, SiLU ─ convolution ─ unpatchify ─ prediction, or where a Refiner follows, what that makes of it

A stage is a ResBlock, then self-attention and cross-attention at the resolutions that the configuration names. The step
and the mean of the caption's tokens scale and shift a group norm in each ResBlock (Dhariwal & Nichol 2021, Section
3.1); the tokens themselves enter by cross-attention (Rombach et al. 2022, Section 3.3). Every residual branch, and the
network itself, ends in a layer initialised to zero, so that the network starts as the zero function.

Conv is a 3 × 3 convolution; Upsample repeats each pixel to 2 × 2, then convolves; GroupNorm(x, scale, shift) is
norm(x) * (1 + scale) + shift, with SiLU after it where silu=True. kernels.py makes these three fast.
"""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from augmentation import LABELS
from kernels import Conv, GroupNorm, Upsample
from params import Params

Image = Float[Array, "b h w c"]
Features = Float[Array, "b h w _"]  # _: their channels, which layers change
Condition = Float[Array, "b d"]
Tokens = Float[Array, "b l e"]
Mask = Bool[Array, "b l"]  # False at padding
Rngs = nnx.Rngs | None  # dropout keys, or None for no dropout

# Shape comments are aligned by hand:
# fmt: off


def patchify(image: Image, size: int) -> Float[Array, "b rows columns d"]:
    """Fold each size × size patch of pixels into channels: d = size² c."""
    b, h, w, c = image.shape
    patches = image.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)          # [b, h/s, w/s, s, s, c]
    return patches.reshape(b, h // size, w // size, size**2 * c)                            # [b, h/s, w/s, s² c]


def unpatchify(patches: Float[Array, "b rows columns d"], size: int) -> Image:
    """The inverse of patchify."""
    b, rows, columns, d = patches.shape
    pixels = patches.reshape(b, rows, columns, size, size, d // size**2).swapaxes(2, 3)     # [b, h/s, s, w/s, s, c]
    return pixels.reshape(b, rows * size, columns * size, d // size**2)                     # [b, h, w, c]


def sinusoid(t: Int[Array, "b"], size: int) -> Float[Array, "b size"]:
    """Sines and cosines of t at wavelengths from 2π to 20000π (Vaswani et al. 2017, Section 3.5)."""
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(size // 2) / (size // 2))
    angle = t[:, None] * frequency[None, :]                             # [b, size/2]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)   # [b, size]


class TimestampNet(nnx.Module):
    """Embed the step t by sinusoids (Vaswani et al. 2017), then by an MLP, as the network of Ho et al. 2020 does."""

    def __init__(self, T_dim: int, T_out: int, rngs: nnx.Rngs):
        self.T_dim = T_dim
        self.hidden = nnx.Linear(T_dim, T_out, rngs=rngs)
        self.out = nnx.Linear(T_out, T_out, rngs=rngs)

    def __call__(self, t: Int[Array, "b"]) -> Float[Array, "b T_out"]:
        waves = sinusoid(t, self.T_dim).astype(self.hidden.kernel.dtype)    # [b, T_dim], in float32 up to here
        return self.out(nnx.silu(self.hidden(waves)))                       # [b, T_out]


class ResBlock(nnx.Module):
    """Two convolutions with a residual; the condition scales and shifts the second norm (adaptive group norm)."""

    def __init__(self, channels: int, out: int, config: Params, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(channels, silu=True)
        self.conv1 = Conv(channels, out, rngs)
        self.modulation = nnx.Linear(config.T_out, 2 * out, rngs=rngs)
        self.norm2 = GroupNorm(out, silu=True)
        self.dropout = nnx.Dropout(config.dropout)
        self.conv2 = Conv(out, out, rngs, zero=True)
        self.skip = nnx.Conv(channels, out, (1, 1), rngs=rngs) if channels != out else None

    def __call__(self, x: Features, condition: Condition, rngs: Rngs) -> Features:
        scale, shift = jnp.split(self.modulation(condition)[:, None, None], 2, axis=-1)  # [b, 1, 1, out] each
        h = self.conv1(self.norm1(x))                                                    # [b, h, w, out]
        h = self.norm2(h, scale, shift)
        h = self.conv2(self.dropout(h, deterministic=rngs is None, rngs=rngs))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nnx.Module):
    """Multi-head attention with a residual, of pixels to pixels, or to those tokens of a context that mask shows."""

    def __init__(self, channels: int, head_dim: int, rngs: nnx.Rngs, context: int | None = None):
        self.head_dim = head_dim
        self.norm = GroupNorm(channels)
        self.query = nnx.Linear(channels, channels, rngs=rngs)
        self.key_value = nnx.Linear(context or channels, 2 * channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Features, context: Tokens | None = None, mask: Mask | None = None) -> Features:
        b, h, w, c = x.shape
        heads = (c // self.head_dim, self.head_dim)
        pixels = self.norm(x).reshape(b, h * w, c)                               # [b, h*w, c]
        context = pixels if context is None else context                         # [b, l, e]
        mask = None if mask is None else mask[:, None, None, :]                  # [b, 1, 1, l]
        query = self.query(pixels).reshape(b, h * w, *heads)                     # [b, h*w, heads, head_dim]
        key, value = jnp.split(self.key_value(context), 2, axis=-1)              # [b, l, c] each
        key, value = key.reshape(b, -1, *heads), value.reshape(b, -1, *heads)    # [b, l, heads, head_dim] each
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask)    # [b, h*w, heads, head_dim]
        return x + self.out(attended.reshape(b, h * w, c)).reshape(x.shape)      # [b, h, w, c]


class Stage(nnx.Module):
    """A ResBlock and the attentions of its resolution."""

    def __init__(self, channels: int, out: int, level: int, text_dim: int, config: Params, rngs: nnx.Rngs):
        self.block = ResBlock(channels, out, config, rngs)
        self.self_attention = Attention(out, config.HEAD_DIM, rngs) if level in config.self_attention else None
        sees_text = level in config.cross_attention
        self.cross_attention = Attention(out, config.HEAD_DIM, rngs, context=text_dim) if sees_text else None

    def __call__(self, x: Features, condition: Condition, text_emb: Tokens, text_mask: Mask, rngs: Rngs) -> Features:
        x = self.block(x, condition, rngs)
        x = x if self.self_attention is None else self.self_attention(x)
        return x if self.cross_attention is None else self.cross_attention(x, text_emb, text_mask)


class Refiner(nnx.Module):
    """refined = coarse + R(coarse, condition): mend a picture that was made of large patches.

    A convolution over patches can only mix fixed patterns, whose borders and texture stay in the picture. These layers
    see it on patches of 2. They do not see the noisy image: with it, they learn little noise soon, and sampling
    repeats their mistakes as speckles (LOG.md, 2026-11-28).
    """

    SIZE = 2  # pixels per side of a patch

    def __init__(self, config: Params, rngs: nnx.Rngs):
        pixels = config.CHANNELS * self.SIZE**2
        self.entry = Conv(pixels, config.REFINER, rngs)
        self.block = ResBlock(config.REFINER, config.REFINER, config, rngs)
        self.exit_norm = GroupNorm(config.REFINER, silu=True)
        self.exit = Conv(config.REFINER, pixels, rngs, zero=True)

    def __call__(self, coarse: Image, condition: Condition, rngs: Rngs) -> Image:
        x = self.entry(patchify(coarse, self.SIZE))                             # [b, h/2, w/2, REFINER]
        x = self.block(x, condition, rngs)
        return coarse + unpatchify(self.exit(self.exit_norm(x)), self.SIZE)     # [b, h, w, c]


class UNet(nnx.Module):
    """prediction = UNet(noisy, t, text_emb, text_mask)"""

    def __init__(self, config: Params, text_dim: int, rngs: nnx.Rngs):
        dims = [config.BASE_DIM * mult for mult in config.DIM_MULTS]
        pixels, last = config.CHANNELS * config.PATCH**2, len(dims) - 1

        def stages(channels: int, skip: int, level: int) -> list[Stage]:
            entering = [channels] + [dims[level]] * (config.BLOCKS - 1)
            return [Stage(c + skip, dims[level], level, text_dim, config, rngs) for c in entering]

        self.patch = config.PATCH
        self.timestamp = TimestampNet(config.T_dim, config.T_out, rngs)
        self.text_norm = nnx.LayerNorm(text_dim, rngs=rngs)
        self.pooled_text = nnx.Linear(text_dim, config.T_out, rngs=rngs)
        zero = {"use_bias": False, "kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.augmentation = nnx.Linear(len(LABELS), config.T_out, **zero) if config.augmentation else None
        self.entry = Conv(pixels, dims[0], rngs)

        self.down, self.halve = nnx.List(), nnx.List()
        for level, dim in enumerate(dims):
            self.down.append(nnx.List(stages(dims[max(level - 1, 0)], 0, level)))
            if level < last:
                self.halve.append(nnx.Conv(dim, dim, (3, 3), strides=2, rngs=rngs))

        self.middle = nnx.List([Stage(dim, dim, last, text_dim, config, rngs), ResBlock(dim, dim, config, rngs)])
        self.up, self.double = nnx.List(), nnx.List()
        for level, dim in reversed(list(enumerate(dims))):
            self.up.append(nnx.List(stages(dims[min(level + 1, last)], dim, level)))
            if level > 0:
                self.double.append(Upsample(dim, dim, rngs))
        self.exit_norm = GroupNorm(dims[0], silu=True)
        self.exit = Conv(dims[0], pixels, rngs, zero=True)
        self.refiner = Refiner(config, rngs) if config.REFINER else None

    def __call__(
        self, noisy: Image, t: Int[Array, "b"], text_emb: Tokens, text_mask: Mask,
        augmentation: Float[Array, "b labels"] | None = None, dropout_key: Key[Array, ""] | None = None,
    ) -> Image:
        """augmentation: the labels of augmentation.augment; dropout_key: turns dropout on. Both are for training."""
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        text_emb = self.text_norm(text_emb)                                     # [b, l, e]
        visible = text_mask[:, :, None].astype(text_emb.dtype)                  # [b, l, 1]
        pooled = (text_emb * visible).sum(axis=1) / visible.sum(axis=1)         # [b, e]
        condition = self.timestamp(t) + self.pooled_text(pooled)                # [b, T_out]
        if self.augmentation is not None and augmentation is not None:
            condition = condition + self.augmentation(augmentation)
        condition = nnx.silu(condition)
        inputs = condition, text_emb, text_mask, rngs

        x, skips = self.entry(patchify(noisy, self.patch)), []                  # [b, h/PATCH, w/PATCH, BASE_DIM]
        for level, stages in enumerate(self.down):
            for stage in stages:
                x = stage(x, *inputs)                                           # [b, h, w, dim of the level]
                skips.append(x)
            if level < len(self.halve):
                x = self.halve[level](x)                                        # [b, h/2, w/2, dim]
        stage, block = self.middle
        x = block(stage(x, *inputs), condition, rngs)
        for level, stages in enumerate(self.up):
            for stage in stages:
                x = stage(jnp.concatenate([x, skips.pop()], axis=-1), *inputs)  # [b, h, w, dim of the level]
            if level < len(self.double):
                x = self.double[level](x)                                       # [b, 2h, 2w, dim]
        coarse = unpatchify(self.exit(self.exit_norm(x)), self.patch)           # [b, h, w, c]
        return coarse if self.refiner is None else self.refiner(coarse, condition, rngs)


@cache
def abstract(config: Params, text_dim: int) -> tuple[nnx.GraphDef, dict]:
    """The UNet for captions of `text_dim` numbers per token: its structure, and the shapes of its weights."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet(config, text_dim, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def network(config: Params, weights: dict) -> Callable[..., Image]:
    """The UNet with these weights as a function, float32 outside and `config.compute` inside."""

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)

    def predict(noisy: Image, t: Int[Array, "b"], text_emb: Tokens, *others) -> Image:
        graphdef, _ = abstract(config, text_emb.shape[-1])
        model = nnx.merge(graphdef, nnx.State(cast(weights, config.compute)))
        return cast(model(*cast((noisy, t, text_emb, *others), config.compute)), jnp.float32)

    return predict
