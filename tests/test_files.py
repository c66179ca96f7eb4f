"""Streams, locks and files: what goes wrong around a run is said, and does not end it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import files

ROOT = Path(files.__file__).parent
PRINTING = """
import files
files.secure_streams()
from tqdm import tqdm
with open("kept", "w") as kept:
    assert kept.fileno() > 2
    for i in tqdm(range(3000)):
        print("a line … 😀 \\udcff", i, flush=True)
        print("and another … 😀 \\udcff", i, file=__import__("sys").stderr)
    tqdm.write("…")
    kept.write("to the end")
"""


def printing(folder, *, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close=(), **environment):
    """Runs PRINTING with these streams; gives its exit status."""

    def close_them():
        for descriptor in close:
            os.close(descriptor)

    words = [sys.executable, "-c", PRINTING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(words, cwd=folder, stdout=stdout, stderr=stderr, env=environment, preexec_fn=close_them)
    assert (folder / "kept").read_text() == "to the end"
    return done.returncode


# Streams.


@pytest.mark.parametrize("close", [(1,), (2,), (0, 1, 2)], ids=str)
def test_a_program_without_standard_streams_runs_to_its_end(tmp_path, close):
    assert printing(tmp_path, close=close) == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_and_a_full_disk_end_nothing(tmp_path, stream):
    ours, theirs = os.pipe()
    os.close(ours)
    full = [os.open("/dev/full", os.O_WRONLY)] if Path("/dev/full").exists() else []
    for to in (theirs, *full):
        assert printing(tmp_path, **{stream: to}) == 0
        os.close(to)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_letters_that_the_encoding_lacks_end_nothing(tmp_path, encoding):
    with (tmp_path / "said").open("wb") as said:
        assert printing(tmp_path, stdout=said, stderr=said, PYTHONIOENCODING=encoding) == 0
    assert "a line" in (tmp_path / "said").read_text(encoding, errors="replace")


@pytest.mark.parametrize("script", ["train", "test", "evaluate", "prepare_dataset"])
def test_help_can_be_read_in_any_encoding_and_from_anywhere(tmp_path, script):
    words = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1"}
    said = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("usage: ")
    assert said.stderr == ""
