"""A line through what was measured."""

import pytest

from router.fit import LinearFit


def _fit(*points: tuple[float, float], memory: float = 32) -> LinearFit:
    fit = LinearFit(memory)
    for x, y in points:
        fit.add(x, y)
    return fit


def test_points_on_a_line_are_found_again():
    fit = _fit(*((x, 3 + 0.5 * x) for x in range(1, 20)))
    assert (fit.slope, fit.at_zero, fit.at(100)) == pytest.approx((0.5, 3, 53))


def test_one_observation_is_expected_everywhere():
    assert _fit((10, 5)).at(20) == 5


def test_the_newest_counts_most():
    fit = _fit(*[(10, 100.0)] * 100, *[(10, 1.0)] * 100, memory=10)
    assert fit.at(10) == pytest.approx(1, abs=0.01)


def test_nothing_is_expected_to_fall_or_to_be_negative():
    assert _fit((1, 10), (10, 1)).slope == 0
    assert _fit((9, 1), (10, 10)).at_zero == pytest.approx(0)
