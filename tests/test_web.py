"""The site that draws in a browser: its network, its noise, solver and words beside Python's, and the page as a whole.

Skipped is what needs a program that is not here: onnx and onnxruntime, node, or playwright and chromium.
"""

import base64
import dataclasses
import functools
import http.server
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_hidden_states import tiny_bert
from PIL import Image
from safetensors.numpy import load_file, save_file

import checkpoint
import schedule as schedules
from images import to_bytes
from model import UNet, network
from params import Sampling
from pipeline import DiffusionPipeline
from samplers import SOLVERS, FreshNoise, timesteps
from sharing import portable
from sources import packages
from text_encoder import TextEncoder

onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install -r requirements-web.txt")
pytest.importorskip("onnx", reason="no onnx: pip install -r requirements-web.txt")

import export  # noqa: E402
from sharing import web  # noqa: E402
from sharing.onnx_graph import UnsupportedError, to_onnx  # noqa: E402

# A function as ONNX.


def computed(model, *inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [it.name for it in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def shapes_of(*inputs):
    return {f"input{i}": jax.ShapeDtypeStruct(it.shape, it.dtype) for i, it in enumerate(inputs)}


def same(function, *inputs, weights=None, atol=1e-6):
    """Whether JAX and the exported function give the same, weights stored as they are."""
    inputs, weights = [*map(np.asarray, inputs)], weights or {}
    model = to_onnx(function, jax.tree.map(lambda weight: (weight,), weights), shapes_of(*inputs))
    np.testing.assert_allclose(computed(model, *inputs), function(weights, *inputs), rtol=1e-5, atol=atol)


RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 5, 6)).astype(np.float32)
WORDS = np.array([[3, 0, 4], [1, 1, 2]], np.int32)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: jax.nn.gelu(x, approximate=False) + jax.nn.gelu(x),
        lambda _, x: jax.nn.softmax(x, axis=1) * jax.lax.erf(x) + jnp.abs(x) ** 1.5,
        lambda _, x: jnp.where((x > 0.5) & (x < 1) | ~(x <= 1.5), x**3, -x) / jnp.sqrt(1 + x**2),
        lambda _, x: jnp.concatenate([x[:, 1:4:2], jnp.ones((2, 1, 6))], axis=1).T,
        lambda _, x: jnp.split(x[:, None].repeat(3, axis=1), [1, 4], axis=2)[1].max((0, 2)),
        lambda _, x: jnp.einsum("bij,bkj->kbi", x, x) + jnp.einsum("bij,bij->b", x, x)[None, :, None],
        lambda _, x: jnp.tanh(x.mean((1, 2), keepdims=True) * jnp.sin(jnp.arange(6.0))[None, None]).sum(1),
    ],
)
def test_each_rule_computes_what_jax_computes(function):
    same(function, X)


def test_a_browser_is_no_platform_of_jax():
    def function(_, x):
        return jax.lax.platform_dependent(x, cpu=jnp.zeros_like, default=jnp.exp)

    np.testing.assert_allclose(computed(to_onnx(function, {}, shapes_of(X)), X), np.exp(X), rtol=1e-6)


def test_scan_and_rows_of_a_table():
    def function(weights, words):
        x = weights["table"][words]
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["w"] + w["b"][None]), None), x, weights["layers"])[0]

    weights = {"table": X[0], "layers": {"w": np.stack([x.T @ x for x in X]), "b": RANDOM.normal(size=(2, 1, 6))}}
    same(function, WORDS, weights=jax.tree.map(np.float32, weights), atol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution(strides):
    layer = nnx.Conv(6, 4, (3, 3), strides=strides, rngs=nnx.Rngs(0))
    same(lambda _, x: layer(x), X.reshape(2, 5, 1, 6).repeat(4, axis=2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _, x: jnp.sort(x), "has no rule for the primitive sort"),
        (lambda _, x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), "which branch jax.lax.cond takes must not"),
        (lambda _, x: jax.lax.scan(lambda c, y: (c, y + c), x[0], x)[1], "a jax.lax.scan that stacks results"),
    ],
)
def test_what_has_no_rule_is_named(function, message):
    with pytest.raises(UnsupportedError, match=message):
        to_onnx(function, {}, shapes_of(X))


# The network.


def weights_of(config, dim):
    like = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(UNet(config, dim, nnx.Rngs(0)))))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda w: np.asarray(0.2 * random.normal(size=w.shape), np.float32), like)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_exported_network_computes_what_the_network_does(tiny, dtype):
    config = dataclasses.replace(
        tiny, H=8, W=12, PATCH=2, BASE_DIM=32, DIM_MULTS=(1, 2), self_attention=(1,), cross_attention=(0, 1),
        HEAD_DIM=8, CHANNELS=4, augmentation=0.5, compute="bfloat16",
    )  # fmt: skip
    weights, random = weights_of(config, 6), np.random.default_rng(1)
    noisy, text_emb = (random.normal(size=s).astype(np.float32) for s in ((2, 8, 12, 4), (2, config.TEXT_LEN, 6)))
    inputs = noisy, np.int32([49, 3]), text_emb, np.arange(config.TEXT_LEN)[None] < np.array([[5], [2]])
    exported = computed(web.unet(config, weights, 6, dtype), *inputs)

    def rounded(weight):
        return portable._read([*portable.stored("", weight, dtype).values()])

    weights, *inputs = jax.device_put((jax.tree.map(rounded, weights), *inputs))
    expected = jax.jit(network(dataclasses.replace(config, compute="float32"), weights))(*inputs)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(exported, expected, atol=1e-4 * np.abs(expected).max())


def test_the_exported_encoder_is_near_the_encoder(tmp_path):
    encoder = TextEncoder(str(tiny_bert(tmp_path / "bert")))
    tokens, mask = encoder.tokenize(["red heart", "a"], 12)
    model = web.encoder_of(encoder, 12)
    exact = np.asarray(encoder.encode(encoder.weights, *jax.device_put((tokens, mask))))
    for row in range(2):
        found = computed(model, tokens[row : row + 1], mask[row : row + 1])[0]
        assert (found[~mask[row]] == 0).all()
        assert np.std(found - exact[row]) < 0.05 * np.std(exact[row])


# JavaScript beside Python.


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """Evaluate an expression over the modules of the site and `data`, in node."""
    if not shutil.which("node"):
        pytest.skip("node is not here")
    folder = tmp_path_factory.mktemp("node")
    for name in ("random.js", "sampler.js", "text.js"):
        shutil.copy(web.PAGE / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "run.js").write_text(
        """import { readFileSync } from "node:fs";
        const modules = await Promise.all(["random", "sampler", "text"].map((name) => import(`./${name}.js`)));
        const [random, sampler, text] = modules, { code, data } = JSON.parse(readFileSync(0, "utf8"));
        const plain = (_, it) => (ArrayBuffer.isView(it) ? [...it] : it);
        const evaluated = await new Function("random", "sampler", "text", "data", `return (${code})`)(
          random, sampler, text, data);
        console.log(JSON.stringify(evaluated, plain));"""
    )

    def run(code, data=None):
        request = json.dumps({"code": code, "data": data})
        done = subprocess.run(["node", folder / "run.js"], input=request, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("seed", [0, 3, 2**31 - 1])
def test_noise_of_a_seed_is_that_of_jax(node, seed):
    found = node("random.normal(random.split(random.keyOf(data), 0), 5000)", seed)
    np.testing.assert_allclose(found, jax.random.normal(jax.random.split(jax.random.key(seed))[0], 5000), atol=2e-6)


@pytest.mark.parametrize(("T", "steps"), [(1000, 20), (1000, 16), (50, 7), (999, 37), (3, 2)])
def test_timesteps(node, T, steps):
    assert node("sampler.timesteps(...data)", [T, steps]) == timesteps(schedules.cosine(T), steps).tolist()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_solver(node, steps, zero_terminal_snr):
    schedule, noisy = schedules.cosine(1000, zero_terminal_snr=zero_terminal_snr), RANDOM.normal(size=12)
    times = timesteps(schedule, steps)
    data = {"noisy": noisy.tolist(), "times": times.tolist()}
    data |= {name: np.asarray(level).tolist() for name, level in schedule._asdict().items()}
    found = node(
        "sampler.dpmpp2m((x, t) => x.map((it) => Math.sin(it) * t / 1000), data, data.times,"
        " Float32Array.from(data.noisy), () => {})",
        data,
    )
    fresh = FreshNoise(jax.random.split(jax.random.key(0), 1), jnp.zeros(()), jnp.ones(()))
    denoise = lambda x, t: jnp.sin(x) * (t / 1000)[:, None, None, None]  # noqa: E731
    exact = SOLVERS["dpmpp_2m"].solve(denoise, schedule, jnp.float32(noisy.reshape(1, 2, 2, 3)), times, fresh)
    np.testing.assert_allclose(found, exact.noisy.reshape(-1), atol=2e-5)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_denoised_and_guided(node, kind):
    schedule, t = schedules.cosine(10), 4
    noisy, first, second = RANDOM.normal(size=(3, 1, 1, 2, 3)).astype(np.float32)
    mix = [float(level[t]) for level in schedule]
    data = [kind, *([*map(float, it.reshape(-1))] for it in (noisy, first, second)), *mix]
    found = node(
        "((kind, x, a, b, ...mix) => sampler.guided(...[a, b].map((p) => sampler.denoisedFrom(kind, x, p, ...mix)), 3))"
        "(...data)",
        data,
    )
    a, b = (schedules.denoised_from(schedule, *jnp.array([noisy, it]), jnp.array([t]), kind) for it in (first, second))
    np.testing.assert_allclose(found, jnp.clip(b + 3 * (a - b), -1, 1).reshape(-1), atol=1e-6)


def test_guidance_acts_within_the_interval_and_at_its_ends(node):
    found = node("data.map((t) => sampler.strengthAt(t, 7, [200, 800]))", [0, 199, 200, 500, 800, 801, 1000])
    assert found == [1, 1, 7, 7, 7, 1, 1]
    positive, negative = RANDOM.uniform(-1, 1, size=(2, 50)).astype(np.float32)
    code = "sampler.guided(...data.map((it) => Float32Array.from(it)), 1)"
    found = node(code, [positive.tolist(), negative.tolist()])
    np.testing.assert_allclose(found, positive, atol=1e-7)  # a strength of 1 is the caption alone


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels(node, channels):
    image = RANDOM.uniform(-1.2, 1.2, size=(1, 40, channels)).astype(np.float32)
    found = np.reshape(node("sampler.toPixels(data[0], data[1])", [image.reshape(-1).tolist(), channels]), (40, 4))
    exact = np.asarray(to_bytes(image))[0]
    if channels < 4:
        assert (found[:, 3] == 255).all()
        found = found[:, :channels]
    np.testing.assert_array_equal(found, exact)


def test_vectors_of_captions(node, tmp_path):
    encoder = TextEncoder(str(tiny_bert(tmp_path / "bert")))
    captions = ["", "red heart", "a", "heart"]
    tokens, packed = web.embedded(captions, encoder, 12)
    data = {"tokens": tokens, "length": 12, "dim": encoder.dim, "bytes": [*packed]}
    for row, (text_emb, text_mask) in enumerate(zip(*encoder(captions, 12), strict=True)):
        code = "text.embeddingOf(data.row, {...data, vectors: text.fromHalves(Uint8Array.from(data.bytes))})"
        found = node(code, data | {"row": row})
        np.testing.assert_array_equal(np.array(found["mask"], bool), text_mask)
        np.testing.assert_array_equal(np.float32(found["emb"]), text_emb.astype(np.float16).reshape(-1))


def test_halves(node):
    halves = np.arange(2**16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    found = node("text.fromHalves(Uint8Array.from(data))", [*halves.tobytes()])
    np.testing.assert_array_equal(np.float32(found), halves.view(np.float16))


@pytest.mark.filterwarnings("ignore:prompt cut")
@pytest.mark.parametrize("lowercase", [True, False])
def test_words_become_the_tokens_of_the_tokenizer(node, tmp_path, lowercase):
    encoder = TextEncoder(str(tiny_bert(tmp_path / "bert")))
    pieces = [*"abcdefghijklmnopqrstuvwxyz"] + [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += ["heart", "##ing", "-", "!", "中", "É", "é", "σ", "##σ", "™", "dog", "face", "#", "1"]
    spec = json.loads(encoder.tokenizer.to_str())
    spec["normalizer"]["lowercase"] = lowercase
    for piece in pieces:
        spec["model"]["vocab"].setdefault(piece, len(spec["model"]["vocab"]))
    encoder.tokenizer = type(encoder.tokenizer).from_str(json.dumps(spec))
    texts = [
        "", "red heart", "Hearting  hearts\theart-ing!", "un😀known ß ÉCOLE éa e\u0301", "my 🐶", "中heart中",
        "a" * 101, "☺️™ #️⃣ *️⃣ 1", "zero\u200bwidth \u00a0 nbsp", "$5 <b> `x` ΣΣ",
        "a b c d e f g h i j k l m n o p q r s t",
    ]  # fmt: skip
    known = web.words_of(encoder.tokenizer)
    tokens, mask = encoder.tokenize(texts, 12)
    for text, row, visible in zip(texts, tokens, mask, strict=True):
        found = node("text.tokenize(data.text, 12, data.known)", {"text": text, "known": known})
        assert found["tokens"] == row.tolist(), text
        assert found["mask"] == visible.astype(int).tolist()


def test_captions_that_fit(node):
    captions = ["red heart", "heart with arrow", "heart", "man: red hair", "dog face"]
    for typed, found in (
        ("heart", ["heart", "red heart", "heart with arrow"]),
        ("RED  he", ["red heart"]),
        ("man: red hair", ["man: red hair"]),
        ("fac do", ["dog face"]),
        ("cat", []),
    ):
        assert node("text.matching(...data)", [typed, captions]) == found


# The whole.


def telling_bert(folder):
    """Folder of a tiny BERT whose vectors differ from word to word."""
    file = tiny_bert(folder) / "model.safetensors"
    weights = {name: weight if "Norm" in name else 0.1 * weight for name, weight in load_file(file).items()}
    words = weights["embeddings.word_embeddings.weight"]
    words[:] = np.random.default_rng(0).normal(size=words.shape)
    save_file(weights, file)
    return str(folder)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A tiny network as a folder and as a site."""
    root = tmp_path_factory.mktemp("web")
    encoder = TextEncoder(telling_bert(root / "bert"))
    config = dataclasses.replace(tiny, encoder=encoder.name, prediction="v", TEXT_LEN=16)
    about = {
        "config": config.to_json(), "encoder": encoder.identity, "schedule": {"name": "cosine", "T": config.T},
        "dataset": {"fingerprint": "0"}, "step": 16, "seconds": 90.0, "prompts": ["red disc", "a box"],
    }  # fmt: skip
    weights = weights_of(config, encoder.dim)
    weights["pooled_text"]["kernel"] *= 30  # so that words matter
    items = {f"ema_{ema}": weights for ema in ("short", "long")}
    checkpoint.Saver().save(root / "final", {**items, "train": {"step": np.int32(16)}}, about, now=True)
    checkpoint.recommend(root / "final", Sampling(c=3, steps=5, interval=(0.3, 0.7)))
    try:
        packages.fetch(web.RUNTIME)
    except packages.PackageError as error:
        pytest.skip(str(error))
    paths = root / "final", root / "folder"
    said = export.export(export.Options(paths, dtype="float16", web=root / "site"))
    assert f"{root / 'site'} written" in said
    return paths[1], root / "site"


def test_the_site_is_whole_and_replaces_an_earlier_one(exported, tmp_path):
    folder, site = exported
    about = json.loads((site / "site.json").read_text())
    assert {"index.html", "app.js", "sw.js", "style.css"} <= {file.name for file in site.iterdir()}
    assert about["shape"] == [8, 12, 3]
    assert about["sampling"] == {"c": 3, "steps": 5}
    assert about["interval"] == [15, 35]
    assert "Mine: of the author" in about["about"]
    assert about["parts"][0]["captions"][:3] == ["", "red disc", "green box"]
    assert about["parts"][0]["captions"][-1] == "a box"  # an example that is no training caption
    for name, size in about["files"].items():
        assert (site / f"{name}.gz").stat().st_size == size
    assert "written" in export.export(export.Options((folder, tmp_path / "folder"), dtype="int8", web=site))
    assert json.loads((site / "site.json").read_text())["version"] != about["version"]


def test_other_files_are_left_alone(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a site; choose another folder, or empty it"):
        export.export(export.Options((exported[0], tmp_path / "folder"), web=tmp_path))
    assert [*tmp_path.iterdir()] == [tmp_path / "notes.txt"]


def test_without_the_pictures_the_site_knows_the_examples(exported, monkeypatch, capsys):
    drawer = DiffusionPipeline(exported[0])
    drawer.config = dataclasses.replace(drawer.config, data="nowhere")
    assert web.captions_of(drawer) == ["red disc", "a box"]
    assert "note: the pictures are not here" in capsys.readouterr().err


class Served(NamedTuple):
    """A server of the site: its address, what lets its answers stall while it is set, and what ends it."""

    address: str
    stalled: threading.Event
    stop: Callable[[], None]


@pytest.fixture
def served(exported):
    stalled, done = threading.Event(), threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if stalled.is_set():
                done.wait()
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=exported[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        done.set()
        server.shutdown()
        server.server_close()

    yield Served(f"http://127.0.0.1:{server.server_port}/", stalled, stop)
    stop()


@pytest.fixture
def page():
    """A page of chromium, on which no script may fail."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not shutil.which("chromium"):
        pytest.skip("chromium is not here")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"chromium does not start here: {error}")
        page, faults = browser.new_page(), []
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: faults.append(error))
        yield page
        browser.close()
    assert not faults


def latest(page, n):
    """The newest of n drawings in the gallery, as [h, w, 3]."""
    page.wait_for_function(f"document.querySelectorAll('#gallery figure').length == {n}")
    source = page.locator("#gallery img").first.get_attribute("src")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"), int)


@pytest.mark.slow
def test_the_browser_draws_what_python_draws(exported, served, page):
    address = served.address
    drawer = DiffusionPipeline(exported[0])

    def drawn(prompt, seed, **changes):
        sampling = dataclasses.replace(drawer.sampling, **changes)
        return drawer.generate_arrays([prompt], sampling, seeds=seed)[0].astype(int)

    page.goto(address)
    page.wait_for_function("crossOriginIsolated && !document.getElementById('draw').disabled")  # it loads twice
    page.fill("#prompt", "GREEN ")
    assert page.locator("#suggestions button").all_text_contents() == ["green box"]
    page.click("summary")
    page.fill("#seed", "7")
    page.check("#keep")
    page.fill("#prompt", "red disc")
    page.click("#draw")
    right = drawn("red disc", 7)
    assert np.abs(latest(page, 1) - right).max() <= 2
    assert np.abs(drawn("red disc", 7, interval=(0, 1)) - right).max() > 4  # the interval matters
    with page.expect_download() as download:
        page.click("#gallery .download")
    assert download.value.suggested_filename == "red-disc-7.png"
    with Image.open(download.value.path()) as picture:
        assert picture.size == (12, 8)

    page.fill("#prompt", "zebra")
    page.click("#draw")
    page.click("#fetch")
    found, right, other = latest(page, 2), drawn("zebra", 7), drawn("red disc", 7)
    assert np.abs(found - right).mean() < 0.2 * np.abs(other - right).mean()  # the encoder is in int8
    assert np.abs(other - right).mean() > 1

    served.stalled.set()  # what was loaded is there while the network stalls …
    page.goto("about:blank")
    page.goto(address + "#prompt=red+disc&seed=8&guidance=2&steps=4")
    assert np.abs(latest(page, 3) - drawn("red disc", 8, c=2, steps=4)).max() <= 2
    served.stop()  # … and without a server
    page.goto("about:blank")
    page.wait_for_timeout(31_000)  # until the service worker asks the network again
    page.goto(address + "#prompt=green+box&seed=9")
    assert np.abs(latest(page, 4) - drawn("green box", 9)).max() <= 2
    page.locator("#gallery .remove").first.click()
    latest(page, 3)
