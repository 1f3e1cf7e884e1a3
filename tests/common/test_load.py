"""What workers tell of their speed."""

import pytest

from common.load import TokenPace


def test_a_token_takes_what_steps_take_shared_by_their_tokens():
    pace = TokenPace()
    pace.record(100.0, 200)
    assert pace.token_ms == pytest.approx(0.5)


def test_a_step_of_few_tokens_says_little():
    pace = TokenPace()
    for _ in range(50):
        pace.record(100.0, 1000)
        pace.record(10.0, 1)
    assert pace.token_ms == pytest.approx(0.11, rel=0.02)


def test_nothing_is_told_before_the_first_step():
    assert TokenPace().token_ms == 0
