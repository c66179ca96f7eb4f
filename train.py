"""Train on captioned pictures: `python train.py [quick|cpu|emoji64] [--FIELD VALUE …]`.

Without a preset, the one that fits this machine is taken; every field of it can be overridden (`--help` lists them).
Missing pictures are prepared first. Checkpoints go to `models_vA0/epoch{N}` and `models_vA0/final`, the loss to
`models_vA0/metrics.jsonl`, sample grids to `validation_images/models_vA0/`. Ctrl-C saves and stops. With `--resume` the
same command starts a run, goes on with one that was stopped or killed, and ends it with the weights that it would have
had without that (bit for bit on a CPU). With `--start_from pretrained` a new run starts with the averaged weights of
another network, whatever wrote it: train.py, export.py or, as USER/NAME, the Hugging Face hub.
"""

import dataclasses
import difflib
import os
import shlex
import signal
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files
import tracking
from params import PRESETS, Params

if TYPE_CHECKING:
    from dataloader import Memory, Stream
    from dataset import Pictures
    from run import Run
    from text_encoder import TextEncoder
    from training import TrainState

MAY_CHANGE = {  # between a run and its resumption
    "data", "epochs", "minutes", "learning_rate", "clip", "weight_decay", "accumulate", "compute",
    "log_every", "sample_every", "save_every", "keep",
}  # fmt: skip
NETWORK = {  # what the weights are and mean: a run that starts from another network has these fields of it
    "H", "W", "CHANNELS", "TEXT_LEN", "augmentation", "T", "zero_terminal_snr", "prediction", "T_dim", "T_out",
    "BASE_DIM", "DIM_MULTS", "PATCH", "REFINER", "BLOCKS", "self_attention", "cross_attention", "HEAD_DIM",
}  # fmt: skip


# Configuration.


@dataclass(frozen=True)
class Options:
    config: Annotated[Params, tyro.conf.arg(name="")]
    output: Path = Path("models_vA0")  # folder of the checkpoints and metrics.jsonl; each run has its own
    resume: bool = False  # go on from the newest whole checkpoint in the output folder, if there is one
    start_from: Path | None = None  # network whose averaged weights a new run starts with: a checkpoint, an export
    dry_run: bool = False  # print configuration, parameters, FLOPs and memory of a step, then stop
    distributed: bool = False  # this process is one of several, found by SLURM or named by JAX_PROCESS_ID
    track: tuple[tracking.Name, ...] = ()  # where to watch the run, besides metrics.jsonl


def parse(args: list[str], saved: Params | None = None) -> Options:
    """The command line as options: an optional preset, or a saved configuration, then fields that differ from it."""
    named = bool(args) and not args[0].startswith("-")
    preset = args[0] if named else "quick"
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        sys.exit(f"no preset {preset!r}{hint} (presets: {', '.join(PRESETS)})")
    if not named and "--distributed" in args:
        sys.exit("--distributed: name the preset, the same in every process: python train.py emoji64 --distributed")
    if {"--distributed", "--dry_run"} <= set(args):
        sys.exit("--distributed and --dry_run ask for different things: a run of many processes, a forecast by one")
    if {"--resume", "--dry_run"} <= set(args):
        sys.exit("--resume and --dry_run ask for different things: to go on with a run, a forecast of a new one")
    if not named and saved is None and not {"-h", "--help"} & set(args):
        import parallel

        parallel.setup()
        preset = "emoji64" if parallel.on_accelerator() else "quick"
        print(f"preset: {preset}, fit for {'an accelerator' if preset == 'emoji64' else 'a CPU'}", flush=True)
    try:
        return tyro.cli(
            Options,
            prog="train.py [quick|cpu|emoji64]",
            description=__doc__,
            default=Options(saved or PRESETS[preset]),
            args=args[named:],
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ValueError as error:  # of Params, which says which field is wrong and what is allowed
        sys.exit(f"train.py: --{error}")


def resolve(config: Params) -> Params:
    """The configuration with the folder of an encoder by its whole path; missing pictures are prepared."""
    import text_encoder
    from sources import emojis

    config = dataclasses.replace(config, data=os.path.expanduser(config.data))
    if Path(config.data) == Path(Params.data):
        config = dataclasses.replace(config, vendor=emojis.ensure(Path(config.data), config.vendor))
    return dataclasses.replace(config, encoder=text_encoder.resolved(config.encoder))


def started_config(options: Options) -> Params:
    """The configuration of a new run: where it starts from another network, with the fields of that."""
    if options.start_from is None:
        return options.config
    import pipeline

    path, _, _, theirs = pipeline.saved(options.start_from)
    named = {word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
    given, fields = vars(options.config), {name: vars(theirs)[name] for name in (*NETWORK, "encoder")}
    if differ := [name for name in sorted(named & NETWORK) if fields[name] != given[name]]:
        what = "; ".join(f"{name} is {fields[name]!r}, not {given[name]!r}" for name in differ)
        sys.exit(f"--start_from: in the network of {path}, {what}. Leave these out, or train without --start_from")
    if "encoder" in named:  # where it is now; whether it is the same, its files say
        del fields["encoder"]
    try:
        return dataclasses.replace(options.config, **fields)
    except ValueError as error:
        sys.exit(f"--start_from: the network of {path} does not go with the other fields: {error}")


def resumed_config(newest: Path) -> Params:
    """The configuration of a checkpoint with the changes of the command line, if all of them are allowed."""
    import checkpoint
    import text_encoder
    import training

    about = checkpoint.about(newest)
    if about.get("version") != training.VERSION:
        sys.exit(
            f"--resume: {newest} was trained by another version of this program, which took its steps differently. "
            "Finish it with that version, or train a new one with --output FOLDER; sampling from it works as before"
        )
    try:
        saved = Params.from_json(about["config"])
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{newest}: {error}") from error
    given = parse(sys.argv[1:], saved).config
    given = dataclasses.replace(given, encoder=text_encoder.resolved(given.encoder))
    free = MAY_CHANGE - ({"epochs"} if saved.decay != "constant" else set())  # the rate falls towards the last epoch
    changed = [field.name for field in dataclasses.fields(Params) if vars(given)[field.name] != vars(saved)[field.name]]
    if refused := [name for name in changed if name not in free]:
        differ = "; ".join(f"{name} was {vars(saved)[name]!r}, now {vars(given)[name]!r}" for name in refused)
        sys.exit(
            f"--resume: {newest} is of another configuration: {differ}. Leave these out to go on with it "
            f"(only {', '.join(sorted(free))} may change), or train a new one with --output FOLDER"
        )
    return given


# Data.


def load_data(config: Params) -> tuple["Pictures", "TextEncoder"]:
    """Pictures and text encoder of a configuration; prints what is faulty."""
    import dataset
    import text_encoder

    pictures = dataset.from_config(config, decode=not config.stream)
    for fault in pictures.faults[:5]:
        print(f"skipped: {fault.where}: {fault.what}")
    if (more := len(pictures.faults) - 5) > 0:
        print(f"skipped: {more} more; see {command('prepare_dataset.py', '--check', '--data', config.data)}")
    encoder = text_encoder.TextEncoder(config.encoder)
    if (most := encoder.max_length) < config.TEXT_LEN:
        sys.exit(f"train.py: --TEXT_LEN = {config.TEXT_LEN}: {config.encoder} takes at most {most} tokens")
    return pictures, encoder


# A run, from top to bottom.


def train(options: Options) -> str | None:
    """Train; returns why the run ended, if it ended early."""
    import dataloader
    import dataset
    import parallel
    from run import start

    # Configuration
    config, newest = configure(options)

    # Data
    with parallel.main_first("prepared"):
        config = resolve(config)
        pictures, encoder = load_data(config)
        source = dataloader.load(dataset.side(pictures, heldout=False), encoder, config)
    held = int(pictures.heldout.sum())
    print(f"{len(pictures.names) - held} pictures of {config.vendor} to train on, {held} held out")

    # State
    run, state = start(config, options.output, newest, encoder, pictures, options.track)
    if options.start_from and newest is None:
        state = run.start_from(state, options.start_from)

    # Loop
    try:
        state, stopped_by = loop(run, state, source)
    finally:
        source.close()

    # End
    path = run.save(state, "stopped" if stopped_by else "final", now=True)
    grid = None if stopped_by else run.sample(state, "final")
    if run.log:
        run.log.close()
    if stopped_by:
        return f"{stopped_by}; {path} written. Go on: {command_to_resume()}"
    written = f"{path} and {grid}" if grid else path
    print(f"{written} written. Next: {command('test.py', '--checkpoint', str(path))}")


def configure(options: Options) -> tuple[Params, Path | None]:
    """The configuration of the run, and the checkpoint that it goes on from, if there is one."""
    import checkpoint
    import parallel

    tracking.require(options.track)
    output, newest = options.output, checkpoint.newest(options.output)
    if newest is not None and not options.resume:
        sys.exit(f"{output} already holds {newest.name}: go on with --resume, or train elsewhere with --output FOLDER")
    if parallel.is_main():
        checkpoint.rehearse(output)
    config = started_config(options) if newest is None else resumed_config(newest)
    parallel.check_batch_size(config)
    if config.compute == "bfloat16" and not parallel.on_accelerator():
        print("--compute bfloat16: slower than float32 on most CPUs", file=sys.stderr)
    return config, newest


def catch_signals() -> list[int]:
    """A list that fills on the first Ctrl-C, SIGTERM or SIGHUP; a second one stops at once, without saving.

    SIGHUP, for a terminal that is closed, may come twice, so a second one says nothing; nohup has it ignored.
    """
    received = []

    def handle(number: int, _frame) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        print("\nstopping soon; once more to stop without saving", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
    return received


def loop(run: "Run", state: "TrainState", source: "Memory | Stream") -> tuple["TrainState", str]:
    """Take steps to the end of the run; returns what stopped it before that, or ""."""
    from tqdm import tqdm

    import checkpoint
    import ema
    import parallel
    import training

    config, log, first, steps = run.config, run.log, run.step, run.last_step
    train_step, programs = training.build_train_step(config, steps), {}
    update_averages = ema.build_update(config)
    steps_per_call = ema.EVERY if parallel.on_accelerator() and not config.stream else 1
    seen = {"total": steps * config.B, "initial": run.step * config.B, "unit": "img"}
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60, "ncols": 100}  # of a bar in a log file
    signals, in_flight, stopped_by, fault = catch_signals(), deque(), "", ""

    with checkpoint.Saver(config.keep, tqdm.write) as run.saver, tqdm(**seen, **pace, disable=not log) as bar:
        try:
            while run.step < steps and not stopped_by:
                n = run.steps_in_call(steps_per_call)
                data, rows = source.at(run.step, n)
                if n not in programs:  # each is compiled when it is first needed
                    programs[n] = run.compile(train_step, state, data, rows, run.key)
                state, loss = programs[n](state, data, rows, run.key)
                run.step += n
                in_flight.append(loss)  # so few programs wait on the device that the clock is right and Ctrl-C quick
                if len(in_flight) > 2:
                    in_flight.popleft().block_until_ready()
                bar.update(n * config.B)

                due = run.due(run.step)
                if run.step % ema.EVERY and not due.logging:
                    continue
                state = state._replace(ema=update_averages(state.ema, state.weights, state.step))
                late = bool(log) and 0 < config.minutes * 60 <= log.seconds
                stop, out_of_time = parallel.any_process(bool(signals), late, meet=due.logging)
                if due.logging or stop or out_of_time:
                    state, fault = run.report(state, loss, bar, heldout=due.sampling)
                if due.saving and run.step < steps and not fault:
                    run.save(state, f"epoch{due.epoch}")
                if due.sampling and run.step < steps and not fault and (grid := run.sample(state, f"epoch{due.epoch}")):
                    bar.write(f"epoch {due.epoch}: {grid}")
                stopped_by = fault or (f"stopped at step {run.step} of {steps}" if stop and run.step < steps else "")
                if out_of_time:
                    bar.write(f"{config.minutes:g} minutes of training are over (--minutes)")
                    break
        except BaseException:  # whatever it is, what was learned is saved first
            if run.step > first:
                run.rescue(state, update_averages)
            raise
    return state, stopped_by


def command_to_resume() -> str:
    return command("train.py", *(word for word in sys.argv[1:] if word != "--resume"), "--resume")


def command(script: str, *words: str) -> str:
    """A command line to paste into the shell that this script was started from."""
    return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *words])


def main() -> None:
    files.secure_streams()
    files.keep_memory()
    options = files.expanded(parse(sys.argv[1:]))
    import checkpoint
    import dataset
    import parallel
    import text_encoder
    from sources import packages

    parallel.setup()
    refused = (
        dataset.DatasetError, packages.PackageError, text_encoder.EncoderError, checkpoint.CheckpointError,
        parallel.ParallelError, tracking.TrackerError, OSError,
    )  # fmt: skip
    try:
        if options.distributed:
            parallel.join()
        if options.dry_run:
            from evaluation.forecast import forecast

            ended = forecast(started_config(options))
        else:
            with files.locked(options.output) if parallel.is_main() else nullcontext():
                ended = train(options)
        parallel.leave()
    except refused as error:
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        if not parallel.lost_another(error):
            raise
        sys.exit("train.py: another process has ended, so this one does too; start all again with --resume")
    except KeyboardInterrupt:
        sys.exit("interrupted before training began; the same command starts again and keeps what is prepared")
    sys.exit(ended if parallel.is_main() else bool(ended))


if __name__ == "__main__":
    main()
