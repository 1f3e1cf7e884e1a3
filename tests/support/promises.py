"""Which tests carry the number of which promise of docs/promises.md: read from their marks, nothing is imported."""

from __future__ import annotations

import re

from tests.support.processes import ROOT

# The mark, other marks and what is between them, and the test.
MARKED = re.compile(r"^@pytest\.mark\.promise\(([\d, ]+)\)\n(?:[@ )\]].*\n)*?(?:async )?def (test_\w+)", re.MULTILINE)


def marked_tests() -> dict[int, set[tuple[str, str]]]:
    """For each number the tests that are marked with it: (path from the root, name)."""
    marked: dict[int, set[tuple[str, str]]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        found = MARKED.findall(text)
        assert len(found) == len(re.findall(r"^@pytest\.mark\.promise", text, re.MULTILINE)), f"a mark in {path}"
        for numbers, name in found:
            for number in numbers.split(","):
                marked.setdefault(int(number), set()).add((path.relative_to(ROOT).as_posix(), name))
    return marked
