"""Does a picture show what its caption says? A judge that has only ever seen real pictures.

A picture's features (`features`) are mapped into the space of the captions (`text_encoder`, mean of the tokens), by
kernel ridge regression on the real training pictures of all vendors. A drawing scores a hit where, among the held-out
captions, its own is the nearest to the mapped picture: R-precision (Xu et al. 2018). No part of the judge saw the
held-out captions, the drawings, or the network that drew them.

    f(x) = mean + sum_i alpha_i k(x, x_i),    alpha = (K + ridge)^-1 (text_emb - mean),    k(x, y) = exp(-|x - y|² / s²)

with features of length 1 and s² their variance. Report it between two others: the judge's score on the real held-out
pictures is the ceiling, that with the captions shuffled is the floor. On emoji it is a weak judge but a fair one.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

import dataset
from evaluation import features as extractors
from evaluation import metrics
from files import cached
from params import Params
from text_encoder import TextEncoder

RIDGE = 0.1  # variance of what a caption says beyond its picture, in units of k(x, x) = 1
MOST = 6000  # pictures that a judge is trained on; of more, every second or third and so on: its time grows as n³


@dataclass(frozen=True)
class Judge:
    centre: Float[np.ndarray, "d"]
    support: Float[np.ndarray, "n d"]  # training features, of length 1 and less the centre
    scale: float  # s²
    alpha: Float[np.ndarray, "n e"]
    mean: Float[np.ndarray, "e"]  # of the captions

    def __call__(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m e"]:
        """Where in the captions' space a picture lies."""
        return self.mean + _kernel(_unit(features) - self.centre, self.support, self.scale) @ self.alpha


def train(features: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "n e"]) -> Judge:
    """The judge of pictures with these features and captions; in closed form, so the same each time."""
    if len(features) < 2:
        raise ValueError(f"a judge needs at least 2 pictures, got {len(features)}")
    rows = np.unique(np.linspace(0, len(features) - 1, min(len(features), MOST)).astype(int))
    support, text_emb = _unit(features[rows]), np.asarray(text_emb[rows], np.float64)
    centre, mean = support.mean(0), text_emb.mean(0)
    support = support - centre
    scale = max(float((support**2).sum(1).mean()), 1e-12)
    system = _kernel(support, support, scale)
    system[np.diag_indices_from(system)] += RIDGE
    return Judge(centre, support, scale, np.linalg.solve(system, text_emb - mean), mean)


def r_precision(
    judge: Judge, features: Float[np.ndarray, "n d"], text_emb: Float[np.ndarray, "m e"], own: Int[np.ndarray, "n"], k=1
) -> metrics.Share:
    """Share of pictures whose own caption, of m different ones, is among the k nearest by cosine around the mean."""
    return metrics.share(metrics.r_precision(judge(features) - judge.mean, text_emb - judge.mean, own, k))


def embed(encoder: TextEncoder, captions: list[str], length: int) -> Float[np.ndarray, "n e"]:
    """Mean of the tokens of each caption, [CLS] and [SEP] included; kept on disk."""

    def make() -> dict[str, np.ndarray]:
        text_emb, text_mask = encoder(captions, length)
        return {"text_emb": text_emb.sum(1) / text_mask.sum(1, keepdims=True)}  # 0 behind the last token

    return cached("judge", json.dumps([encoder.identity, length, captions]), make)["text_emb"]


def from_config(
    config: Params, extractor: extractors.Extractor, encoder: TextEncoder, root: Path | None = None
) -> Judge:
    """The judge for a configuration's pictures: trained on those of every vendor in its dataset, at its size."""
    present, features, captions = dataset.vendors(root or Path(config.data)), [], []
    several = config.vendor not in present  # its captions say whose style they are in
    for vendor in present:
        pictures = dataset.from_config(dataclasses.replace(config, vendor=vendor, MAX_INDEX=0), root)
        pictures = dataset.side(pictures, heldout=False)
        features.append(extractors.extract(extractor, pictures.images))
        captions += [dataset.styled(name, vendor) if several else name for name in pictures.names]
    return train(np.concatenate(features), embed(encoder, captions, config.TEXT_LEN))


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _kernel(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.exp(-np.maximum(squared, 0) / scale)
