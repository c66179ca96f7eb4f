"""Streams, locks and files: what goes wrong around a run is said, and does not end it."""

import dataclasses
import os
import runpy
import shutil
import socket
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
    """Runs PRINTING with these streams, or without; gives its exit status."""
    closed = " ".join(f"{descriptor}>&-" for descriptor in close)
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", PRINTING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(words, cwd=folder, stdout=stdout, stderr=stderr, env=environment)
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


@pytest.mark.parametrize("script", ["train", "test", "evaluate", "export", "prepare_dataset", "app"])
def test_help_can_be_read_in_any_encoding_and_from_anywhere(tmp_path, script):
    words = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1"}
    said = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("usage: ")
    assert said.stderr == ""


# Locks.

HOLDING = """
import sys, time
from pathlib import Path
import files
with files.locked(Path("run")):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    with files.locked(folder):
        pass


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that holds the folder "run" until its stdin is closed."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDING], env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_is_held_by_one_process_until_that_ends(holder, capsys):
    message = f"run is in use by process {holder.pid} of {socket.gethostname()}.*choose another folder.*run/.lock"
    for _ in range(2):
        with pytest.raises(OSError, match=message):
            hold(Path("run"))
    holder.stdin.close()
    holder.wait()
    assert os.listdir("run") == []
    with files.locked(Path("run")):
        assert Path("run/.lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert os.listdir("run") == []
    assert capsys.readouterr().out == ""


def test_what_a_killed_process_held_is_taken_over_and_said(holder, capsys):
    holder.kill()
    holder.wait()
    with files.locked(Path("run")):
        assert Path("run/.lock").read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert capsys.readouterr().out == f"run/.lock: process {holder.pid} has ended without removing it; taken over\n"
    assert os.listdir("run") == []


def test_a_lock_whose_process_has_ended_is_taken_over_also_under_another_name_of_the_host(tmp_path, capsys):
    (tmp_path / ".lock").write_text("elsewhere 7\n")
    hold(tmp_path)
    assert "process 7 has ended without removing it; taken over" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_on_a_disk_without_locks_the_file_alone_counts(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    with files.locked(tmp_path), pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        hold(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_error_while_a_folder_is_held_lets_go_of_it(tmp_path):
    with pytest.raises(KeyError), files.locked(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


# Writing.


def test_an_error_names_the_file_and_what_can_be_done_without_is_said_once(tmp_path, capsys):
    def fails():
        with files.replacing(tmp_path / "kept") as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/kept'"):
        fails()
    for _ in range(2):
        with files.dispensable(tmp_path):
            fails()
    assert capsys.readouterr().err == f"\n{tmp_path} cannot be written (No space left on device); going on without it\n"
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(files, "CACHE", tmp_path / "file")
    for _ in range(2):
        assert files.cached("kind", "recipe", lambda: {"a": [7]}) == {"a": [7]}
    assert capsys.readouterr().err.count(f"{tmp_path}/file/kind cannot be written (") == 1


# Places.


@dataclasses.dataclass(frozen=True)
class Options:
    output: Path
    image: Path | None = None
    prompts: tuple[str, ...] = ("~",)


@pytest.mark.parametrize(("home", "place"), [("/home/me", "/home/me/a b"), (None, "~/a b")])
def test_a_path_may_begin_at_the_home_folder_if_there_is_one(monkeypatch, home, place):
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path).replace("~", home or "~", 1))
    assert files.expanded(Options(Path("~/a b"))) == Options(Path(place))
    assert files.expanded(Options(Path("a/~"), Path("~/a b"))).image == Path(place)


@pytest.mark.parametrize(
    ("filled", "writable", "home", "cache"),
    [
        (False, True, "/home/me", "here"),
        (False, False, "/home/me", "/home/me/.cache/emoji-diffusion"),
        (False, False, "~", "here"),
        (True, False, "/home/me", "here"),
    ],
)
def test_the_cache_is_beside_the_code_or_where_it_can_be_written(tmp_path, monkeypatch, filled, writable, home, cache):
    here = tmp_path.resolve() / ".cache"
    if filled:
        here.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    shutil.copy(files.__file__, tmp_path)
    assert runpy.run_path(str(tmp_path / "files.py"))["CACHE"] == (here if cache == "here" else Path(cache))
