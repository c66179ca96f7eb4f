"""Hyper-parameters of a run (not the network's weights): one frozen dataclass, and a small table of presets.

Names in capitals are sizes, the others are choices. `python train.py quick --MAX_INDEX 128 --B 32` starts from
a preset and overrides any field; the whole configuration travels as JSON inside every checkpoint, so that
drawing from one needs nothing but its path.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

RANGES = {  # lowest and highest allowed value
    "MAX_INDEX": (0, 10_000_000),
    "max_bad": (0.0, 1.0),
    "H": (1, 1024),
    "W": (1, 1024),
    "TEXT_LEN": (2, 512),
    "caption_variants": (0.0, 1.0),
    "embedding_dropout": (0.0, 1.0),
    "T": (2, 100_000),
    "snr_gamma": (0.01, 1000.0),
    "T_dim": (2, 4096),
    "T_out": (1, 8192),
    "BASE_DIM": (1, 4096),
    "PATCH": (1, 64),
    "BLOCKS": (1, 16),
    "HEAD_DIM": (1, 1024),
    "dropout": (0.0, 0.9),
    "augmentation": (0.0, 1.0),
    "B": (1, 65_536),
    "accumulate": (1, 65_536),
    "epochs": (1, 1_000_000),
    "minutes": (0.0, 1_000_000.0),
    "learning_rate": (0.0, 1.0),
    "warmup": (0, 1_000_000),
    "weight_decay": (0.0, 1.0),
    "clip": (1e-6, 1e6),
    "ema_short": (0.001, 0.28),
    "ema_long": (0.001, 0.28),
    "seed": (0, 2**31 - 1),
    "log_every": (1, 1_000_000),
    "sample_every": (1, 1_000_000),
    "heldout": (0, 1_000_000),
    "save_every": (1, 1_000_000),
    "keep": (0, 1_000_000),
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
    augmentation: float = (
        0.0  # chance of each small change to a picture; the network is told, so none shows when drawing
    )

    # Diffusion
    T: int = 1000  # steps from picture to noise
    zero_terminal_snr: bool = False  # let step T hold no picture at all (not with eps)
    prediction: Literal["eps", "v", "x0"] = "eps"  # what the network predicts: noise, velocity, clean picture
    loss_weight: Literal["uniform", "min_snr"] = "uniform"  # of a noise level in the loss
    snr_gamma: float = 5.0  # signal-to-noise ratio above which min_snr counts no level for more
    low_discrepancy: bool = False  # spread the steps t of a batch evenly instead of drawing each by itself

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
    dropout: float = 0.0  # share of features that training leaves out in each ResNet block
    compute: Literal["float32", "bfloat16"] = "float32"  # in the network; weights, loss and statistics stay float32

    # Training
    B: int = 64  # batch size, pictures
    accumulate: int = 1  # parts that a batch is worked through in, where memory does not hold it at once
    epochs: int = 2000  # passes over the pictures
    minutes: float = 0.0  # end after so much time in training steps, if that comes first (0: no limit)
    learning_rate: float = 2e-4  # AdamW, after warm-up
    warmup: int = 500  # steps of linear warm-up
    decay: Literal["constant", "cosine", "linear"] = (
        "constant"  # of the learning rate after that, to 0 at the last step
    )
    weight_decay: float = 0.01  # AdamW
    clip: float = 1.0  # largest norm of a gradient
    ema_short: float = 0.05  # length of the average of the weights that draws, as a share of the run so far
    ema_long: float = 0.1  # length of a second, longer average
    seed: int = 0  # of the initial weights, the order of the data, the noise

    # Records
    log_every: int = 50  # steps between two lines of metrics.jsonl
    sample_every: int = 100  # epochs between two sample grids
    heldout: int = 64  # held-out pictures whose loss is measured beside each sample grid
    save_every: int = 100  # epochs between two checkpoints
    keep: int = 0  # checkpoints epoch{N} to keep, the newest (0: all)

    def __post_init__(self):
        for field, (low, high) in RANGES.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{field} = {value}: allowed are values from {low} to {high}")
        if self.CHANNELS not in (1, 3, 4):
            raise ValueError(f"CHANNELS = {self.CHANNELS}: allowed are 1 (grey), 3 (colour), 4 (with transparency)")
        for field in ("prediction", "loss_weight", "compute", "decay"):
            allowed = get_args(get_type_hints(type(self))[field])
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} = {getattr(self, field)!r}: allowed are {', '.join(map(repr, allowed))}")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "zero_terminal_snr = True: not with prediction = 'eps', as the noise says nothing about the picture "
                "where there is nothing else; allowed are 'v' and 'x0'"
            )
        if self.zero_terminal_snr and self.loss_weight == "min_snr":
            raise ValueError(
                "zero_terminal_snr = True: not with loss_weight = 'min_snr', which would give no weight to step T, "
                "where drawing begins; allowed is 'uniform'"
            )
        if self.snr_gamma != Params.snr_gamma and self.loss_weight == "uniform":
            raise ValueError(
                f"snr_gamma = {self.snr_gamma}: read only with loss_weight = 'min_snr', not with 'uniform'"
            )
        if self.decay != "constant" and self.minutes:
            raise ValueError(
                f"minutes = {self.minutes}: not with decay = {self.decay!r}, which must know the last step beforehand; "
                "end by epochs, or take decay = 'constant'"
            )
        if self.B % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate}: allowed are divisors of B = {self.B}")
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
    H=32, W=32, PATCH=4, BASE_DIM=128, DIM_MULTS=(1, 2), self_attention=(1,), cross_attention=(1,), prediction="x0",
    encoder="sentence-transformers/all-MiniLM-L6-v2", B=8, learning_rate=4e-4,
    epochs=100, sample_every=10, save_every=25,
)  # fmt: skip

PRESETS = {  # why each predicts what it does, on patches of that size: LOG.md, 2026-11-27
    "quick": dataclasses.replace(
        _cpu, MAX_INDEX=64, PATCH=2, BASE_DIM=96, BLOCKS=1, prediction="v", learning_rate=6e-4, warmup=100,
        epochs=200, sample_every=50, save_every=100,
    ),
    "cpu": _cpu,
    "emoji64": Params(prediction="v"),
}  # fmt: skip


def flags(config: Params, preset: str) -> list[str]:
    """The words after `python train.py` that make `config` out of a preset whose switches are all off."""
    words = [preset]
    for field in dataclasses.fields(Params):
        value = getattr(config, field.name)
        if value is True:
            words.append(f"--{field.name}")
        elif value != getattr(PRESETS[preset], field.name):
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


Sampler = Literal["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"]  # keys of samplers.SOLVERS
Spacing = Literal["trailing", "log_snr"]  # keys of samplers.SPACINGS


def within(default, low: float, high: float):
    """A number between low and high, both allowed; `default` if nothing is said."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Sampling:
    c: float = within(7.0, 0, 1000)  # guidance: 1 follows the caption as learned in half the time, more insists on it
    negative_prompt: str = ""  # what to steer away from; if nothing is said, from the empty caption
    sampler: Sampler = "dpmpp_2m"  # how to get from noise to picture
    steps: int | None = within(None, 1, 100_000)  # of the sampler; 20 if nothing is said
    spacing: Spacing = "trailing"  # of the steps
    eta: float | None = within(None, 0, 1)  # fresh noise (1: ancestral); if nothing is said, 1 for ddpm, dpmpp_2m_sde
    temperature: float = within(1.0, 0, 10)  # size of the fresh noise
    rescale: float = within(0.0, 0, 1)  # share by which the contrast that guidance adds is taken back
    interval: tuple[float, float] = (0.0, 1.0)  # noise levels t / T that are guided
    percentile: float | None = within(None, 0, 1)  # dynamic thresholding; if nothing is said, estimates are clipped

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata.get("range")
            if bounds is None or (value is None and field.default is None):
                continue
            kind = int if int in get_args(field.type) else float
            try:
                number = kind(value)
                valid = number == value and bounds[0] <= number <= bounds[1]
            except (TypeError, ValueError, OverflowError):
                valid = False
            if not valid:
                what = "whole numbers" if kind is int else "numbers"
                raise ValueError(f"{field.name} = {value!r}: allowed are {what} from {bounds[0]} to {bounds[1]}")
            object.__setattr__(self, field.name, number)  # a plain number, that JSON can keep, of whatever it was
        for name, allowed in (("sampler", get_args(Sampler)), ("spacing", get_args(Spacing))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        ends = tuple(map(float, self.interval))
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"interval = {self.interval}: allowed are two numbers with 0 <= low <= high <= 1")
        object.__setattr__(self, "interval", ends)
        if self.negative_prompt and self.c == 1:
            raise ValueError(
                f"negative_prompt = {self.negative_prompt!r} does nothing at c = 1: raise c or leave it out"
            )

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> "Sampling":
        """What to_json gave, now or in an older version, whose `on_white` is ignored; TypeError for unknown fields."""
        known = {name: value for name, value in saved.items() if name != "on_white"}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
