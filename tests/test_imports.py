"""The arrows between the rooms: who may import whom."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "faithdiff_jax"
FREE = {"errors", "_version", ""}  # anyone may import these; "" is the package itself

ALLOWED = {
    "__main__": {"cli"},
    "config": {"files"},
    "sharding": set(),
    "files": {"files"},
    "models": {"models", "diffusion", "config"},
    "diffusion": {"diffusion"},
    "planning": {"planning", "models", "diffusion", "config"},
    "weights": {"weights", "models", "diffusion", "config", "files"},
    "inference": {"inference", "models", "diffusion", "weights", "files", "config", "sharding", "planning"},
    "data": {"data", "files", "config"},
    "evaluation": {"evaluation", "models", "files", "config"},
    "baselines": {"baselines", "inference", "models", "weights", "files", "config", "sharding"},
    "training": {
        "training", "models", "diffusion", "data", "weights", "sharding", "config", "inference", "files",
        "evaluation", "planning",
    },
    "service": {"service", "inference", "weights", "files", "config"},
    "cli": {
        "cli", "data", "inference", "weights", "files", "sharding", "config", "training", "evaluation", "models",
        "planning", "baselines", "service",
    },
}  # fmt: skip


def rooms_imported(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "faithdiff_jax":
                names = [f"faithdiff_jax.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "faithdiff_jax"}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", *FREE):
        return
    assert room in ALLOWED, f"{room} is a new room: say here what it may import"
    forbidden = rooms_imported(path) - ALLOWED[room] - FREE - {"__init__", "__version__", "SMALL_MODEL"}
    assert not forbidden, f"{room} may not import {', '.join(sorted(forbidden))}"


def test_nothing_of_ours_imports_the_scripts():
    scripts = {"infer", "convert_weights", "caption", "train"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not scripts & set(names), path


def test_importing_the_package_does_nothing():
    """No jax, no devices, no files: the heavy names are loaded when they are asked for."""
    code = "import sys, faithdiff_jax; print(sorted({'jax', 'flax', 'transformers', 'PIL'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_public_names():
    import faithdiff_jax

    assert faithdiff_jax.FaithDiff.__name__ == "FaithDiff"
    assert faithdiff_jax.FaithDiffConfig.__name__ == "FaithDiffConfig"
    assert faithdiff_jax.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = faithdiff_jax.nothing_like_this
