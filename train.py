"""Train on captioned pictures: `python train.py [quick|cpu|emoji64] [--FIELD VALUE …]`.

Without a preset, the one that fits this machine is taken; every field of it can be overridden (`--help` lists them).
Missing pictures are prepared first. Checkpoints go to `models_vA0/epoch{N}` and `models_vA0/final`, the loss to
`models_vA0/metrics.jsonl`, sample grids to `validation_images/`. Ctrl-C saves and stops. With `--resume` the same
command starts a run, goes on with one that was stopped or killed, and ends it with the same weights as if nothing had
happened.
"""

import dataclasses
import difflib
import itertools
import json
import shlex
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

import tracking
from files import writable
from params import PRESETS, Params

MAY_CHANGE = {  # between a run and its resumption
    "data", "max_bad", "epochs", "minutes", "learning_rate", "clip", "weight_decay", "accumulate", "compute",
    "log_every", "sample_every", "heldout", "save_every", "keep",
}  # fmt: skip
SAMPLES = 12  # pictures in a grid
HOPELESS = 3  # steps in a row whose loss or gradient is not finite
TOGETHER = 10  # steps that an accelerator takes as one program, so that it need not wait for the host between them


@dataclass(frozen=True)
class Options:
    config: Annotated[Params, tyro.conf.arg(name="")]
    output: Path = Path("models_vA0")  # folder of the checkpoints and metrics.jsonl
    resume: bool = False  # go on from the newest whole checkpoint in the output folder, if there is one
    dry_run: bool = False  # print configuration, parameters, FLOPs and memory of a step, then stop
    self_test: bool = False  # learn 8 pictures by heart in two minutes, say whether text steers them, then stop
    distributed: bool = False  # this process is one of several, found by SLURM or named by JAX_PROCESS_ID (see README)
    track: tuple[tracking.Name, ...] = ()  # where to watch the run, besides metrics.jsonl


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
    only = [word for word in ("--distributed", "--self_test", "--dry_run") if word in args]
    if len(only) > 1:
        sys.exit(f"{' and '.join(only)} ask for different things: a run of many processes, a test or a forecast by one")
    if not named and not {"-h", "--help"} & set(args):
        import parallel

        parallel.setup()
        preset = "emoji64" if parallel.on_accelerator() else "quick"
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
    options = parse(sys.argv[1:])
    import checkpoint
    import dataset
    import parallel
    import text_encoder
    from sources import packages

    parallel.setup()
    try:
        if options.distributed:
            parallel.join()
        do = describe if options.dry_run else examine if options.self_test else run
        ended = do(options)
        parallel.leave()
    except (
        dataset.DatasetError,
        packages.PackageError,
        text_encoder.EncoderError,
        checkpoint.CheckpointError,
        parallel.ParallelError,
        tracking.TrackerError,
        OSError,
    ) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before training began; the same command starts again and keeps what is prepared")
    sys.exit(ended if parallel.is_main() else bool(ended))


def prepared(config: Params) -> tuple:
    """The configuration with its names resolved for good, its pictures, its text encoder; fetched where need be."""
    import dataset
    import text_encoder
    from sources import emojis

    root = Path(config.data)
    if config.data == Params.data:
        config = dataclasses.replace(config, vendor=emojis.ensure(root, config.vendor))
    config = dataclasses.replace(config, encoder=text_encoder.resolved(config.encoder))  # drawing may start elsewhere
    pictures = dataset.from_config(config, decode=not config.stream)
    for fault in pictures.faults[:5]:
        print(f"skipped: {fault.where}: {fault.what}")
    if len(pictures.faults) > 5:
        print(f"skipped: {len(pictures.faults) - 5} more; see python prepare_dataset.py --check --data {root}")
    encoder = text_encoder.TextEncoder(config.encoder)
    if encoder.max_length < config.TEXT_LEN:
        sys.exit(
            f"train.py: --TEXT_LEN = {config.TEXT_LEN}: {config.encoder} takes at most {encoder.max_length} tokens"
        )
    return config, pictures, encoder


def run(options: Options) -> str | None:
    """Train; returns why it ended, if that was early."""
    # Data: pictures, captions and their embeddings, on the device.
    import jax
    from tqdm import tqdm

    import checkpoint
    import dataloader
    import dataset
    import parallel
    import schedule
    import stream
    import training
    from evaluation import heldout
    from images import captioned_grid, save_png
    from pipeline import DiffusionPipeline

    output, config, first = options.output, options.config, parallel.is_main()
    tracking.require(options.track)
    parallel.check_batch_size(config)
    if config.compute == "bfloat16" and not parallel.on_accelerator():
        print("--compute bfloat16: slower than float32 on most CPUs", file=sys.stderr)
    parallel.after_first("prepared")
    newest = checkpoint.newest(output)
    if newest is not None and not options.resume:
        sys.exit(f"{output} already holds {newest.name}: go on with --resume, or train elsewhere with --output FOLDER")
    named = [part for part in output.parts if part not in (output.anchor, ".", "..")]
    grids = Path("validation_images", "-".join(named) or "run")
    writable(output)
    writable(grids)
    config, pictures, encoder = prepared(config)
    shown, unseen = (dataset.side(pictures, heldout=side) for side in (False, True))
    captions, concepts = shown.names, len(set(shown.indexes))
    source = (stream if config.stream else dataloader).load(shown, encoder, config)
    parallel.done_first("prepared")
    print(f"{len(captions)} pictures of {config.vendor} to train on, {len(unseen.names)} held out")

    # State: network, optimizer, averaged weights; new, or as the newest checkpoint left them.
    init_key, keys = training.streams(config.seed)
    graphdef = training.structure(config, encoder.dim)
    state = training.init(config, encoder.dim, init_key)
    about = {
        "version": training.VERSION,
        "config": config.to_json(),
        "encoder": encoder.identity,
        "schedule": {"name": schedule.NAME, "T": config.T},
        "dataset": {"fingerprint": pictures.fingerprint, "pictures": len(captions)},
        "prompts": example_prompts(captions, unseen.names),
        "seconds": 0.0,
    }
    if newest is not None:
        earlier = checkpoint.about(newest)
        same_run(newest, earlier, about)
        about["seconds"] = earlier["seconds"]
        saved = parallel.replicate(checkpoint.restore(newest, training.resumable(state)))
        state = training.resumed(state, saved)
        print(f"resumed from {newest}, step {int(state.step)}")
    step = int(state.step)
    parallel.check_equal(**{part: about[part] for part in ("config", "encoder", "dataset")}, step=step)
    saver = checkpoint.Saver(config.keep, say=tqdm.write)

    def end(name: str) -> Path:
        path = save(name, now=True)
        if first:
            log.close()
        return path

    def save(name: str, *, now: bool = False) -> Path:
        if first:
            then = {**about, "epoch": step * config.B / concepts, "step": step, "seconds": log.seconds}
            saver.save(output / name, training.resumable(state), then, now=now)
        return output / name

    def sample(name: str) -> Path:
        """A grid of the same prompts from the same seeds every time, drawn by the averaged weights."""
        path = grids / f"{name}.png"
        if first:
            prompts, seeds = about["prompts"], range(len(about["prompts"]))
            pipeline = DiffusionPipeline.from_weights(config, encoder, graphdef, parallel.unreplicate(state.ema.short))
            images = pipeline.generate_arrays(prompts, seeds=seeds)
            save_png(captioned_grid(images, prompts, columns=6, cell=96), path)
            log.picture(step, "samples", path)
        return path

    # Training.
    if config.stream:
        read = stream.batches(source, keys.order, step, config, share=parallel.local_rows(config.B))
        batches = map(parallel.global_batch, read)
    else:
        batches = itertools.repeat(parallel.replicate(source))  # all of it, for the step to choose from
    keys, batch = parallel.replicate(keys), next(batches)
    steps = last(config, concepts)
    train_step = training.build_train_step(config, graphdef, steps)
    few = config.stream or config.log_every < TOGETHER
    most = TOGETHER if parallel.on_accelerator() and not few else 1
    plan = list(walk(step, most, config, concepts))
    if first and plan:
        print("compiling the training step; the next run reads it from .cache/xla", flush=True)
    programs = {n: training.several(train_step, n).lower(state, batch, keys).compile() for n in set(plan)}
    learning_rate = training.learning_rate(config, steps)
    rate_before = jax.jit(lambda step: learning_rate(step - 1))  # of the step that led here, on the device
    heldout_loss = heldout.build_watch(config, graphdef, unseen, encoder)
    signals = stop_signal()
    in_flight = deque()  # no more programs are queued than keep the device busy: the clock is honest, Ctrl-C quick
    if first:
        trackers = tracking.trackers(options.track, output, step=step, config=config.to_json())
        log = tracking.MetricsLog(
            output / "metrics.jsonl", step, about["seconds"], pictures=concepts, B=config.B, trackers=trackers
        )
    seen = {"total": steps * config.B, "initial": step * config.B, "unit": "img"}

    def enough(*, meet: bool) -> tuple[bool, ...]:
        """Whether to stop: on a signal to any process, when the time of the first is over."""
        return parallel.any_process(bool(signals), first and 0 < config.minutes * 60 <= log.seconds, meet=meet)

    stop, out_of_time = enough(meet=True)
    fault = ""
    with saver, tqdm(**seen, smoothing=0.05, disable=None if first else True) as bar:
        for n in plan:
            if stop or out_of_time or fault:
                break
            state, loss = programs[n](state, batch, keys)
            step += n
            try:
                batch = next(batches) if step < steps else batch
            except dataset.DatasetError:
                end("stopped")
                raise
            in_flight.append(loss)
            if len(in_flight) > (2 if most == 1 else 1):
                in_flight.popleft().block_until_ready()
            bar.update(n * config.B)

            epoch, sampling, saving, reading = due(step, config, concepts)
            stop, out_of_time = enough(meet=reading)
            if reading or stop or out_of_time:
                records, rate = jax.device_get((state.records, rate_before(state.step)))
                state = state._replace(records=parallel.replicate(training.no_records(int(records.streak))))
                fault = diagnosis(config, state, records, step) if records.longest >= HOPELESS else ""
                if first:
                    with log.paused():
                        more = heldout_loss(parallel.unreplicate(state.ema.short)) if sampling else {}
                    line = log.write(step, records, {"learning_rate": rate, **more})
                    shown = {"loss": line["loss"], "skipped": line["skipped"]}
                    bar.set_postfix({name: value for name, value in shown.items() if value})
            if first and saving and step < steps and not fault:
                with log.paused():
                    save(f"epoch{epoch}")
            if first and sampling and step < steps and not fault:
                with log.paused():
                    bar.write(f"epoch {epoch}: loss {line['loss']}, {sample(f'epoch{epoch}')}")

    if fault or (stop and step < steps):
        return f"{fault or f'stopped at step {step} of {steps}'}; {end('stopped')} written. Go on: {again()}"
    grid, final = sample("final"), end("final")
    print(f"{final} and {grid} written. Next: python test.py --checkpoint {final}")


def examine(options: Options) -> str | None:
    """Whether code and data can learn; returns why not."""
    from dataset import side
    from evaluation.selftest import CANDIDATES, self_test

    config = options.config
    config = dataclasses.replace(config, stream=False, MAX_INDEX=min(config.MAX_INDEX or CANDIDATES, CANDIDATES))
    config, pictures, encoder = prepared(config)
    verdict = self_test(config, side(pictures, heldout=False), encoder)
    print(verdict)
    return None if verdict.outcome == "PASS" else f"self-test: {verdict.outcome}"


def example_prompts(captions: list[str], heldout: list[str]) -> list[str]:
    """Captions for the sample grids, spread over the data: three in four trained on, the others held out."""

    def spread(names: list[str], count: int) -> list[str]:
        count = min(count, len(names))
        return [names[i * len(names) // count] for i in range(count)]

    unseen = spread(heldout, SAMPLES // 4)
    return spread(captions, SAMPLES - len(unseen)) + unseen


class Due(NamedTuple):
    """What follows a step."""

    epoch: int  # whole passes up to here
    sampling: bool  # a grid
    saving: bool  # a checkpoint
    reading: bool  # a line of metrics


def last(config: Params, concepts: int) -> int:
    """The number of a run's last step."""
    return -(-config.epochs * concepts // config.B)


def due(step: int, config: Params, concepts: int) -> Due:
    """What follows this step, whatever was before it, so that a resumed run does the same."""
    epoch, before = step * config.B // concepts, (step - 1) * config.B // concepts
    sampling, saving = (epoch // every > before // every for every in (config.sample_every, config.save_every))
    reading = step % config.log_every == 0 or sampling or saving or step == last(config, concepts)
    return Due(epoch, sampling, saving, reading)


def together(step: int, most: int, config: Params, concepts: int) -> int:
    """Steps to take from here as one program: `most` at each multiple of it, unless something is due on the way.

    As this follows from the step alone, a resumed run goes through the same programs.
    """
    on_the_way = range(step + 1, step + most)
    return 1 if step % most or any(due(number, config, concepts).reading for number in on_the_way) else most


def walk(step: int, most: int, config: Params, concepts: int) -> Iterator[int]:
    """How many steps each program takes from here to the end of the run."""
    while step < last(config, concepts):
        n = together(step, most, config, concepts)
        yield n
        step += n


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
    """Stop where the checkpoint is of another configuration, encoder or dataset, or of an earlier kind of step."""
    if saved.get("version") != now["version"]:
        sys.exit(
            f"--resume: {path} was trained by another version of this program, which took its steps differently. "
            "Finish it with that version, or train a new one with --output FOLDER; drawing from it works as before"
        )
    decays = now["config"]["decay"] != "constant"  # the learning rate falls towards the last epoch
    free = MAY_CHANGE - ({"epochs"} if decays else set())
    differ = [
        f"{field} was {saved['config'].get(field)!r}, now {value!r}"
        for field, value in json.loads(json.dumps(now["config"])).items()
        if field not in free and saved["config"].get(field) != value
    ]
    for part in ("encoder", "dataset"):
        if saved[part] != now[part]:
            differ.append(f"{part} was {saved[part]}, now {now[part]}")
    if differ:
        sys.exit(
            f"--resume: {path} is of another configuration: {'; '.join(differ)}. "
            f"Only {', '.join(sorted(free))} may change; train a new one with --output FOLDER"
        )


def diagnosis(config: Params, state, records, step: int) -> str:
    """What is known of steps that were skipped because they were not finite, and what to do about it."""
    import jax
    import numpy as np

    weights = jax.device_get(jax.tree.leaves(state.weights))
    largest = max(float(np.abs(leaf).max(initial=0)) for leaf in weights)
    where, cure = (
        "their gradient, while the loss was finite",
        "python -m pytest says whether a change broke the network",
    )
    if config.compute == "bfloat16":
        cure = "--compute float32 rounds less"
    if records.forward:
        where, cure = "their loss already", "look for captions or pictures that are broken"
    return (
        f"train.py: up to step {step}, {records.longest} steps in a row were not finite, {where}, and changed no "
        f"weight (the largest is {largest:.3g}). Lower --learning_rate or --clip; if it comes back, {cure}"
    )


def again() -> str:
    """The command that goes on with this run."""
    words = [word for word in sys.argv[1:] if word != "--resume"] + ["--resume"]
    return f"python train.py {shlex.join(words)}"


def describe(options: Options) -> None:
    """Print the configuration, and what one step of it costs."""
    import jax
    import jax.numpy as jnp

    import dataloader
    import parallel
    import training
    from text_encoder import EncoderError, TextEncoder

    config = options.config
    parallel.check_batch_size(config)
    try:
        text_dim = TextEncoder(config.encoder).dim
    except EncoderError:
        text_dim = 384
        print(f"encoder {config.encoder} is not here: counting with {text_dim} numbers per token")
    for field, value in config.to_json().items():
        print(f"{field:18} {value}")

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: training.initial(config, text_dim, key), key)
    held = config.B if config.stream else config.MAX_INDEX or 1900  # pictures

    def source() -> dataloader.Data | dataloader.Picked:
        images = jnp.zeros((held, config.H, config.W, config.CHANNELS), jnp.uint8)
        emb, mask = jnp.zeros((held, config.TEXT_LEN, text_dim)), jnp.zeros((held, config.TEXT_LEN), bool)
        picked = dataloader.Picked(images, emb, mask, emb[0], mask[0])
        return picked if config.stream else dataloader.Data(*picked, dataloader.one_each(held))

    data = jax.eval_shape(source)
    step = training.build_train_step(config, training.structure(config, text_dim), steps=1)
    lowered = step.lower(state, data, training.Keys(*[key] * len(training.Keys._fields)))
    memory = lowered.compile().memory_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
    print(f"{'parameters':18} {parameters / 1e6:.2f} M")
    print(f"{'FLOPs per step':18} {lowered.cost_analysis()['flops'] / 1e9:.1f} G ({config.B} pictures)")
    before = memory.argument_size_in_bytes
    print(f"{'memory per step':18} {(before + memory.temp_size_in_bytes) / 2**20:.0f} MiB ({before / 2**20:.0f} held)")


if __name__ == "__main__":
    main()
