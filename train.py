"""Train on captioned pictures: `python train.py [quick|cpu|emoji64] [--FIELD VALUE …]`.

Without a preset, the one that fits this machine is taken; every field of it can be overridden (`--help` lists them).
Missing pictures are prepared first. Checkpoints go to `models_vA0/epoch{N}` and `models_vA0/final`, the loss to
`models_vA0/metrics.jsonl`, sample grids to `validation_images/`. Ctrl-C saves and stops; `--resume` goes on.
"""

import dataclasses
import difflib
import json
import shlex
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import device
from files import writable
from params import PRESETS, Params

MAY_CHANGE = {  # between a run and its resumption
    "data", "max_bad", "epochs", "minutes", "learning_rate", "clip", "weight_decay", "log_every", "sample_every",
    "save_every",
}  # fmt: skip
SAMPLES = 12  # pictures in a grid


@dataclass(frozen=True)
class Options:
    config: Annotated[Params, tyro.conf.arg(name="")]
    output: Path = Path("models_vA0")  # folder of the checkpoints and metrics.jsonl
    resume: bool = False  # go on from the newest checkpoint in the output folder
    dry_run: bool = False  # print configuration, parameters, FLOPs and memory of a step, then stop
    distributed: bool = False  # this process is one of several, found by SLURM or named by JAX_PROCESS_ID (see README)


def parse(args: list[str]) -> Options:
    """The command line as options: an optional preset, then fields that differ from it."""
    named = bool(args) and not args[0].startswith("-")
    preset = args[0] if named else None
    if named and preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1)
        sys.exit(
            f"no preset {preset!r}{f'; did you mean {close[0]!r}?' if close else ''} (presets: {', '.join(PRESETS)})"
        )
    if not named and "--distributed" in args:
        sys.exit("--distributed: name the preset, the same in every process: python train.py emoji64 --distributed")
    if not named and not {"-h", "--help"} & set(args):
        preset = "emoji64" if device.on_accelerator() else "quick"
        print(f"preset: {preset}, fit for {'an accelerator' if preset == 'emoji64' else 'a CPU'}", flush=True)
    try:
        return tyro.cli(
            Options,
            prog="train.py [quick|cpu|emoji64]",
            description=__doc__,
            default=Options(PRESETS[preset or "quick"]),
            args=args[named:],
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ValueError as error:  # of Params, which says which field is wrong and what is allowed
        sys.exit(f"train.py: --{error}")


def main() -> None:
    device.reserve_memory()
    options = parse(sys.argv[1:])
    device.keep_compiled()
    import checkpoint
    import dataset
    import packages
    import parallel
    import text_encoder

    try:
        if options.distributed:
            parallel.join()
        ended = describe(options.config) if options.dry_run else run(options)
        parallel.leave()
    except (
        dataset.DatasetError,
        packages.PackageError,
        text_encoder.EncoderError,
        checkpoint.CheckpointError,
        parallel.ParallelError,
        OSError,
    ) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before training began; the same command starts again and keeps what is prepared")
    sys.exit(ended if parallel.first() else bool(ended))


def run(options: Options) -> str | None:
    """Train; returns why it ended, if that was early."""
    # Data: pictures, captions and their embeddings, on the device.
    import jax
    from tqdm import tqdm

    import checkpoint
    import dataloader
    import dataset
    import emoji_sources
    import parallel
    import schedule
    import text_encoder
    import training
    from grids import captioned_grid, save_png
    from pipeline import DiffusionPipeline
    from tracking import MetricsLog

    output, config, first = options.output, options.config, parallel.first()
    parallel.check_divides(config.B)
    parallel.after_first("prepared")
    newest = checkpoint.newest(output)
    if newest is not None and not options.resume:
        sys.exit(f"{output} already holds {newest.name}: go on with --resume, or train elsewhere with --output FOLDER")
    if newest is None and options.resume:
        sys.exit(f"--resume: {output} holds no checkpoint to go on from; start without it")
    named = [part for part in output.parts if part not in (output.anchor, ".", "..")]
    grids = Path("validation_images", "-".join(named) or "run")
    writable(output)
    writable(grids)

    root = Path(config.data)
    if config.data == Params.data:
        config = dataclasses.replace(config, vendor=emoji_sources.ensure(root, config.vendor))
    config = dataclasses.replace(config, encoder=text_encoder.resolved(config.encoder))  # drawing may start elsewhere
    pictures = dataset.of(config)
    for fault in pictures.faults[:5]:
        print(f"skipped: {fault.where}: {fault.what}")
    if len(pictures.faults) > 5:
        print(f"skipped: {len(pictures.faults) - 5} more; see python prepare_dataset.py --check --data {root}")
    encoder = text_encoder.TextEncoder(config.encoder)
    if encoder.max_length < config.TEXT_LEN:
        sys.exit(
            f"train.py: --TEXT_LEN = {config.TEXT_LEN}: {config.encoder} takes at most {encoder.max_length} tokens"
        )
    rows = list(zip(pictures.names, pictures.heldout, strict=True))
    captions = [name for name, heldout in rows if not heldout]
    heldout_captions = [name for name, heldout in rows if heldout]
    data = dataloader.load(pictures.images[~pictures.heldout], captions, encoder, config.TEXT_LEN)
    parallel.done_first("prepared")
    print(f"{len(captions)} pictures of {config.vendor} to train on, {len(heldout_captions)} held out")

    # State: network, optimizer, averaged weights; new, or as the newest checkpoint left them.
    init_key, *streams = jax.random.split(jax.random.key(config.seed), 4)
    keys = training.Keys(*streams)
    graphdef = training.structure(config, encoder.dim)
    state = training.init(config, encoder.dim, init_key)
    about = {
        "config": config.to_json(),
        "encoder": encoder.identity,
        "schedule": {"name": schedule.NAME, "T": config.T},
        "dataset": {"fingerprint": pictures.fingerprint, "pictures": len(captions)},
        "prompts": example_prompts(captions, heldout_captions),
        "seconds": 0.0,
    }
    if newest is not None:
        earlier = checkpoint.about(newest)
        same_run(newest, earlier, about)
        about["seconds"] = earlier["seconds"]
        state = training.resumed(state, checkpoint.restore(newest, training.resumable(state)))
        print(f"resumed from {newest}, step {int(state.step)}")
    step = int(state.step)
    parallel.check_alike(**{part: about[part] for part in ("config", "encoder", "dataset")}, step=step)
    state, data, keys = parallel.replicated((state, data, keys))

    def save(name: str) -> Path:
        if not first:
            return output / name
        now = {**about, "epoch": step * config.B / len(captions), "step": step, "seconds": log.seconds}
        checkpoint.save(output / name, training.resumable(state), about=now)
        return output / name

    def sample(name: str) -> Path:
        """A grid of the same prompts from the same seeds every time, drawn by the averaged weights."""
        path = grids / f"{name}.png"
        if not first:
            return path
        prompts, seeds = about["prompts"], range(len(about["prompts"]))
        pipeline = DiffusionPipeline.of(config, encoder, graphdef, parallel.local(state.ema.short))
        images = pipeline.generate_arrays(prompts, seeds=seeds)
        save_png(captioned_grid(images, prompts, columns=6, cell=96), path)
        return path

    # Training.
    train_step = training.build_train_step(config, graphdef).lower(state, data, keys).compile()
    steps = -(-config.epochs * len(captions) // config.B)
    signals = stop_signal()
    in_flight = deque()  # at most two steps are queued, so that the clock is honest and Ctrl-C answers at once
    bar = tqdm(
        total=steps * config.B, initial=step * config.B, unit="img", smoothing=0.05, disable=None if first else True
    )
    if first:
        log = MetricsLog(output / "metrics.jsonl", step, about["seconds"], pictures=len(captions), B=config.B)

    def enough(*, meet: bool) -> tuple[bool, ...]:
        """Whether to stop: on a signal to any process, when the time of the first is over."""
        return parallel.agreed(bool(signals), first and 0 < config.minutes * 60 <= log.seconds, meet=meet)

    stop, out_of_time = enough(meet=True)
    while step < steps and not stop and not out_of_time:
        state, loss = train_step(state, data, keys)
        step += 1
        in_flight.append(loss)
        if len(in_flight) > 2:
            in_flight.popleft().block_until_ready()
        bar.update(config.B)

        epoch, before = step * config.B // len(captions), (step - 1) * config.B // len(captions)
        sampling = epoch // config.sample_every > before // config.sample_every
        saving = epoch // config.save_every > before // config.save_every
        reading = step % config.log_every == 0 or sampling or saving or step == steps
        stop, out_of_time = enough(meet=reading)
        if reading or stop or out_of_time:
            records = jax.device_get(state.records)
            state = state._replace(records=parallel.replicated(training.no_records()))
            if records.skipped:
                bar.close()
                save("stopped")
                return not_finite(step, records.skipped, output)
            if first:
                line = log.write(step, records)
                bar.set_postfix(loss=f"{line['loss']:.4f}")
        if first and saving and step < steps:
            with log.paused():
                save(f"epoch{epoch}")
        if first and sampling and step < steps:
            with log.paused():
                bar.write(f"epoch {epoch}: loss {line['loss']:.4f}, {sample(f'epoch{epoch}')}")
    bar.close()

    if stop and step < steps:
        return f"stopped at step {step} of {steps}; {save('stopped')} written. Go on: {again(resume=True)}"
    final, grid = save("final"), sample("final")
    print(f"{final} and {grid} written. Next: python test.py --checkpoint {final}")


def example_prompts(captions: list[str], heldout: list[str]) -> list[str]:
    """Captions for the sample grids, spread over the data: three in four trained on, the others held out."""

    def spread(names: list[str], count: int) -> list[str]:
        count = min(count, len(names))
        return [names[i * len(names) // count] for i in range(count)]

    unseen = spread(heldout, SAMPLES // 4)
    return spread(captions, SAMPLES - len(unseen)) + unseen


def stop_signal() -> list[int]:
    """A list that fills on the first Ctrl-C or SIGTERM; a second one stops at once, without saving."""
    received = []

    def handle(number: int, _frame) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping soon; once more to stop without saving", file=sys.stderr)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return received


def same_run(path: Path, saved: dict, now: dict) -> None:
    """Stop where the checkpoint is of another configuration, encoder or dataset."""
    differ = [
        f"{field} was {saved['config'].get(field)!r}, now {value!r}"
        for field, value in json.loads(json.dumps(now["config"])).items()
        if field not in MAY_CHANGE and saved["config"].get(field) != value
    ]
    for part in ("encoder", "dataset"):
        if saved[part] != now[part]:
            differ.append(f"{part} was {saved[part]}, now {now[part]}")
    if differ:
        sys.exit(
            f"--resume: {path} is of another configuration: {'; '.join(differ)}. "
            f"Only {', '.join(sorted(MAY_CHANGE))} may change; train a new one with --output FOLDER"
        )


def not_finite(step: int, skipped: int, output: Path) -> str:
    return (
        f"the loss or gradient was not finite in {skipped} of the last steps before {step}; {output / 'stopped'} holds "
        f"the last good state. Go on from it with a smaller --learning_rate or --clip: {again(resume=True)}"
    )


def again(*, resume: bool) -> str:
    words = [word for word in sys.argv[1:] if word != "--resume"] + ["--resume"] * resume
    return f"python train.py {shlex.join(words)}"


def describe(config: Params) -> None:
    """Print the configuration, and what one step of it costs."""
    import jax
    import jax.numpy as jnp

    import dataloader
    import parallel
    import training
    from text_encoder import EncoderError, TextEncoder

    parallel.check_divides(config.B)
    try:
        text_dim = TextEncoder(config.encoder).dim
    except EncoderError:
        text_dim = 384
        print(f"encoder {config.encoder} is not here: counting with {text_dim} numbers per token")
    for field, value in config.to_json().items():
        print(f"{field:18} {value}")

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: training.initial(config, text_dim, key), key)
    n = config.MAX_INDEX or 1900
    data = jax.eval_shape(
        lambda: dataloader.Data(
            jnp.zeros((n, config.H, config.W, config.CHANNELS), jnp.uint8),
            jnp.zeros((n, config.TEXT_LEN, text_dim)),
            jnp.zeros((n, config.TEXT_LEN), bool),
            jnp.zeros((config.TEXT_LEN, text_dim)),
            jnp.zeros(config.TEXT_LEN, bool),
        )
    )
    step = training.build_train_step(config, training.structure(config, text_dim))
    lowered = step.lower(state, data, training.Keys(key, key, key))
    memory = lowered.compile().memory_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
    print(f"{'parameters':18} {parameters / 1e6:.2f} M")
    print(f"{'FLOPs per step':18} {lowered.cost_analysis()['flops'] / 1e9:.1f} G ({config.B} pictures)")
    held = memory.argument_size_in_bytes
    print(f"{'memory per step':18} {(held + memory.temp_size_in_bytes) / 2**20:.0f} MiB ({held / 2**20:.0f} held)")


if __name__ == "__main__":
    main()
