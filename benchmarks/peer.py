"""This project beside diffusers on torch, on the CPU: `python benchmarks/peer.py [PRESET] --python PATH`.

PATH is the Python of the peer's own virtual environment, made once by

    python -m venv .venv-peer
    .venv-peer/bin/pip install -r benchmarks/requirements-peer.txt

This process runs the JAX side and drives a second one, the same file under that Python, by lines of JSON. Rounds of
both alternate and only one side computes at a time, so that a machine whose speed drifts bends no ratio. Compared at
the same batch, sizes of pictures and captions, number of cores:

    train   one step. Here: training.build_train_step. There: a UNet2DConditionModel, mean squared error, gradient
            clipping, AdamW, two averages of the weights (torch._foreach_lerp_); float32, and bf16 autocast
    draw    a batch of pictures with classifier-free guidance, one doubled batch per step. Here: sampling.build_sampler.
            There: a DiffusionPipeline without a VAE, DDIMScheduler, inference_mode; float32, and bf16 weights

The peer's network has the preset's plan: the same folded pixels at entry, resolutions, blocks, attention at the same
resolutions, norm and head sizes. Its layers differ (a transformer block with a feed-forward part where this project
has plain attention, one more block per resolution on the way up, no pooled caption), so one factor narrows or widens
it until the FLOPs of a forward pass agree within 10 %. FLOPs are those of matrix products and convolutions, a
multiply-add being two and a tap on the padding counting, as torch counts them; a convolution counts as it is written.
XLA's count is printed too: it leaves padding out, and counts the products that kernels.py makes of a convolution. Of
torch's memory layouts and AdamW kernels the fastest here are taken, each tried before the first round.

Wants an idle machine: where other programs hold a core, torch's threads spend their time waiting for one another (a
step measured ten times slower). There, `taskset -c 0 python benchmarks/peer.py …` gives both sides one core.
"""

import argparse
import bisect
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from count import count_flops

ROOT = Path(__file__).resolve().parent.parent
TEXT_DIM = 384
IMAGES = 512  # random pictures and captions to train on
TOLERANCE = 0.1  # how far apart the FLOPs of the two networks may be
TURN = 5  # timed training steps in one turn, after an untimed one: the other side has filled the caches
TRIALS = ("train", "draw")
OURS, PEERS = "jax float32", ("torch float32", "torch bf16")
INSTALL = """make the peer's virtual environment with
    python -m venv .venv-peer
    .venv-peer/bin/pip install -r benchmarks/requirements-peer.txt
and give its Python: --python .venv-peer/bin/python"""

Trial = Callable[[], object]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(function: Trial) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def turn(name: str, function: Trial) -> float:
    """Seconds of one trial, as one side measures them in a round."""
    if name != "train":
        return seconds(function)
    function()
    return statistics.median(seconds(function) for _ in range(TURN))


# The JAX side


def ours(config, *, pictures: int, steps: int) -> tuple[dict[str, Trial], dict]:
    """The trials of the JAX side, compiled, and what is to be known about it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import flax
    import jax
    import made_up

    import training

    state, data, rows, key = made_up.arguments(config, IMAGES)
    train_step = training.build_train_step(config)
    draw_pictures = made_up.drawer(config, data, pictures=pictures, sampler="ddim", steps=steps)

    def train() -> None:
        nonlocal state
        state, loss = train_step(state, data, rows, key)
        loss.block_until_ready()

    def draw() -> None:
        jax.block_until_ready(draw_pictures(state.ema.short))

    forward, inputs = made_up.forward(config)
    about = {
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()},
        "flops": count_flops(jax.make_jaxpr(forward)(*inputs).jaxpr),
        "xla_flops": jax.jit(forward).lower(*inputs).cost_analysis()["flops"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.weights)),
        "channels": [config.BASE_DIM * mult for mult in config.DIM_MULTS],
    }
    for function in (train, train, draw):
        function()
    return {"train": train, "draw": draw}, about


# The torch side


def build_unet(config: SimpleNamespace, widths: tuple[int, ...]):
    """The preset's plan in diffusers' own blocks, `widths` channels at its resolutions."""
    from diffusers import UNet2DConditionModel

    levels = range(len(widths))
    attends = [level in {*config.self_attention, *config.cross_attention} for level in levels]
    heads = [max(n for n in range(1, max(1, w // config.HEAD_DIM) + 1) if w % n == 0) for w in widths]
    pixels = config.CHANNELS * config.PATCH**2
    return UNet2DConditionModel(
        sample_size=(config.H // config.PATCH, config.W // config.PATCH),
        in_channels=pixels,
        out_channels=pixels,
        block_out_channels=widths,
        layers_per_block=config.BLOCKS,
        down_block_types=["CrossAttnDownBlock2D" if attends[level] else "DownBlock2D" for level in levels],
        mid_block_type="UNetMidBlock2DCrossAttn" if attends[-1] else "UNetMidBlock2D",
        up_block_types=["CrossAttnUpBlock2D" if attends[level] else "UpBlock2D" for level in reversed(levels)],
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=heads,  # by this name diffusers means the number of heads
        norm_num_groups=math.gcd(32, *widths),
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=config.T_out,
    )


def unet_flops(config: SimpleNamespace, widths: tuple[int, ...]) -> int:
    """FLOPs of a forward pass for one picture; on the meta device, where attention counts as its two products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        image = torch.zeros(1, config.CHANNELS * config.PATCH**2, config.H // config.PATCH, config.W // config.PATCH)
        text = torch.zeros(1, config.TEXT_LEN, TEXT_DIM)
        build_unet(config, widths)(image, torch.zeros(1, dtype=torch.long), encoder_hidden_states=text)
    return counter.get_total_flops()


def matched_widths(config: SimpleNamespace, flops: int) -> tuple[int, ...]:
    """The preset's channels times one factor, in multiples of 16 (a vector of AVX-512), whose FLOPs come nearest."""
    plan = [config.BASE_DIM * mult for mult in config.DIM_MULTS]
    scaled = (tuple(max(16, 16 * round(dim * percent / 1600)) for dim in plan) for percent in range(10, 201))
    choices = [widths for widths, _ in itertools.groupby(scaled)]
    place = bisect.bisect_left(choices, flops, key=lambda widths: unet_flops(config, widths))
    return min(choices[max(0, place - 1) : place + 1], key=lambda widths: abs(unet_flops(config, widths) - flops))


def build_trainer(config: SimpleNamespace, widths: tuple[int, ...], *, bf16: bool, layout: str, adamw: str) -> Trial:
    """One training step of the peer, as a script on diffusers takes it."""
    import torch
    from diffusers import DDPMScheduler

    memory_format = getattr(torch, layout)
    unet = build_unet(config, widths).to(memory_format=memory_format)
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, config.learning_rate, weight_decay=config.weight_decay, **{adamw: True})
    averages = {decay: [weight.detach().clone() for weight in weights] for decay in (0.999, 0.9997)}
    scheduler = DDPMScheduler(config.T, beta_schedule="squaredcos_cap_v2")
    images = torch.randint(0, 256, (IMAGES, config.CHANNELS, config.H, config.W), dtype=torch.uint8)
    captions, null = torch.randn(IMAGES, config.TEXT_LEN, TEXT_DIM), torch.zeros(config.TEXT_LEN, TEXT_DIM)

    def train() -> None:
        rows = torch.randint(IMAGES, (config.B,))
        image = torch.nn.functional.pixel_unshuffle(images[rows].float() / 127.5 - 1, config.PATCH)
        image = image.to(memory_format=memory_format)
        text = torch.where(torch.rand(config.B, 1, 1) < config.embedding_dropout, null, captions[rows])
        noise = torch.randn_like(image)
        t = torch.randint(config.T, (config.B,))
        noisy = scheduler.add_noise(image, noise, t)
        target = {"eps": noise, "v": scheduler.get_velocity(image, noise, t), "x0": image}[config.prediction]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = unet(noisy, t, encoder_hidden_states=text).sample
        torch.nn.functional.mse_loss(predicted.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for decay, average in averages.items():
                torch._foreach_lerp_(average, weights, 1 - decay)

    return train


def build_drawer(
    config: SimpleNamespace, widths: tuple[int, ...], *, bf16: bool, layout: str, pictures: int, steps: int
) -> Trial:
    """A guided batch of pictures from the peer's pipeline."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline
    from diffusers.utils.torch_utils import randn_tensor

    class PixelPipeline(DiffusionPipeline):
        """Text to pictures with no autoencoder between."""

        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.inference_mode()
        def __call__(self, text, null, *, guidance_scale: float, num_inference_steps: int, generator: list):
            size = (self.unet.config.in_channels, *self.unet.config.sample_size)
            sample = randn_tensor((len(text), *size), generator=generator).to(memory_format=memory_format)
            text = torch.cat([null.expand_as(text), text]).to(self.unet.dtype)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.progress_bar(self.scheduler.timesteps):
                doubled = self.scheduler.scale_model_input(torch.cat([sample] * 2), t).to(self.unet.dtype)
                predicted = self.unet(doubled, t, encoder_hidden_states=text, return_dict=False)[0].float()
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
                sample = self.scheduler.step(predicted, t, sample, return_dict=False)[0]
            image = torch.nn.functional.pixel_shuffle(sample, config.PATCH)
            return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    memory_format = getattr(torch, layout)
    dtype = torch.bfloat16 if bf16 else torch.float32
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction]
    scheduler = DDIMScheduler(
        config.T,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=True,
    )
    unet = build_unet(config, widths).to(dtype, memory_format=memory_format).eval().requires_grad_(False)
    pipeline = PixelPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    text, null = torch.randn(pictures, config.TEXT_LEN, TEXT_DIM), torch.zeros(config.TEXT_LEN, TEXT_DIM)

    def draw() -> None:
        generator = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
        pipeline(text, null, guidance_scale=7.0, num_inference_steps=steps, generator=generator)

    return draw


def fastest(builds: dict[str, Callable[[], Trial]]) -> str:
    """The name of the build whose trial is quickest: the best of four each, in turn, after a first that is untimed."""
    trials = {name: build() for name, build in builds.items()}
    for trial in trials.values():
        trial()
    times = [{name: seconds(trial) for name, trial in trials.items()} for _ in range(4)]
    return min(trials, key=lambda name: min(each[name] for each in times))


def theirs(config: SimpleNamespace, *, flops: int, pictures: int, steps: int) -> tuple[dict[str, Trial], dict]:
    """The trials of the torch side, warm, and what is to be known about it."""
    import diffusers
    import torch

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    widths = matched_widths(config, flops)
    layouts, kernels = ("contiguous_format", "channels_last"), ("fused", "foreach")
    trials, choices = {}, {}
    for peer in PEERS:
        bf16 = peer.endswith("bf16")

        def trainer(choice: str, bf16: bool = bf16) -> Trial:
            layout, adamw = choice.split()
            return build_trainer(config, widths, bf16=bf16, layout=layout, adamw=adamw)

        def drawer(layout: str, bf16: bool = bf16, steps: int = steps) -> Trial:
            return build_drawer(config, widths, bf16=bf16, layout=layout, pictures=pictures, steps=steps)

        combinations = [f"{layout} {adamw}" for layout in layouts for adamw in kernels]
        for name, builder, tried in (
            ("train", trainer, {choice: lambda c=choice, b=trainer: b(c) for choice in combinations}),
            ("draw", drawer, {choice: lambda c=choice, b=drawer: b(c, steps=min(steps, 3)) for choice in layouts}),
        ):
            key = f"{name} {peer}"
            choices[key] = fastest(tried)
            trials[key] = builder(choices[key])
            trials[key]()
    about = {
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "flops": unet_flops(config, widths),
        "parameters": sum(weight.numel() for weight in build_unet(config, widths).parameters()),
        "channels": widths,
        "choices": choices,
    }
    return trials, about


def worker() -> None:
    """Read a line of JSON, answer by a line: first the set-up, then the name of one trial after another."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not end up among the answers

    def answer(**reply) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        answer(error=f"{sys.executable}: {error}\n{INSTALL}")
        return
    trials, about = theirs(SimpleNamespace(**setup.pop("config")), **setup)
    answer(**about)
    for line in sys.stdin:
        key = json.loads(line)["trial"]
        answer(seconds=turn(key.split()[0], trials[key]))


class Peer:
    """The other process."""

    def __init__(self, python: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [python, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, **request) -> dict:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            sys.exit(f"the torch side ended with code {code}; the last it said:\n{self.errors.read()[-3000:]}")
        reply = json.loads(line)
        if "error" in reply:
            sys.exit(reply["error"])
        return reply

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # nothing is lost: it keeps no files
        self.process.wait()
        self.errors.close()


# Both


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from params import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="cpu", choices=PRESETS)
    parser.add_argument("--python", metavar="PATH", required=True, help="Python of the peer's virtual environment")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side, at least 5 (7)")
    parser.add_argument("--batch", type=int, help="pictures in a training step (the preset's own)")
    parser.add_argument("--pictures", type=int, default=4, help="pictures drawn at once (4)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a drawing (25)")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error(f"--rounds {options.rounds}: give 5 or more")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch {options.batch}: give 1 or more")
    if not 1 <= options.pictures <= IMAGES:
        parser.error(f"--pictures {options.pictures}: give 1 to {IMAGES}")
    config = PRESETS[options.preset]
    if not 1 <= options.steps <= config.T:
        parser.error(f"--steps {options.steps}: give 1 to the {config.T} of the schedule")
    if shutil.which(options.python) is None:
        sys.exit(f"--python {options.python}: there is no such program\n{INSTALL}")
    config = dataclasses.replace(config, B=options.batch or config.B)
    draws = {"pictures": options.pictures, "steps": options.steps}

    with Peer(options.python) as peer:
        trials, here = ours(config, **draws)
        there = peer.ask(config=config.to_json(), flops=here["flops"], **draws)
        if abs(there["flops"] / here["flops"] - 1) > TOLERANCE:
            sys.exit(f"no widths of the peer come within {TOLERANCE:.0%} of {here['flops']:,} FLOPs: {there}")
        rounds = {f"{name} {side}": [] for name in TRIALS for side in (OURS, *PEERS)}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name in TRIALS:
                rounds[f"{name} {OURS}"].append(turn(name, trials[name]))
                for side in PEERS:
                    rounds[f"{name} {side}"].append(peer.ask(trial=f"{name} {side}")["seconds"])

    times = {key: spread(values) for key, values in rounds.items()}
    ratios = {}
    for name in TRIALS:
        mine = f"{name} {OURS}"
        for side in PEERS:
            key = f"{name} {side}"
            each = (other / own for own, other in zip(rounds[mine], rounds[key], strict=True))
            ratios[key] = {**spread(each), "median": times[key]["median"] / times[mine]["median"]}
    result = {
        "preset": options.preset,
        "cores": cores(),
        "batch": config.B,
        **draws,
        "rounds": options.rounds,
        "ours": here,
        "peer": there,
        "seconds": times,
        "peer_seconds_over_ours": ratios,
    }

    print(f"preset {options.preset}, {cores()} cores; a forward pass, one picture:")
    for side, about in (("ours", here), ("peer", there)):
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        print(
            f"  {side}  {about['flops'] / 1e6:9,.0f} MFLOP  {about['parameters'] / 1e6:6.2f} M parameters  "
            f"channels {', '.join(map(str, about['channels']))}  ({versions})"
        )
    print(f"  peer / ours {there['flops'] / here['flops']:.3f}; XLA counts {here['xla_flops'] / 1e6:,.0f} for ours")
    print(f"train: batch {config.B}; draw: {options.pictures} pictures, {options.steps} guided steps")
    print(f"{'':22}{'seconds':>9}{'min':>9}{'max':>9}{'pictures/s':>12}{'GFLOP/s':>9}   seconds over ours (min-max)")
    for key, each in times.items():
        training = key.startswith("train")
        passes = 3 * config.B if training else 2 * options.steps * options.pictures
        about = here if key.endswith(OURS) else there
        speed = (config.B if training else options.pictures) / each["median"]
        line = f"{key:22}{each['median']:9.4f}{each['min']:9.4f}{each['max']:9.4f}{speed:12.2f}"
        line += f"{passes * about['flops'] / each['median'] / 1e9:9.0f}"
        if key in ratios:
            line += "   {median:.2f} ({min:.2f}-{max:.2f})".format(**ratios[key])
        print(line + (f"  {there['choices'][key]}" if key in there["choices"] else ""))
    path = Path(__file__).with_name(f"peer-{options.preset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path} written")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv[1:] else main()
