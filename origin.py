"""Where a picture comes from: all that it takes to draw it again, in the text of its own PNG."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sampling import Sampling


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
    def of(cls, path: Path) -> "Origin":
        """What a PNG remembers; ValueError where it is none of ours."""
        with Image.open(path) as picture:
            text = dict(getattr(picture, "text", {}))
        read = {
            "seed": int,
            "size": int,
            "strength": float,
            "sampling": lambda value: Sampling.from_json(json.loads(value)),
        }
        try:
            return cls(**{name: read.get(name, str)(value) for name, value in text.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not say how it was drawn ({error}); name a PNG written by test.py"
            ) from error


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
