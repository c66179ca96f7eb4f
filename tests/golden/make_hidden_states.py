"""Golden hidden states: transformers' torch BertModel on MiniLM, and on a small BERT of another shape.

In an environment of its own with `torch` and `transformers`, from the repository root:

    python tests/golden/make_hidden_states.py FOLDER     # where FOLDER holds all-MiniLM-L6-v2

writes `minilm_hidden_states.npz`: for each of MINILM_PROMPTS and TINY_PROMPTS the tokens ("minilm_tokens_0", ...) and
the last hidden states ("minilm_0", ...), every prompt run alone, so that no padding or mask enters. Made with torch
2.13.0 and transformers 5.23.0.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FILE = Path(__file__).with_name("minilm_hidden_states.npz")
MINILM_PROMPTS = [
    "",
    "dog",
    "smiling face with heart-eyes",
    "A naïve CAFÉ: 3½ croissants, 東京 & \U0001f600!",
    "a very small brown dog in a red coat runs along the beach at sunset while two children throw a yellow ball, "
    "sea gulls circle overhead, and far behind them a lighthouse blinks, photographed from above, watercolour",
]
TINY_PROMPTS = ["", "cat", "zebra on a hill"]


def tiny_bert(folder: Path, *, prefix: str = "", **config) -> Path:
    """Write a BERT unlike MiniLM in depth, heads, sizes and eps; its weights are sines, so no generator is involved."""
    dim, inner, depth, positions = 24, 40, 12, 20
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]

    shapes = {
        "embeddings.word_embeddings.weight": (len(vocabulary), dim),
        "embeddings.position_embeddings.weight": (positions, dim),
        "embeddings.token_type_embeddings.weight": (2, dim),
        "embeddings.LayerNorm": (dim,),
    }
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.self.{part}": (dim, dim) for part in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense": (dim, dim), f"{layer}.attention.output.LayerNorm": (dim,)}
        shapes |= {f"{layer}.intermediate.dense": (inner, dim), f"{layer}.output.dense": (dim, inner)}
        shapes |= {f"{layer}.output.LayerNorm": (dim,)}

    weights = {}
    for name, shape in shapes.items():
        sines = [np.sin(1 + np.arange(n) * (1 + len(weights) ** 0.5)) for n in (np.prod(shape), shape[0])]
        if name.endswith("embeddings.weight"):
            weights[name] = sines[0].reshape(shape)
        elif name.endswith("LayerNorm"):
            weights |= {f"{name}.weight": 1 + 0.3 * sines[0], f"{name}.bias": 0.1 * sines[1]}
        else:
            weights |= {f"{name}.weight": 0.5 * sines[0].reshape(shape), f"{name}.bias": 0.1 * sines[1]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: w.astype(np.float32) for name, w in weights.items()}, folder / "model.safetensors")

    settings = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": dim, "intermediate_size": inner}
    settings |= {"num_hidden_layers": depth, "num_attention_heads": 3, "layer_norm_eps": 0.05, "type_vocab_size": 2}
    settings |= {"vocab_size": len(vocabulary), "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(settings | config))

    numbers = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def main(minilm: Path) -> None:
    import torch
    from transformers import BertModel, PreTrainedTokenizerFast

    golden = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_bert(Path(scratch))
        for name, folder, prompts in (("minilm", minilm, MINILM_PROMPTS), ("tiny", tiny, TINY_PROMPTS)):
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
            for i, prompt in enumerate(prompts):
                tokens = tokenizer(prompt, padding=False, return_token_type_ids=False, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    hidden = model(tokens).last_hidden_state[0].numpy()
                golden[f"{name}_tokens_{i}"] = tokens[0].numpy().astype(np.int32)
                golden[f"{name}_{i}"] = hidden
                print(f"{name} {tokens.shape[1]:4d} tokens, standard deviation {hidden.std():.3f}  {prompt[:60]!r}")
    np.savez_compressed(FILE, **golden)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
