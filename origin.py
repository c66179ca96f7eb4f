"""Where a picture comes from: all that it takes to draw it again, in the text of its own PNG."""

import dataclasses
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
