from __future__ import annotations

import pytest

from benchmarks.streams import Stream
from benchmarks.through_services import Poll, output_lengths, steady, step_between

POLLS = [Poll(0.9, 1.1, 10, 0.1), Poll(1.2, 1.3, 20, 0.2), Poll(1.8, 1.9, 60, 1.0), Poll(2.1, 2.2, 99, 9.0)]


def test_a_step_counts_while_all_streams_are_open():
    assert step_between(POLLS, 1.0, 2.0) == pytest.approx(0.8 / 40)


def test_without_two_polls_there_is_no_step():
    assert step_between(POLLS, 1.0, 1.5) is None


def test_steady_is_what_lies_between_the_first_ends_and_the_last_beginning():
    # Two at a time, two seconds each, ten tokens in the last of them.
    streams = [Stream(begin, begin + 1, begin + 2, 10) for begin in (0, 0, 2, 2, 4, 4)]
    tokens_per_s, first_token_s = steady(streams, 2)
    assert (tokens_per_s, first_token_s) == (pytest.approx(10), 1)


def test_too_few_requests_are_never_steady():
    with pytest.raises(ValueError, match="too few"):
        steady([Stream(0, 1, 2, 10)] * 4, 4)


def test_streams_do_not_end_together():
    assert len(set(output_lengths(4, 4))) > 8
