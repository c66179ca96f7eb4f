"""Strict arithmetic for every test: no silent broadcasting, no random key used twice, shapes checked at each call.

The workers and the subprocesses of one test run share a cache of compiled programs, which ends with the run.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import contextmanager
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # these networks take longer to compile than to run
if metadata.version("jaxlib").startswith("0.10."):  # and less long so; later versions do not know these flags
    emitters = "--xla_cpu_use_fusion_emitters=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1 {emitters}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set by the first process, for all that it starts
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="test-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
if os.environ["JAX_PLATFORMS"] != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 that is not TF32, as tolerances expect

TYPED = ["augmentation", "ema", "dataloader", "dataset", "guidance", "kernels", "model", "parallel", "samplers"]
TYPED += ["sampling", "schedule", "text_encoder", "training"]
TYPED += [f"evaluation.{name}" for name in ("features", "heldout", "judge", "metrics")]
jaxtyping.install_import_hook(TYPED, "beartype.beartype")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small dataset of one's own: plain rectangles and discs in eight colours, and a two-column CSV."""
    from PIL import Image, ImageDraw

    root = tmp_path_factory.mktemp("shapes")
    (root / "image" / "Mine").mkdir(parents=True)
    rows = ["#,name"]
    colours = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
    for number, colour in enumerate(colours, 1):
        picture = Image.new("RGBA", (24, 16))
        shape = ImageDraw.Draw(picture).ellipse if number % 2 else ImageDraw.Draw(picture).rectangle
        shape((4, 2, 19, 13), fill=colour)
        picture.save(root / "image" / "Mine" / f"{number}.png")
        rows.append(f"{number},{colour} {'disc' if number % 2 else 'box'}")
    (root / "full_emoji.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def tiny(shapes):
    """A configuration that trains in seconds, with a prime or an odd size wherever one fits."""
    from params import Params

    return Params(
        data=str(shapes), vendor="Mine", encoder="sentence-transformers/all-MiniLM-L6-v2", TEXT_LEN=7, H=8, W=12,
        T=50, T_dim=6, T_out=10, BASE_DIM=8, DIM_MULTS=(1,), BLOCKS=1, self_attention=(), cross_attention=(0,),
        HEAD_DIM=4, B=3, epochs=2, warmup=2, learning_rate=1e-2, ema_short=0.1, ema_long=0.2,
        log_every=2, sample_every=1, save_every=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def linear_network():
    """A context in which a linear network stands for the U-Net: every input matters, and it compiles in a moment."""
    from flax import nnx

    import model
    import training

    class Linear(nnx.Module):
        def __init__(self, config, text_dim, rngs):
            self.pixel = nnx.Linear(config.CHANNELS, config.CHANNELS, rngs=rngs)
            self.words = nnx.Linear(text_dim, config.CHANNELS, rngs=rngs)

        def __call__(self, noisy, t, text_emb, text_mask, labels=None, dropout_key=None):
            words = self.words((text_emb * text_mask[..., None]).mean(1))
            return self.pixel(noisy) + (words * (1 - t[:, None] / 50))[:, None, None]

    @contextmanager
    def linear():
        with pytest.MonkeyPatch.context() as patch:
            for module in (model, training):
                patch.setattr(module, "UNet", Linear)
            init_state = training.init_state
            patch.setattr(training, "init_state", lambda *arguments: init_state(*arguments))  # another one to jax.jit
            model.abstract.cache_clear()
            yield
        model.abstract.cache_clear()

    return linear


@pytest.fixture
def sealed(monkeypatch):
    """A context in which nothing passes between host and device but by jax.device_put and jax.device_get.

    The arrays of a CPU lie on the host, so that JAX's guard lets them be read; here they refuse as a GPU's would, but
    for np.asarray, which takes their memory without asking.
    """
    Array, fetch = type(jnp.zeros(())), jax.device_get

    def refusing(convert):
        def conversion(self, *args, **options):
            assert jax.config.jax_transfer_guard_device_to_host != "disallow", "read by something else than device_get"
            return convert(self, *args, **options)

        return conversion

    reading = ("__array__", "__bool__", "__float__", "__format__", "__index__", "__int__", "__repr__", "item", "tolist")
    for name in reading:
        monkeypatch.setattr(Array, name, refusing(getattr(Array, name)))

    def device_get(tree):
        with jax.transfer_guard_device_to_host("allow"):
            return fetch(tree)

    monkeypatch.setattr(jax, "device_get", device_get)

    @contextmanager
    def seal():
        with jax.transfer_guard("disallow"), jax.transfer_guard_device_to_host("disallow"):
            yield

    return seal
