from __future__ import annotations

import pytest

from benchmarks.through_services import Poll, Round, median, step_between

POLLS = [Poll(0.9, 1.1, 10, 0.1), Poll(1.2, 1.3, 20, 0.2), Poll(1.8, 1.9, 60, 1.0), Poll(2.1, 2.2, 99, 9.0)]


def test_a_step_counts_while_all_streams_are_open():
    assert step_between(POLLS, 1.0, 2.0) == pytest.approx(0.8 / 40)


def test_without_two_polls_there_is_no_step():
    assert step_between(POLLS, 1.0, 1.5) is None


def test_rounds_without_a_step_do_not_count_for_it():
    assert median([Round(1.0, 0.1, None), Round(3.0, 0.3, 0.5)]) == Round(2.0, 0.2, 0.5)
