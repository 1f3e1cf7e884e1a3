"""docs/promises.md names the tests that carry each promise's number, all of them and no other."""

from __future__ import annotations

import re

from tests.support.processes import ROOT
from tests.support.promises import marked_tests

ROW = re.compile(r"^\| (\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)
TEST = re.compile(r"\[(\w+)\]\(\.\./([\w/.]+)\)")


def test_each_promise_names_the_tests_that_carry_its_number():
    rows = {int(number): cell for number, cell in ROW.findall((ROOT / "docs" / "promises.md").read_text())}
    named = {number: {(path, name) for name, path in TEST.findall(cell)} for number, cell in rows.items()}
    marked = marked_tests()
    assert set(marked) <= set(named), "a number that the page does not have"
    for number, tests in named.items():
        assert tests == marked.get(number, set()), f"promise {number}"
