"""What somebody does first: clone, install, draw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharing import portable

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not portable.is_exported(portable.BUNDLED), reason="there is no network in pretrained/")
def test_a_fresh_clone_in_a_new_environment_draws_with_the_bundled_network(tmp_path):
    clone, python = tmp_path / "clone", tmp_path / "venv" / "bin" / "python"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHON"))}
    for command in (
        ["git", "clone", "--quiet", ROOT, clone],
        [sys.executable, "-m", "venv", tmp_path / "venv"],
        [python, "-m", "pip", "install", "--quiet", "-r", clone / "requirements.txt"],
    ):
        subprocess.run(command, env=plain, check=True)
    done = subprocess.run([python, "test.py"], cwd=clone, env=plain, check=True, capture_output=True, text=True)
    assert f"the network is that of {clone / 'pretrained'}" in done.stderr
    assert done.stdout.startswith("validation_images/test/grid.png and ")
    assert (clone / "validation_images" / "test" / "grid.png").is_file()
