from __future__ import annotations

from benchmarks.agreement import add, divergences
from benchmarks.report import Report


def test_outputs_part_where_the_first_token_differs():
    assert divergences([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == [1, None]


def test_what_must_be_identical_and_is_not_says_so():
    report = Report("name", "title")
    assert add(report, "same", [[1, 2]], [[1, 2]], must_be_identical=True)
    assert not add(report, "other", [[1, 2]], [[1, 3]], must_be_identical=True)
    assert [row["identical"] for row in report.rows] == [1, 0]


def test_the_margin_is_that_at_the_parting():
    report = Report("name", "title")
    add(report, "rounded", [[1, 2], [5, 6]], [[1, 3], [5, 6]], margins=[[9.0, 0.25], [7.0, 8.0]])
    assert report.rows[0]["largest_float32_margin"] == 0.25
