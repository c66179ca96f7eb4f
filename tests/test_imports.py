"""The direction of imports: concepts never look up at the pipeline or a script, scripts never at each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train", "test", "evaluate", "compare_encoders", "plot", "prepare_dataset"}
MODULES = {path.stem for path in ROOT.glob("*.py")}
ABOVE = {"pipeline", "selftest"}  # selftest draws with the pipeline
BELOW = MODULES - SCRIPTS - ABOVE


def imports(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[0] for module in found}, {module for module in found if "._src" in module}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    found, private = imports(name)
    assert not private
    allowed = BELOW | {"pipeline": set(), "selftest": {"pipeline"}}.get(name, ABOVE if name in SCRIPTS else set())
    assert found & MODULES <= allowed
    if name in {"params", "packages", "grids", "metrics", "dataset", "emoji_sources", "prepare_dataset"}:
        assert "jax" not in found
    if name == "samplers":
        assert found & MODULES <= {"schedule"}
    if name == "model":
        assert "schedule" not in found
