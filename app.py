"""A page to draw on, in the browser: `python app.py`, then open http://127.0.0.1:7860.

    pip install -r requirements-app.txt                           what the page needs
    python app.py --checkpoint models_cpu/final --port 8000       another model, another port
    python app.py --host 0.0.0.0                                  for everybody who reaches this machine

One request is drawn at a time; the others wait and see their place. Pictures are sent inside the page, and saving one
gives the file that `generate_image` writes. Only uploads lie on the disk, in a folder of their own, for an hour at
most. The page asks no other machine for anything.
"""

import ipaddress
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH=1 Python does not

import files

if TYPE_CHECKING:
    from pipeline import DiffusionPipeline


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None  # of train.py, export.py or the hub (USER/NAME); models_vA0/final, else pretrained
    encoder: str | None = None  # where the text encoder is, if no longer where the checkpoint was trained
    host: str = "127.0.0.1"  # address to serve on: this machine only, or 0.0.0.0 for all that reach it
    port: int = 7860  # port to serve on


def stay_here(host: str) -> None:
    """Refuse, from now on, whatever would ask another machine, such as for the address that an upload names."""
    asks = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}

    def hook(event: str, arguments: tuple) -> None:
        if event not in asks:
            return
        whom = arguments[asks[event]]
        whom = whom[0] if isinstance(whom, tuple) else whom
        if whom in (None, "", "localhost", host):
            return
        try:
            here = ipaddress.ip_address(whom).is_loopback
        except ValueError:
            here = False
        if not here:
            raise PermissionError(f"{whom} is another machine; this page asks none")

    sys.modules["uvloop"] = None  # not to be imported: Python's own event loop is the one that tells the hook
    sys.addaudithook(hook)


def warmed(pipeline: "DiffusionPipeline") -> tuple[float, float]:
    """Seconds of a first picture, for which the network is compiled, and of a second one."""
    seconds, _ = [], pipeline.hash
    for _ in range(2):
        began = time.perf_counter()
        pipeline.generate_arrays(["smile"])
        seconds.append(time.perf_counter() - began)
    return tuple(seconds)


def main() -> None:
    files.secure_streams()
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    try:
        serve(files.expanded(options))
    except (ValueError, OSError) as error:
        sys.exit(f"app.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nended")


def serve(options: Options) -> None:
    """Draw for whoever asks, until the program is ended."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before gradio is imported
    try:
        from sharing import page  # only here, as all that is slow, so that --help is instant
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install -r requirements-app.txt") from None
    from pipeline import DiffusionPipeline
    from sharing.portable import default_checkpoint

    checkpoint = options.checkpoint or default_checkpoint()
    pipeline = DiffusionPipeline(checkpoint, options.encoder)
    first, then = warmed(pipeline)
    name, encoder = Path(*checkpoint.parts[-2:]), Path(pipeline.encoder.identity["name"]).name
    size = f"{pipeline.config.W} × {pipeline.config.H} pixels"
    about = f"The model {name} draws {size} in about {then:.1f} s. {encoder} reads your words."
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page.build(pipeline, about)
        stay_here(options.host)
        address = page.launch(blocks, options.host, options.port)
        print(f"{name} draws at {address}: the first picture took {first:.1f} s, the next {then:.1f} s. Ctrl+C ends it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        blocks.block_thread()


if __name__ == "__main__":
    main()
