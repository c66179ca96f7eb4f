"""How to draw: every choice that shapes a picture beside its words and its seed, in one frozen dataclass."""

import dataclasses
import math
from dataclasses import dataclass

RANGES = {  # lowest and highest allowed value
    "c": (0.0, math.inf),
    "steps": (1, 100_000),
    "eta": (0.0, 1.0),
    "temperature": (0.0, 10.0),
    "rescale": (0.0, 1.0),
    "percentile": (0.0, 1.0),
}


@dataclass(frozen=True)
class Sampling:
    c: float = 7.0  # guidance: 1 follows the caption as learned and takes half the time, more insists on it
    negative_prompt: str = ""  # what to steer away from; if nothing is said, from the empty caption
    sampler: str = "dpmpp_2m"  # ddim, ddpm, heun, dpmpp_2m, dpmpp_2m_sde or dpmpp_3m
    steps: int | None = None  # of the sampler; 20 if nothing is said
    spacing: str = "trailing"  # of the steps: trailing, leading, linspace or log_snr
    eta: float | None = None  # share of the noise drawn afresh; if nothing is said, 1 for ddpm and dpmpp_2m_sde, else 0
    temperature: float = 1.0  # size of the noise drawn afresh
    rescale: float = 0.0  # share by which the contrast that guidance adds is taken back
    interval: tuple[float, float] = (0.0, 1.0)  # noise levels t / T that are guided
    percentile: float | None = None  # dynamic thresholding; if nothing is said, estimates are clipped
    on_white: bool = False  # draw a picture with transparency on white

    def __post_init__(self):
        for field, (low, high) in RANGES.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{field} = {value}: allowed are finite numbers from {low:g} to {high:g}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval = {self.interval}: allowed are two numbers with 0 <= low <= high <= 1")
        if self.negative_prompt and self.c == 1:
            raise ValueError(
                f"negative_prompt = {self.negative_prompt!r} has no effect at c = 1: raise c or leave it out"
            )

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> "Sampling":
        """What to_json gave; TypeError where it names a field that this version does not know."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
