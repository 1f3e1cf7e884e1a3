from __future__ import annotations

import pytest

from benchmarks.interference import gaps_touching, gaps_within

MOMENTS = [1.0, 2.0, 5.0, 6.0]


def test_an_undisturbed_gap_lies_within_the_quiet():
    assert gaps_within(MOMENTS, 1.5, 6.0) == pytest.approx([3.0, 1.0])


def test_a_gap_counts_for_an_arrival_that_begins_or_ends_in_it():
    assert gaps_touching(MOMENTS, 3.0, 4.0) == pytest.approx([3.0])
    assert gaps_touching(MOMENTS, 1.5, 2.5) == pytest.approx([1.0, 3.0])
