"""Which tests carry the number of which promise of docs/promises.md: read from their marks, nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.processes import ROOT


def marked_tests() -> dict[int, set[tuple[str, str]]]:
    """For each number the tests that are marked with it: (path from the root, name)."""
    marked: dict[int, set[tuple[str, str]]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for number in _numbers(node):
                assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                marked.setdefault(number, set()).add((_from_root(path), node.name))
    return marked


def _from_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _numbers(node: ast.stmt) -> list[int]:
    """The arguments of its @pytest.mark.promise(...)."""
    decorators = getattr(node, "decorator_list", [])
    marks = [one for one in decorators if isinstance(one, ast.Call) and ast.unparse(one.func) == "pytest.mark.promise"]
    return [ast.literal_eval(argument) for mark in marks for argument in mark.args]
