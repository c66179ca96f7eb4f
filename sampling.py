"""How to draw: every choice that shapes a picture beside its words and its seed, in one frozen dataclass."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

Sampler = Literal["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"]  # keys of samplers.SOLVERS
Spacing = Literal["trailing", "leading", "linspace", "log_snr"]  # keys of samplers.SPACINGS

NUMBERS = {  # kind, lowest and highest allowed value
    "c": (float, 0, 1000),
    "steps": (int, 1, 100_000),
    "eta": (float, 0, 1),
    "temperature": (float, 0, 10),
    "rescale": (float, 0, 1),
    "percentile": (float, 0, 1),
}
OPEN = ("steps", "eta", "percentile")  # may be None


@dataclass(frozen=True)
class Sampling:
    c: float = 7.0  # guidance: 1 follows the caption as learned and takes half the time, more insists on it
    negative_prompt: str = ""  # what to steer away from; if nothing is said, from the empty caption
    sampler: Sampler = "dpmpp_2m"  # how to walk from noise to picture
    steps: int | None = None  # of the sampler; 20 if nothing is said
    spacing: Spacing = "trailing"  # of the steps
    eta: float | None = None  # fresh noise, 0 to 1 (ancestral); if nothing is said, 1 for ddpm and dpmpp_2m_sde
    temperature: float = 1.0  # size of the fresh noise
    rescale: float = 0.0  # share by which the contrast that guidance adds is taken back
    interval: tuple[float, float] = (0.0, 1.0)  # noise levels t / T that are guided
    percentile: float | None = None  # dynamic thresholding; if nothing is said, estimates are clipped
    on_white: bool = False  # draw a picture with transparency on white

    def __post_init__(self):
        for field, (kind, low, high) in NUMBERS.items():
            value = getattr(self, field)
            if value is None and field in OPEN:
                continue
            try:
                number = kind(value)
                right = number == value and low <= number <= high
            except (TypeError, ValueError, OverflowError):
                right = False
            if not right:
                what = "whole numbers" if kind is int else "numbers"
                raise ValueError(f"{field} = {value!r}: allowed are {what} from {low} to {high}")
            object.__setattr__(self, field, number)  # a plain number, that JSON can keep, of whatever it was
        for field, allowed in (("sampler", get_args(Sampler)), ("spacing", get_args(Spacing))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} = {getattr(self, field)!r}: allowed are {', '.join(allowed)}")
        ends = tuple(map(float, self.interval))
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1 or math.isnan(sum(ends)):
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
        """What to_json gave; TypeError where it names a field that this version does not know."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
