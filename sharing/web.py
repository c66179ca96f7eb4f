"""A folder of static files that draws in a browser: `python export.py CHECKPOINT FOLDER --web SITE`.

    index.html, style.css, *.js      the page, from sharing/site
    site.json                        what it must know of this network: sizes, noise levels, captions
    unet.onnx.gz                     the network, for a picture under its caption and under the empty caption
    captions/N.f16.gz                vectors of the empty caption and of the N-th part of the captions, in float16
    encoder.onnx.gz, words.json.gz   the text encoder and its vocabulary, for any other words
    runtime/                         onnxruntime-web, from its npm package

The network computes in float32, from weights as portable.py stores them. What is large is packed here, because many
hosts send files as they are, and is asked for with its version, so that a browser may keep it for good.
"""

import dataclasses
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import emoji
import jax
import numpy as np
from tokenizers import Tokenizer

import dataset
from dataset import DatasetError
from files import writable
from guidance import steps_within
from model import network
from params import Params, Sampling
from pipeline import DiffusionPipeline
from sharing import portable
from sharing.onnx_graph import to_onnx
from sources import packages
from sources.names import name_of
from text_encoder import TextEncoder

PAGE = Path(__file__).resolve().parent / "site"
RUNTIME = packages.npm("onnxruntime-web", "1.30.0", "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71")
ENGINES = {"ort.wasm": "ort-wasm-simd-threaded", "ort.webgpu": "ort-wasm-simd-threaded.asyncify"}  # not the default one
PART = 64  # captions that are fetched together


def unet(config: Params, weights: dict, dim: int, dtype: str) -> bytes:
    """The network on a batch of two as ONNX, its weights stored as `dtype`."""

    def parts(key: tuple, weight: jax.Array) -> tuple[np.ndarray, ...]:
        return tuple(portable.stored(portable.name_of(key), np.asarray(weight), dtype).values())

    config = dataclasses.replace(config, compute="float32")
    inputs = {
        "noisy": jax.ShapeDtypeStruct((2, config.H, config.W, config.CHANNELS), np.float32),
        "t": jax.ShapeDtypeStruct((2,), np.int32),
        "text_emb": jax.ShapeDtypeStruct((2, config.TEXT_LEN, dim), np.float32),
        "text_mask": jax.ShapeDtypeStruct((2, config.TEXT_LEN), bool),
    }
    stored = jax.tree.map_with_path(parts, jax.device_get(weights))
    return to_onnx(lambda weights, *inputs: network(config, weights)(*inputs), stored, inputs)


def encoder_of(encoder: TextEncoder, length: int) -> bytes:
    """The text encoder on one text as ONNX: tables and matrices in int8, a scale for each row, the rest in float16."""

    def parts(weight: np.ndarray, axes: int) -> tuple[np.ndarray, ...]:
        return portable.quantized(weight, -1) if weight.ndim == axes else (weight.astype(np.float16),)

    whole = jax.device_get(encoder.weights)
    stored = {  # layers are stacked
        kind: {name: parts(weight, axes) for name, weight in whole[kind].items()}
        for kind, axes in (("embeddings", 2), ("layers", 3))
    }
    inputs = {
        "tokens": jax.ShapeDtypeStruct((1, length), np.int32),
        "text_mask": jax.ShapeDtypeStruct((1, length), bool),
    }
    return to_onnx(encoder.encode, stored, inputs)


def words_of(tokenizer: Tokenizer) -> dict | None:
    """What text.js needs to make word pieces as `tokenizer` does, or None where it is not one of BERT's own kind."""
    about = json.loads(tokenizer.to_str())
    normal, model = about["normalizer"] or {}, about["model"]
    kinds = normal.get("type"), (about["pre_tokenizer"] or {}).get("type"), model.get("type")
    if kinds != ("BertNormalizer", "BertPreTokenizer", "WordPiece"):
        return None
    accents = normal["lowercase"] if normal["strip_accents"] is None else normal["strip_accents"]
    names = {text: name_of(text) for text in emoji.EMOJI_DATA if text.removesuffix("\ufe0f") not in model["vocab"]}
    return {
        "vocabulary": model["vocab"], "unknown": model["unk_token"], "prefix": model["continuing_subword_prefix"],
        "longest": model["max_input_chars_per_word"], "lowercase": normal["lowercase"], "strip_accents": accents,
        "ends": tokenizer.encode("").ids, "names": names,
    }  # fmt: skip


def captions_of(pipeline: DiffusionPipeline) -> list[str]:
    """The captions that the network was trained on, and the examples; without the pictures at hand, only these."""
    examples = pipeline.about["prompts"]
    try:
        pictures = dataset.side(dataset.from_config(pipeline.config, decode=False), heldout=False)
    except DatasetError as error:
        print(f"note: the pictures are not here, so the site knows only the example captions: {error}", file=sys.stderr)
        return examples
    return [*dict.fromkeys([*pictures.names, *(other for others in pictures.others for other in others), *examples])]


def embedded(captions: list[str], encoder: TextEncoder, length: int) -> tuple[list[int], bytes]:
    """How many tokens each caption has, and the vectors of all their tokens in float16, one after another."""
    text_emb, text_mask = encoder(captions, length)
    return text_mask.sum(axis=1).tolist(), text_emb[text_mask].astype("<f2").tobytes()


def write(site: Path, pipeline: DiffusionPipeline, sampling: Sampling, about: str, *, dtype: str) -> int:
    """Write the site of a network, with `about` at its foot; an earlier one is replaced. Returns its size in bytes."""
    config, encoder, schedule = pipeline.config, pipeline.encoder, pipeline.schedule
    writable(site)
    with tempfile.TemporaryDirectory(prefix=f".{site.name}.", dir=site.resolve().parent) as scratch:
        beside, packed = Path(scratch), {}
        shutil.copytree(PAGE, beside, dirs_exist_ok=True)
        (beside / "runtime").mkdir()
        runtime = packages.fetch(RUNTIME) / "dist"
        for main, engine in ENGINES.items():
            for script in (f"{main}.min.mjs", f"{engine}.mjs"):
                shutil.copy(runtime / script, beside / "runtime" / script)
            packed[f"runtime/{engine}.wasm"] = (runtime / f"{engine}.wasm").read_bytes()
        packed["unet.onnx"] = unet(config, pipeline.weights, encoder.dim, dtype)
        captions, parts = captions_of(pipeline), []
        for start in range(0, len(captions), PART):
            part = ["", *captions[start : start + PART]]
            tokens, packed[f"captions/{len(parts)}.f16"] = embedded(part, encoder, config.TEXT_LEN)
            parts.append({"captions": part, "tokens": tokens})
        if words := words_of(encoder.tokenizer):
            packed["encoder.onnx"] = encoder_of(encoder, config.TEXT_LEN)
            packed["words.json"] = json.dumps(words, ensure_ascii=False).encode()

        sizes, version = {}, hashlib.sha256()
        for name, content in packed.items():
            content = gzip.compress(content, mtime=0)
            sizes[name] = len(content)
            version.update(content)
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / f"{name}.gz").write_bytes(content)
        known = {
            "version": version.hexdigest()[:12], "files": sizes, "about": about, "shape": pipeline.shape,
            "prediction": config.prediction, "sampling": {"c": sampling.c, "steps": sampling.steps},
            "interval": steps_within(sampling.interval, config.T).tolist(),
            "schedule": {name: np.asarray(level).tolist() for name, level in schedule._asdict().items()},
            "length": config.TEXT_LEN, "dim": encoder.dim, "examples": pipeline.about["prompts"], "parts": parts,
        }  # fmt: skip
        (beside / "site.json").write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
        shutil.copytree(beside, site, dirs_exist_ok=True)
        return sum(file.stat().st_size for file in beside.rglob("*") if file.is_file())
