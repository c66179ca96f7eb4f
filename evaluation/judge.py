"""Does a picture show what its caption says? A judge that has only ever seen real pictures.

A picture's features (`features`) are mapped into the space of the captions (`text_encoder`, mean of the tokens), by
kernel ridge regression on the real training pictures of all vendors. A sample is recognised where, among the held-out
captions, its own is the nearest to the mapped picture: R-precision (Xu et al. 2018). No part of the judge saw the
held-out captions, the samples, or the network that made them.

    f(x) = mean + sum_i alpha_i k(x, x_i),    alpha = (K + ridge)^-1 (text_emb - mean),    k(x, y) = exp(-|x - y|² / s²)

with features of length 1 and s² their variance. Report it between two others: the judge's score on the real held-out
pictures is the ceiling, that with the captions shuffled is the floor. On emoji it is a weak judge but a fair one.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

import dataset
from evaluation import features as extractors
from evaluation import metrics
from evaluation.scores import Score, rate, shuffled, spread
from files import cached
from params import Params
from text_encoder import MINILM, TextEncoder

RIDGE = 0.1  # variance of what a caption says beyond its picture, in units of k(x, x) = 1
MOST = 6000  # pictures that a judge is trained on; of more, every second or third and so on: its time grows as n³


@dataclass(frozen=True)
class Judge:
    support: Float[np.ndarray, "n d"]  # training features, of length 1
    scale: float  # s²
    alpha: Float[np.ndarray, "n e"]
    mean: Float[np.ndarray, "e"]  # of the captions

    def __call__(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m e"]:
        """Where in the captions' space a picture lies."""
        return self.mean + _kernel(metrics.unit(features), self.support, self.scale) @ self.alpha


def train(features: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "n e"]) -> Judge:
    """The judge of pictures with these features and captions; in closed form, so the same each time."""
    if len(features) < 2:
        raise ValueError(f"a judge needs at least 2 pictures, got {len(features)}")
    rows = spread(len(features), MOST)
    support, text_emb = metrics.unit(features[rows]), np.asarray(text_emb[rows], np.float64)
    scale, mean = max(float(support.var(0).sum()), 1e-12), text_emb.mean(0)
    system = _kernel(support, support, scale) + RIDGE * np.eye(len(support))
    return Judge(support, scale, np.linalg.solve(system, text_emb - mean), mean)


def embed(encoder: TextEncoder, captions: list[str], length: int) -> Float[np.ndarray, "n e"]:
    """Mean of the tokens of each caption, [CLS] and [SEP] included; kept on disk."""

    def make() -> dict[str, np.ndarray]:
        text_emb, text_mask = encoder(captions, length)
        return {"text_emb": text_emb.sum(1) / text_mask.sum(1, keepdims=True)}  # 0 behind the last token

    return cached("judge", json.dumps([encoder.identity, length, encoder.spelled(captions)]), make)["text_emb"]


def from_config(
    config: Params, extractor: extractors.Extractor, encoder: TextEncoder, root: Path | None = None
) -> Judge:
    """The judge for a configuration's pictures: trained on those of every vendor in its dataset, at its size."""
    present, features, captions = dataset.vendors(root or Path(config.data)), [], []
    several = config.vendor not in present  # its captions say whose style they are in
    for vendor in present:
        everything = dataset.from_config(dataclasses.replace(config, vendor=vendor, MAX_INDEX=0), root)
        pictures = dataset.side(everything, heldout=False)
        features.append(extractors.extract(extractor, pictures.images))
        captions += [dataset.styled(name, vendor) if several else name for name in pictures.names]
    return train(np.concatenate(features), embed(encoder, captions, config.TEXT_LEN))


def recognition(
    config: Params,
    extractor: extractors.Extractor,
    root: Path | None,
    captions: list[str],
    samples: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "n d"],
) -> list[Score]:
    """R-precision on held-out captions, of the features of samples and of the captions' real pictures.

    The words are MiniLM's whatever encoder the checkpoint has, so that checkpoints of different encoders compare.
    """
    if len(captions) < 6:
        raise ValueError(f"top 5 needs at least 6 of them, got {len(captions)}; raise --samples or hold out more")
    encoder, own, found = TextEncoder(MINILM), np.arange(len(captions)), []
    judge = from_config(config, extractor, encoder, root)
    text_emb = embed(encoder, captions, config.TEXT_LEN) - judge.mean
    samples, real = (judge(features) - judge.mean for features in (samples, real))
    for k in (1, 5):
        right, wrong = (metrics.r_precision(samples, text_emb, rows, k) for rows in (own, shuffled(own)))
        by, ceiling = f"judge on {extractor.name}", metrics.r_precision(real, text_emb, own, k)
        found.append(rate(f"R-precision, top {k}", "held-out", by, right, exchanged=wrong, real=ceiling))
    return found


def _kernel(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    return np.exp(-metrics.squared_distances(a, b) / scale)
