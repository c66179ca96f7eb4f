"""How many people can draw at once? `python benchmarks/clients.py [--checkpoint FOLDER] [--clients 10] [--seconds 60]`.

Starts the page of app.py on a free port of this machine. Each client asks for a picture, with the choices that the page
offers at first, and for the next one when it has come. Prints how many were drawn, how many requests failed, and how
long one waits for a picture, as median, 95th percentile and longest; benchmarks/clients.json keeps these numbers.
"""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from files import replacing

if TYPE_CHECKING:
    from gradio_client import Client

APP = Path(__file__).resolve().parent.parent / "app.py"
QUANTILES = {"median_seconds": 0.5, "95th_percentile_seconds": 0.95, "longest_seconds": 1.0}


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = None  # of train.py or export.py; models_vA0/final, else pretrained
    clients: int = 10  # that ask at the same time; the page lets 16 wait
    seconds: float = 60  # in which requests begin
    output: Path = Path("benchmarks/clients.json")  # the numbers


def visit(client: "Client", number: int, end: float) -> list[float | str]:
    """Ask for pictures until `end`; the seconds that each took, or why there is none."""
    results = []
    while (began := time.perf_counter()) < end:
        try:
            page = client.predict(seed=1000 * number + len(results), sketch=None, api_name="/draw")
            results.append(time.perf_counter() - began if "save PNG" in page else f"no picture: {page:.200}")
        except Exception as error:  # whatever ends a request
            results.append(f"{type(error).__name__}: {error}")
            time.sleep(1)
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__, use_underscores=True)
    from gradio_client import Client

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    named = ["--checkpoint", options.checkpoint] if options.checkpoint else []
    command = [sys.executable, APP, *named, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            told = next((line for line in server.stdout if " draws at " in line), "")
            if not (found := re.search(r"http://\S+(?=:)", told)):
                sys.exit("clients.py: the page did not start; its message stands above")
            print(told.strip())
            with ThreadPoolExecutor(options.clients) as pool:
                clients = [*pool.map(lambda _: Client(found[0], verbose=False), range(options.clients))]
                end = time.perf_counter() + options.seconds
                visits = pool.map(lambda number: visit(clients[number], number, end), range(options.clients))
                results = [result for each in visits for result in each]
        finally:
            server.terminate()
    waits = sorted(result for result in results if isinstance(result, float))
    failed = [result for result in results if isinstance(result, str)]
    at = {name: waits[int(share * (len(waits) - 1))] if waits else None for name, share in QUANTILES.items()}
    numbers = {**asdict(options), "pictures": len(waits), "failed": len(failed), **at}
    with replacing(options.output) as beside:
        beside.write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    print(f"{options.clients} clients, {options.seconds:g} s: {len(waits)} pictures, {len(failed)} requests failed")
    print(", ".join(f"{name} {wait:.2f}" for name, wait in at.items() if wait is not None))
    if failed:
        sys.exit(f"clients.py: the first failure: {failed[0]}")


if __name__ == "__main__":
    main()
