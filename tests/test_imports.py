"""The direction of imports: each module sees only the floors below its own, and scripts never see each other."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the ground up; a module may import from lower floors only
    {"params", "files"},
    {"parallel"},
    {"schedule", "images", "kernels", "augmentation", "sources.packages", "sources.names"},
    {"sharing.portable", "sharing.onnx_graph"},
    {"model", "text_encoder", "samplers", "dataset", "tracking", "checkpoint"},
    {"guidance", "dataloader", "sources.emojis", "sources.whole"},
    {"sampling", "ema", "sources.folders", "sources.iconify"},
    {"training", "pipeline"},
    {"evaluation", "sharing.web", "sharing.page"},
    {"run"},
    {"train", "test", "evaluate", "export", "prepare_dataset", "app"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"), *ROOT.glob("sharing/*.py"), *ROOT.glob("sources/*.py")]


def imports(path):
    """Full names of the modules that a file imports, of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def place(module):
    """A module as FLOORS names it, or "" for one of another project."""
    return next((name for name in (module, module.split(".")[0]) if name in FLOOR), "")


def test_every_module_stands_on_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(FLOOR)
    assert len(list(ROOT.glob("*.py"))) <= 26


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    found = imports(path)
    assert not [module for module in found if "._src" in module]
    own = place(".".join(path.relative_to(ROOT).with_suffix("").parts)) or pytest.skip("an empty package file")
    for module in {place(name) for name in found} - {own, ""}:
        assert FLOOR[module] < FLOOR[own], f"{own} imports {module}"
    if own in {"params", "files", "sources.packages", "dataset", "prepare_dataset"} or path.stem == "metrics":
        assert "jax" not in found
    if own == "samplers":
        assert {place(name) for name in found} <= {"schedule", ""}
    if own == "model":
        assert "schedule" not in found


@pytest.mark.parametrize("name", ["model", "dataset", "sharing"])
def test_a_file_of_the_users_own_that_is_taken_for_one_of_ours_is_named(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("mine = 1\n")
    (tmp_path / "draw.py").write_text("from pipeline import DiffusionPipeline\n")
    command = [sys.executable, str(tmp_path / "draw.py")]
    said = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stderr
    assert f"ImportError: {tmp_path / name}.py was taken for {name} of {ROOT}: rename it" in said


def test_the_page_names_the_file_of_packages_that_it_needs():
    code = "import sys, app; sys.modules['gradio'] = None; sys.argv = ['app.py']; app.main()"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 1
    assert said.stderr.startswith("app.py: import of gradio")
    assert said.stderr.endswith(": pip install -r requirements-app.txt\n")
