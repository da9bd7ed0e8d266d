"""Habits of the house that a program can count."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "faithdiff_jax"
MOST_PARAMETERS = 8


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_takes_more_than_eight_parameters(path):
    crowded = {
        f"{getattr(node, 'name', 'lambda')}, line {node.lineno}": count
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        and (count := parameters(node.args)) > MOST_PARAMETERS
    }
    assert not crowded


def parameters(arguments: ast.arguments) -> int:
    """How many there are, `self` and `cls` not counted, `*args` and `**keywords` one each."""
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return len([argument for argument in named if argument.arg not in ("self", "cls")]) + len(starred)
