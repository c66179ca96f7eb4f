"""Which captions are drawn to measure a network: of training, held out, and invented ones, the same for every network.

They follow from the captions of the data and from how many are asked for. So two reports, or the pictures that another
program has drawn, compare caption by caption.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.scores import spread
from files import parsed
from images import on_white


class Captions(NamedTuple):
    texts: list[str]
    own: Sequence[int]  # the row of each one's real picture on its side of the split; empty for invented ones


def evenly(names: list[str], most: int) -> Captions:
    """At most `most` of the captions, spread over the data, none twice."""
    rows = spread(len(names), most)
    return Captions([names[row] for row in rows], rows.tolist())


def choose(names: list[str], heldout: list[str], samples: int) -> dict[str, Captions]:
    """A quarter of the samples for held-out captions, a quarter for invented ones, the rest for training captions.

    Where there are too few held-out or invented captions, more training captions are taken instead.
    """
    unseen, made_up = evenly(heldout, samples // 4), invented([*names, *heldout], samples // 4)
    trained = evenly(names, samples - len(unseen.texts) - len(made_up))
    return {"training": trained, "held-out": unseen, "invented": Captions(made_up, [])}


def invented(captions: list[str], count: int) -> list[str]:
    """Captions without a picture: the first word of a real one of two words before the last word of another.

    "red heart" and "wrapped gift" give "red gift", unless there is one. Common words come up as often as in the data.
    Of several vendors the second one's style is asked for.
    """
    two_words = (re.fullmatch(r"(\S+) (\S+?)(, .+ style)?", caption) for caption in captions if ":" not in caption)
    pairs = [words.groups("") for words in two_words if words]
    if not pairs:
        return []
    chosen = np.random.default_rng(0).integers(len(pairs), size=(100 * count, 2))
    found = dict.fromkeys(f"{pairs[a][0]} {pairs[b][1]}{pairs[b][2]}" for a, b in chosen)
    known = {caption.lower() for caption in captions}
    return [caption for caption in found if caption.lower() not in known][:count]


def drawn_by_others(
    path: Path, sets: dict[str, Captions], shape: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], dict]:
    """The pictures of each set that another program has written, on white, and what it says about them.

    The npz holds `images`, uint8 [n, h, w, c], the caption of each as `captions`, in the order of `sets`, and as JSON
    `about`, what a report says of a checkpoint. Raises ValueError where it does not, OSError where it cannot be read.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as saved:
            images, captions, about = saved["images"], saved["captions"].tolist(), parsed(str(saved["about"]))
        about = {field: about[field] for field in ("images", "step", "seconds", "ema", "config", "sampling")}
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise ValueError(f"{path} is no npz of images, captions and about ({type(error).__name__}: {error})") from None
    texts = [text for chosen in sets.values() for text in chosen.texts]
    if captions != texts:
        first = next((f"{a!r}, not {b!r}" for a, b in zip(captions, texts, strict=False) if a != b), "too few or many")
        raise ValueError(f"{path} shows other captions than --samples {len(texts)} asks for: {first}")
    if (images.dtype, images.shape[:-1]) != (np.uint8, (len(texts), *shape[:-1])):
        size = f"{images.dtype} {list(images.shape)}, not uint8 {[len(texts), *shape]}"
        raise ValueError(f"{path}: its pictures are {size}: scale them to those of the checkpoint")
    ends = np.cumsum([len(chosen.texts) for chosen in sets.values()])
    return dict(zip(sets, np.split(on_white(images), ends[:-1]), strict=True)), about
