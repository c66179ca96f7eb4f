"""diffusers' own recipe on the same pictures for the same minutes: `python benchmarks/peer_recipe.py --python PATH`.

    python benchmarks/peer_recipe.py --python .venv-peer/bin/python --minutes 60 --output peer_cpu
    python evaluate.py --checkpoint models_cpu/final --pictures peer_cpu/pictures.npz --samples 500 --report peer_cpu

PATH is the Python of peer.py's virtual environment. This process writes the training pictures of a preset, and their
captions as its text encoder gives them, into the output folder. A second one, the same file under that Python, trains
diffusers' UNet2DConditionModel on them and draws the captions of a report. The second command scores these by the
measures that ours are scored by. Only training steps count as minutes, as in train.py.

The recipe is that of examples/text_to_image/train_text_to_image.py in diffusers with its defaults, but for what its
pretrained networks bring with them:

    network    peer.py's build_unet, as wide as makes the FLOPs of a forward pass those of ours within 10 %, at
               resolutions down to 8 × 8 as Stable Diffusion's has, with attention at 16 × 16 and 8 × 8, where it costs
               little; single pixels, or with --patch as many as ours folds; a mask hides padding, as it does for ours
    objective  mean squared error of the noise; DDPMScheduler() itself, 1,000 linear betas, as of
               examples/unconditional_image_generation
    optimizer  AdamW at 1e-4, decay 1e-2, gradients clipped to 1, batches of 16; its --lr_warmup_steps, 500, count here
               (its schedule "constant" passes over them, as its networks are not random)
    averages   EMAModel, as the command in its README asks for with --use_ema
    captions   one in ten is left empty, as guidance needs it of a network that starts from nothing
    drawing    DPMSolverMultistepScheduler from the config of the training scheduler, as its documentation makes it,
               with thresholding, which it has for pixels
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from peer import INSTALL, ROOT, TOLERANCE, build_unet, cores, matched_widths, unet_flops

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP, CLIP = 16, 1e-4, 1e-2, 500, 1.0
EMPTY = 0.1  # share of captions that training leaves out
STEPS = 20  # of the solver
TOGETHER = 16  # pictures drawn at once
SAID, SAVED = 50, 500  # steps between two lines, and between two states


# The JAX side


def prepare(folder: Path, preset: str, samples: int) -> int:
    """Write what the other side learns from and draws; returns the FLOPs of our network for one picture."""
    import jax
    import made_up
    from count import count_flops

    import dataloader
    import dataset
    from evaluation.captions import choose
    from params import PRESETS
    from sources import emojis
    from text_encoder import TextEncoder

    config = PRESETS[preset]
    config = dataclasses.replace(config, vendor=emojis.ensure(Path(config.data), config.vendor))
    pictures = dataset.from_config(config)
    real, unseen = (dataset.side(pictures, heldout=heldout) for heldout in (False, True))
    asked = [text for chosen in choose(real.names, unseen.names, samples).values() for text in chosen.texts]
    text_emb, text_mask = dataloader.encode(TextEncoder(config.encoder), ["", *real.names, *asked], config.TEXT_LEN)
    np.savez(folder / "data.npz", images=real.images, text_emb=text_emb, text_mask=text_mask, captions=asked)
    forward, inputs = made_up.forward(config)
    return count_flops(jax.make_jaxpr(forward)(*inputs).jaxpr)


# The torch side


def planned(config: dict, patch: int) -> SimpleNamespace:
    """A preset with other layers: those of a network from patches of so many pixels down to 8 × 8 of them."""
    sides = [side for side in (64, 32, 16, 8) if side <= min(config["H"], config["W"]) // patch]
    attends = [level for level, side in enumerate(sides) if side <= 16]
    layers = {"PATCH": patch, "DIM_MULTS": (1, 2, 2, 2)[: len(sides)], "BLOCKS": 2}
    return SimpleNamespace(**config | layers | {"self_attention": attends, "cross_attention": attends})


def train(unet, scheduler, data: dict, *, patch: int, folder: Path, minutes: float) -> dict:
    """Train for so many minutes, from the state in the folder if there is one; leaves averaged weights in `unet`."""
    import torch
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=WARMUP)
    parts = {"unet": unet, "optimizer": optimizer, "rate": rate, "ema": (ema := EMAModel(unet.parameters()))}
    file, step, seconds, n = folder / "state.pt", 0, 0.0, len(data["images"])
    if file.exists():
        saved = torch.load(file)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step, seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["random"])

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "seconds": seconds, "random": torch.get_rng_state()}
        torch.save(state, beside := file.with_suffix(".part"))
        beside.replace(file)

    while seconds < minutes * 60:
        began = time.perf_counter()
        passes = (divmod(place, n) for place in range(step * BATCH, (step + 1) * BATCH))
        rows = torch.tensor([np.random.default_rng(number).permutation(n)[place] for number, place in passes])
        image = data["images"][rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        image = torch.nn.functional.pixel_unshuffle(image, patch)
        captions = torch.where(torch.rand(BATCH) < EMPTY, 0, 1 + rows)
        noise, t = torch.randn_like(image), torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        text, mask = data["text_emb"][captions], data["text_mask"][captions]
        noisy = scheduler.add_noise(image, noise, t)
        predicted = unet(noisy, t, encoder_hidden_states=text, encoder_attention_mask=mask).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        step, seconds = step + 1, seconds + time.perf_counter() - began
        if step % SAID == 0:
            print(f"step {step}, {seconds / 60:.1f} minutes, {step * BATCH:,} pictures, loss {loss:.4f}", flush=True)
        if step % SAVED == 0:
            save()
    save()
    ema.copy_to(unet.parameters())
    return {"images": step * BATCH, "step": step, "seconds": seconds, "ema": "EMAModel"}


def draw(unet, scheduler, data: dict, *, patch: int, c: float, seed: int) -> np.ndarray:
    """A guided picture of each caption, each from a seed of its own."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    n, size = len(data["captions"]), (unet.config.in_channels, *unet.config.sample_size)
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, thresholding=True)
    images = []
    for first in range(0, n, TOGETHER):
        seeds = range(first, min(first + TOGETHER, n))
        rows = [len(data["text_emb"]) - n + number for number in seeds]
        generators = [torch.Generator().manual_seed(seed + number) for number in seeds]
        sample = torch.stack([torch.randn(size, generator=generator) for generator in generators])
        text, mask = (data[part][[0] * len(rows) + rows] for part in ("text_emb", "text_mask"))
        solver.set_timesteps(STEPS)
        for t in solver.timesteps:
            doubled = torch.cat([sample, sample])
            predicted = unet(doubled, t, encoder_hidden_states=text, encoder_attention_mask=mask).sample
            empty, captioned = predicted.chunk(2)
            sample = solver.step(empty + c * (captioned - empty), t, sample).prev_sample
        pixels = torch.nn.functional.pixel_shuffle(sample.clamp(-1, 1), patch)
        images.append(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        print(f"{seeds.stop} of {n} pictures drawn", flush=True)
    return np.concatenate(images)


def worker(folder: str, config: dict, flops: int, patch: int, minutes: float, c: float, seed: int) -> None:
    """Train and draw, as the setup on stdin says."""
    try:
        import torch
        from diffusers import DDPMScheduler
    except ImportError as error:
        sys.exit(f"{sys.executable}: {error}\n{INSTALL}")
    torch.set_num_threads(cores())
    torch.manual_seed(seed)
    folder, plan, scheduler = Path(folder), planned(config, patch), DDPMScheduler()
    widths = matched_widths(plan, flops)
    share = unet_flops(plan, widths) / flops
    if abs(share - 1) > TOLERANCE:
        sys.exit(f"--patch {patch}: no width comes within {TOLERANCE:.0%} of our FLOPs, the nearest {share:.2f} times")
    with np.load(folder / "data.npz") as saved:
        data = {name: torch.from_numpy(saved[name]) for name in ("images", "text_emb", "text_mask")}
        data["captions"] = saved["captions"].tolist()
    unet = build_unet(plan, widths)
    weights = sum(weight.numel() for weight in unet.parameters())
    print(f"channels {widths}, {weights / 1e6:.1f} M weights, {share:.3f} times our FLOPs", flush=True)
    about = train(unet, scheduler, data, patch=patch, folder=folder, minutes=minutes)
    about["config"] = {"prediction": "eps", "channels": widths, "patch": patch, "batch": BATCH, "weights": weights}
    about["sampling"] = {"c": c, "sampler": "DPMSolverMultistepScheduler", "steps": STEPS, "seed": seed}
    with torch.inference_mode():
        images = draw(unet.eval(), scheduler, data, patch=patch, c=c, seed=seed)
    np.savez(folder / "pictures.npz", images=images, captions=data["captions"], about=json.dumps(about))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from params import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="cpu", choices=PRESETS, help="whose pictures and FLOPs (cpu)")
    parser.add_argument("--python", metavar="PATH", required=True, help="Python of the peer's virtual environment")
    parser.add_argument("--patch", type=int, default=1, choices=(1, 2, 4, 8), help="side of folded pixels (1: none)")
    parser.add_argument("--minutes", type=float, default=60, help="of training steps (60)")
    parser.add_argument("--samples", type=int, default=500, help="pictures to draw, as of evaluate.py (500)")
    parser.add_argument("--c", type=float, default=3, help="guidance (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the first picture (0)")
    parser.add_argument("--output", type=Path, default=Path("peer_cpu"), help="folder of state and pictures (peer_cpu)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    options = parser.parse_args()
    folder, pictures = options.output, options.output / "pictures.npz"
    if shutil.which(options.python) is None:
        sys.exit(f"--python {options.python}: there is no such program\n{INSTALL}")
    if (folder / "state.pt").exists() and not options.resume:
        sys.exit(f"{folder} holds a run already: go on with --resume, or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    setup = {name: getattr(options, name) for name in ("patch", "minutes", "c", "seed")} | {"folder": str(folder)}
    setup |= {"flops": prepare(folder, options.preset, options.samples), "config": PRESETS[options.preset].to_json()}
    command = [options.python, __file__, "--worker"]
    if code := subprocess.run(command, input=json.dumps(setup), text=True).returncode:
        sys.exit(code)
    score = f"--pictures {pictures} --samples {options.samples} --report {folder}"
    print(f"{pictures} written. Next: python evaluate.py --checkpoint models_{options.preset}/final {score}")


if __name__ == "__main__":
    worker(**json.load(sys.stdin)) if "--worker" in sys.argv[1:] else main()
