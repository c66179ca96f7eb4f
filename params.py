"""Hyper-parameters of a run (not the network's weights): one frozen dataclass, and a small table of presets.

Names in capitals are sizes, the others are choices. `python train.py quick --MAX_INDEX 128 --B 32` starts from
a preset and overrides any field; the whole configuration travels as JSON inside every checkpoint, so that
drawing from one needs nothing but its path.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

RANGES = {  # lowest and highest allowed value
    "MAX_INDEX": (0, 10_000_000),
    "max_bad": (0.0, 1.0),
    "H": (1, 1024),
    "W": (1, 1024),
    "TEXT_LEN": (2, 512),
    "caption_variants": (0.0, 1.0),
    "embedding_dropout": (0.0, 1.0),
    "T": (2, 100_000),
    "T_dim": (2, 4096),
    "T_out": (1, 8192),
    "BASE_DIM": (1, 4096),
    "PATCH": (1, 64),
    "BLOCKS": (1, 16),
    "HEAD_DIM": (1, 1024),
    "B": (1, 65_536),
    "epochs": (1, 1_000_000),
    "minutes": (0.0, 1_000_000.0),
    "learning_rate": (0.0, 1.0),
    "warmup": (0, 1_000_000),
    "weight_decay": (0.0, 1.0),
    "clip": (1e-6, 1e6),
    "ema_short": (0.0, 1.0),
    "ema_long": (0.0, 1.0),
    "seed": (0, 2**31 - 1),
    "log_every": (1, 1_000_000),
    "sample_every": (1, 1_000_000),
    "save_every": (1, 1_000_000),
}


@dataclass(frozen=True)
class Params:
    # Pictures and captions
    data: str = "emojiimage-dataset"  # folder with full_emoji.csv and image/<vendor>/<#>.png
    vendor: str = "Google"  # whose pictures: the folder under image/, or several joined by "+"
    MAX_INDEX: int = 0  # train on the first MAX_INDEX rows of the CSV that have a picture (0: all)
    max_bad: float = 0.05  # refuse a dataset with a larger share of broken rows and pictures
    H: int = 64  # height of a picture, pixels
    W: int = 64  # width of a picture, pixels
    stream: bool = False  # decode pictures from the disk as training goes, where they do not fit in memory
    CHANNELS: int = 3  # 1 grey, 3 colour on white, 4 colour with transparency

    # Text
    encoder: str = "BAAI/bge-small-en"  # frozen BERT: a hub name or a folder
    TEXT_LEN: int = 32  # tokens of a caption; longer ones are cut
    caption_variants: float = 0.0  # chance that training replaces a caption by one made from the row's keywords
    embedding_dropout: float = 0.1  # chance that training replaces a caption by the empty one, for guidance

    # Diffusion
    T: int = 1000  # steps from picture to noise
    prediction: Literal["eps", "v", "x0"] = "eps"  # what the network predicts: noise, velocity, clean picture

    # Network
    T_dim: int = 128  # size of the sinusoidal timestep embedding
    T_out: int = 512  # size of the timestep embedding after its MLP
    BASE_DIM: int = 128  # channels at the first resolution
    DIM_MULTS: tuple[int, ...] = (1, 2, 2, 2)  # channels per resolution, in units of BASE_DIM; each halves the size
    PATCH: int = 1  # pixels per side folded into channels at entry, unfolded at exit
    BLOCKS: int = 2  # ResNet blocks per resolution
    self_attention: tuple[int, ...] = (2, 3)  # resolutions with self-attention (0: the first)
    cross_attention: tuple[int, ...] = (1, 2, 3)  # resolutions with cross-attention to the caption's tokens
    HEAD_DIM: int = 64  # channels per attention head

    # Training
    B: int = 64  # batch size, pictures
    epochs: int = 2000  # passes over the pictures
    minutes: float = 0.0  # end after so much time in training steps, if that comes first (0: no limit)
    learning_rate: float = 2e-4  # AdamW, after warm-up
    warmup: int = 500  # steps of linear warm-up
    weight_decay: float = 0.01  # AdamW
    clip: float = 1.0  # largest norm of a gradient
    ema_short: float = 0.9995  # decay per step of the averaged weights that draw unless told otherwise
    ema_long: float = 0.9999  # decay per step of a second, longer average
    seed: int = 0  # of the initial weights, the order of the data, the noise

    # Records
    log_every: int = 50  # steps between two lines of metrics.jsonl
    sample_every: int = 100  # epochs between two sample grids
    save_every: int = 100  # epochs between two checkpoints

    def __post_init__(self):
        for field, (low, high) in RANGES.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{field} = {value}: allowed are values from {low} to {high}")
        if self.CHANNELS not in (1, 3, 4):
            raise ValueError(f"CHANNELS = {self.CHANNELS}: allowed are 1 (grey), 3 (colour), 4 (with transparency)")
        if self.prediction not in ("eps", "v", "x0"):
            raise ValueError(f"prediction = {self.prediction!r}: allowed are 'eps', 'v' and 'x0'")
        if self.ema_long < self.ema_short:
            raise ValueError(f"ema_long = {self.ema_long}: allowed are values from ema_short = {self.ema_short} up")
        if not self.DIM_MULTS or min(self.DIM_MULTS) < 1:
            raise ValueError(f"DIM_MULTS = {self.DIM_MULTS}: allowed are one or more whole numbers from 1 up")
        if self.T_dim % 2:
            raise ValueError(f"T_dim = {self.T_dim}: allowed are even numbers (half sines, half cosines)")
        step = self.PATCH * 2 ** (len(self.DIM_MULTS) - 1)
        for field in ("H", "W"):
            if getattr(self, field) % step:
                raise ValueError(
                    f"{field} = {getattr(self, field)}: allowed are multiples of {step} "
                    f"(PATCH {self.PATCH}, halved between {len(self.DIM_MULTS)} resolutions)"
                )
        for field in ("self_attention", "cross_attention"):
            if not set(getattr(self, field)) <= set(range(len(self.DIM_MULTS))):
                raise ValueError(
                    f"{field} = {getattr(self, field)}: allowed are resolutions from 0 to {len(self.DIM_MULTS) - 1}"
                )
        for level in {*self.self_attention, *self.cross_attention}:
            if self.BASE_DIM * self.DIM_MULTS[level] % self.HEAD_DIM:
                raise ValueError(
                    f"HEAD_DIM = {self.HEAD_DIM}: it must divide the {self.BASE_DIM * self.DIM_MULTS[level]} "
                    f"channels of resolution {level}"
                )

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> "Params":
        """The configuration saved in a checkpoint; ValueError names the fields that this version does not know."""
        unknown = saved.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}: the configuration was saved by another version")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})


_cpu = Params(
    H=32, W=32, PATCH=2, BASE_DIM=96, DIM_MULTS=(1, 2), self_attention=(1,), cross_attention=(1,), prediction="v",
    encoder="sentence-transformers/all-MiniLM-L6-v2", B=8, learning_rate=4e-4, ema_short=0.999, ema_long=0.9997,
    epochs=100, sample_every=10, save_every=25,
)  # fmt: skip

PRESETS = {
    "quick": dataclasses.replace(
        _cpu, MAX_INDEX=64, BLOCKS=1, learning_rate=6e-4, warmup=100, ema_short=0.995, ema_long=0.998,
        epochs=200, sample_every=50, save_every=100,
    ),
    "cpu": _cpu,
    "emoji64": Params(prediction="v"),
}  # fmt: skip
