"""Hyper-parameters: how a network is made and trained (`Params`) and how it is sampled from (`Sampling`).

These are not the network's weights. Names in capitals are sizes, the others are choices. The comment beside a field is
its `--help`. `python train.py quick --MAX_INDEX 128 --B 32` starts from a preset and overrides any field. The whole
configuration is saved as JSON inside every checkpoint, so that sampling from one needs nothing but its path.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


def within(default: float | None, low: float, high: float) -> Any:
    """A number between low and high, both allowed; `default` if nothing is said."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


class Fields:
    """A dataclass whose values are checked against their ranges and choices, and that JSON can keep."""

    FORMER = frozenset[str]()  # fields that older versions saved; not read any more

    def __post_init__(self):
        """Raise ValueError, naming the field, for a value of another kind, out of its range or none of its choices.

        A number of another kind, such as NumPy's, becomes a plain one.
        """
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint, options = getattr(self, field.name), hints[field.name], get_args(hints[field.name])
            allowed, valid = "", True
            if get_origin(hint) is Literal:
                allowed, valid = ", ".join(map(str, options)), value in options
                value = options[options.index(value)] if valid else value
            elif hint in (str, bool):
                allowed, valid = "texts" if hint is str else "True, False", isinstance(value, hint)
            elif hint == tuple[int, ...]:
                allowed = "whole numbers up to 1024"
                valid = isinstance(value, tuple) and all(isinstance(each, int) and each <= 1024 for each in value)
            elif "range" in field.metadata and not (value is None and field.default is None):
                (low, high), kind = field.metadata["range"], int if int in (hint, *options) else float
                allowed = f"{'whole numbers' if kind is int else 'numbers'} from {low} to {high}"
                try:
                    number = kind(value)
                    valid = number == value and low <= number <= high
                    value = number if valid else value
                except (TypeError, ValueError, OverflowError):
                    valid = False
            if not valid:
                raise ValueError(f"{field.name} = {value!r}: allowed are {allowed}")
            object.__setattr__(self, field.name, value)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> Self:
        """What to_json gave; ValueError names the fields that this version does not know."""
        if not isinstance(saved, dict):
            raise ValueError(f"{saved!r:.80} are no fields")
        known = {name: value for name, value in saved.items() if name not in cls.FORMER}
        if unknown := known.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"unknown fields {sorted(unknown)}: saved by another version of this program")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


@dataclass(frozen=True)
class Params(Fields):
    FORMER = frozenset({"max_bad", "snr_gamma", "low_discrepancy", "heldout"})

    # Pictures and captions
    data: str = "emojiimage-dataset"  # folder with full_emoji.csv and image/<vendor>/<#>.png
    vendor: str = "Google"  # whose pictures: the folder under image/, or several joined by "+"
    MAX_INDEX: int = within(0, 0, 10_000_000)  # train on the first MAX_INDEX rows that have a picture (0: all)
    H: int = within(64, 1, 1024)  # height of a picture, pixels
    W: int = within(64, 1, 1024)  # width of a picture, pixels
    CHANNELS: Literal[1, 3, 4] = 3  # 1 grey, 3 colour on white, 4 colour with transparency
    stream: bool = False  # read pictures from the disk during training, where they do not fit in memory

    # Text
    encoder: str = "BAAI/bge-small-en"  # frozen BERT: a hub name or a folder
    TEXT_LEN: int = within(32, 2, 512)  # tokens of a caption; longer ones are cut
    embedding_dropout: float = within(0.1, 0, 1)  # chance that training leaves a caption empty, which guidance needs
    caption_variants: float = within(0.0, 0, 1)  # chance that training takes a further caption, or one from keywords
    augmentation: float = within(0.0, 0, 1)  # chance of each small change to a picture; the network is told of it

    # Diffusion
    T: int = within(1000, 2, 100_000)  # steps from picture to noise
    zero_terminal_snr: bool = False  # let step T hold no picture at all (not with eps)
    prediction: Literal["eps", "v", "x0"] = "eps"  # what the network predicts: noise, velocity, clean picture
    loss_weight: Literal["uniform", "min_snr"] = "uniform"  # of a noise level in the loss
    timestep_shift: float = within(1.0, 0.01, 100)  # of the steps trained on: above 1 to more noise, 1 all alike

    # Network
    T_dim: int = within(128, 2, 4096)  # size of the sinusoidal timestep embedding
    T_out: int = within(512, 1, 8192)  # size of the timestep embedding after its MLP
    BASE_DIM: int = within(128, 1, 4096)  # channels at the first resolution
    DIM_MULTS: tuple[int, ...] = (
        1,
        2,
        2,
        2,
    )  # channels per resolution, in units of BASE_DIM; the next one has half the size
    PATCH: int = within(1, 1, 64)  # pixels per side that are folded into channels at entry, unfolded at exit
    REFINER: int = within(0, 0, 1024)  # channels of the layers that mend the picture behind large patches (0: none)
    BLOCKS: int = within(2, 1, 16)  # ResNet blocks per resolution
    self_attention: tuple[int, ...] = (2, 3)  # resolutions with self-attention (0: the first)
    cross_attention: tuple[int, ...] = (1, 2, 3)  # resolutions with cross-attention to the caption's tokens
    HEAD_DIM: int = within(64, 1, 1024)  # channels per attention head
    dropout: float = within(0.0, 0, 0.9)  # share of features that training leaves out in each ResNet block
    compute: Literal["float32", "bfloat16"] = "float32"  # in the network; weights, loss and statistics stay float32

    # Training
    B: int = within(64, 1, 65_536)  # batch size, pictures
    accumulate: int = within(1, 1, 65_536)  # parts that a batch is computed in, where memory does not hold it at once
    epochs: int = within(2000, 1, 1_000_000)  # passes over the pictures
    minutes: float = within(0.0, 0, 1_000_000)  # end after this time in training steps, if it comes first (0: no limit)
    learning_rate: float = within(2e-4, 0, 1)  # AdamW, after warm-up
    warmup: int = within(500, 0, 1_000_000)  # steps of linear warm-up
    decay: Literal["constant", "cosine", "linear"] = "constant"  # of the learning rate after warm-up, to 0 at the end
    weight_decay: float = within(0.01, 0, 1)  # AdamW
    clip: float = within(1.0, 1e-6, 1e6)  # largest norm of a gradient
    ema_short: float = within(0.05, 0.001, 0.28)  # sampling averages the weights over about this share of the run
    ema_long: float = within(0.1, 0.001, 0.28)  # the same of a second, longer average, for `--ema long`
    seed: int = within(0, 0, 2**31 - 1)  # of the initial weights, the order of the data, the noise

    # Records
    log_every: int = within(50, 1, 1_000_000)  # steps between two lines of metrics.jsonl
    sample_every: int = within(100, 1, 1_000_000)  # epochs between two sample grids
    save_every: int = within(100, 1, 1_000_000)  # epochs between two checkpoints
    keep: int = within(0, 0, 1_000_000)  # checkpoints epoch{N} to keep, the newest (0: all)

    def __post_init__(self):
        super().__post_init__()
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError("zero_terminal_snr = True: not with prediction = 'eps', which says nothing of pure noise")
        if self.zero_terminal_snr and self.loss_weight == "min_snr":
            raise ValueError("zero_terminal_snr = True: not with loss_weight = 'min_snr', which gives step T no weight")
        if self.REFINER and (self.prediction != "x0" or self.PATCH < 4 or self.PATCH % 2):
            what = f"prediction = {self.prediction!r}, PATCH = {self.PATCH}"
            raise ValueError(
                f"REFINER = {self.REFINER}: only with prediction = 'x0' and an even PATCH of 4 or more; {what}"
            )
        if self.decay != "constant" and self.minutes:
            raise ValueError(f"minutes = {self.minutes}: not with decay = {self.decay!r}, which ends after its epochs")
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
            levels = getattr(self, field)
            if not set(levels) <= set(range(len(self.DIM_MULTS))):
                raise ValueError(f"{field} = {levels}: allowed are resolutions from 0 to {len(self.DIM_MULTS) - 1}")
            for channels in (self.BASE_DIM * self.DIM_MULTS[level] for level in levels):
                if channels % self.HEAD_DIM:
                    raise ValueError(f"HEAD_DIM = {self.HEAD_DIM}: it must divide the {channels} channels of {field}")


_cpu = Params(
    PATCH=8, REFINER=64, DIM_MULTS=(1, 2), self_attention=(1,), cross_attention=(1,), prediction="x0",
    timestep_shift=3, encoder="sentence-transformers/all-MiniLM-L6-v2", B=8, learning_rate=4e-4,
    epochs=100, sample_every=10, save_every=25,
)  # fmt: skip

PRESETS = {  # why each predicts what it does: LOG.md, 2026-11-28
    "quick": dataclasses.replace(
        _cpu, MAX_INDEX=64, learning_rate=6e-4, warmup=100, epochs=120, sample_every=60, save_every=60
    ),
    "cpu": _cpu,
    "emoji64": Params(),
}


SolverName = Literal["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"]  # keys of samplers.SOLVERS


@dataclass(frozen=True)
class Sampling(Fields):
    FORMER = frozenset({"on_white", "spacing"})

    c: float = within(7.0, 0, 1000)  # guidance: 1 is none and takes half the time, more keeps closer to the caption
    negative_prompt: str = ""  # what to steer away from; if nothing is said, from the empty caption
    sampler: SolverName = "dpmpp_2m"  # how to get from noise to picture
    steps: int | None = within(None, 1, 100_000)  # of the sampler; 20 if nothing is said
    eta: float | None = within(None, 0, 1)  # share of fresh noise; if nothing is said, 1 for ddpm, dpmpp_2m_sde, else 0
    temperature: float = within(1.0, 0, 10)  # size of the fresh noise
    rescale: float = within(0.0, 0, 1)  # share by which the contrast that guidance adds is taken back
    interval: tuple[float, float] = (0.5, 1.0)  # noise levels t / T that are guided; 0 1 are all
    percentile: float | None = within(None, 0, 1)  # dynamic thresholding; if nothing is said, estimates are clipped

    def __post_init__(self):
        super().__post_init__()
        try:
            ends = tuple(map(float, self.interval))
        except (TypeError, ValueError, OverflowError):
            ends = ()
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"interval = {self.interval}: allowed are two numbers with 0 <= low <= high <= 1")
        object.__setattr__(self, "interval", ends)
        if self.negative_prompt and self.c == 1:
            raise ValueError(f"negative_prompt = {self.negative_prompt!r} does nothing at c = 1: raise c or omit it")

    def told(self) -> str:
        """In a few words, what decides most."""
        low, high = self.interval
        where = f" at noise levels {low:g} to {high:g}" if self.c != 1 and self.interval != (0, 1) else ""
        return f"guidance {self.c:g}{where}, {self.sampler}, {self.steps} steps"
