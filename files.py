"""Files that are whole or not there, written beside their place and then renamed; and what goes wrong around files.

What can be done without, a line of metrics, a picture for people, a cache, or a line on the terminal, ends no program
where it cannot be written. A run's folder is locked while a process writes into it.
"""

import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO


def from_home(path: str | Path) -> Path:
    """A path that may begin with `~`, the home folder; where there is none, it is left as it is."""
    return Path(os.path.expanduser(path))


CACHE = Path(__file__).resolve().parent / ".cache"  # everything that can be made again; safe to delete
if not CACHE.exists() and not os.access(CACHE.parent, os.W_OK) and from_home("~").is_absolute():
    CACHE = from_home("~") / ".cache" / "emoji-diffusion"


def expanded(options: Any) -> Any:
    """A dataclass of options, each path of which may begin with `~`."""
    paths = {name: from_home(value) for name, value in vars(options).items() if isinstance(value, Path)}
    return dataclasses.replace(options, **paths)


class _Stream:
    """A standard stream on which printing never fails: what nobody reads any more, or the disk cannot hold, is lost."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, RuntimeError):  # the last where a signal interrupts a line
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, RuntimeError):
            self.stream.flush()


def secure_streams() -> None:
    """Make sure that no printing ends this program. Call it first in a script.

    The reader may go away, a service may give no stdout or stderr, the encoding may lack a letter: it becomes "?".
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file would take a closed stream's number
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  (open to the end of the process)
        if name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Stream(stream))


def keep_memory() -> None:
    """Let freed memory serve the next training step, which the system would otherwise take away and clear each time.

    Call it before threads are started. Where the C library is not glibc, nothing happens.
    """
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # mallopt(3)
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            libc.mallopt(option, value)


def trim_memory() -> None:
    """Give memory that was freed back to the system, once; where the C library is not glibc, nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def say_once(message: str) -> None:
    """Print a message on stderr, the first time that it comes up."""
    print(f"\n{message}", file=sys.stderr)


@contextmanager
def dispensable(path: Path) -> Iterator[None]:
    """For what can be done without, a cache or a record: where `path` cannot be written, say so once and go on."""
    try:
        yield
    except OSError as error:
        say_once(f"{path} cannot be written ({error.strerror or error}); going on without it")
    except Exception:
        say_once(f"{traceback.format_exc()}{path} cannot be made; going on without it")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path`, in a folder made if need be; it becomes `path` only if nothing is raised.

    An OSError that does not name its file, as that of a full disk, gets the name of `path`.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        with suppress(OSError):
            beside.unlink()


def open_regular(path: Path, most: int) -> BinaryIO:
    """A file of at most `most` bytes, to be read; OSError for more, and for a pipe or a device, which never ends."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if about.st_size > most:
        raise OSError(errno.EFBIG, f"it has {about.st_size / 2**30:.1f} GiB, more than {most / 2**30:.2g}", str(path))
    return path.open("rb")


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey instead of showing it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parsed(text: str | bytes) -> Any:
    """What JSON says; ValueError where it is none, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself, where a power loss does not reach them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable(folder: Path) -> None:
    """Make a folder, and raise OSError with its name if nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone; OSError says which one holds it already.

    The system gives a lock back when its process ends, so one that was killed is in nobody's way. On a disk that knows
    no locks, the file itself is the lock.
    """
    writable(folder)
    path, host = folder / ".lock", socket.gethostname()
    with path.open("a+", errors="replace") as file:
        file.seek(0)
        before = file.read().split()  # host and process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(file.fileno()).st_nlink > 0  # not just deleted
        except BlockingIOError:
            free = False
        except OSError:  # a disk that knows no locks
            free = not before
        if not free:
            who = f"process {before[-1]} of {before[0]}" if len(before) == 2 else "another process"
            hint = f"choose another folder, or, if that process has ended, delete {path}"
            raise OSError(f"{folder} is in use by {who}, and two runs in one folder would destroy each other: {hint}")
        if before:
            print(f"{path}: process {before[-1]} has ended without removing it; taken over")
        with suppress(OSError):
            os.truncate(path, 0)
            os.write(file.fileno(), f"{host} {os.getpid()}\n".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def cached(kind: str, recipe: str, make: Callable[[], dict]) -> dict:
    """The NumPy arrays that `make` returns, from the disk if they were made before under the same `recipe`.

    A file that cannot be read is made again, one that cannot be written is made again next time; neither is an error.
    """
    import numpy as np  # here, so that a script's --help does not wait for it

    file = CACHE / kind / f"{hashlib.sha256(recipe.encode()).hexdigest()}.npz"
    # a damaged archive raises nearly anything
    with suppress(Exception), file.open("rb") as stream, np.load(stream) as saved:
        return {name: saved[name] for name in saved.files}
    arrays = make()
    with dispensable(file.parent), replacing(file) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)
    return arrays
