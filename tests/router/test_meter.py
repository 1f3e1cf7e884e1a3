"""What the queue learns of a request while it is served."""

import contextlib

import pytest

from common.clock import FakeClock
from common.params import StoppingParams
from router.fair_share import OUTPUT_WEIGHT
from router.meter import Meter
from router.queue import RequestQueue
from tests.router.values import request

LONG = StoppingParams(max_tokens=101, ignore_eos=True)
OPEN = StoppingParams(max_tokens=101)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> RequestQueue:
    return RequestQueue(max_requests=10, max_tokens=1000, clock=clock)


def _serve(queue: RequestQueue, clock: FakeClock) -> None:
    """The first two tokens after two seconds, ten more within one."""
    with Meter(request(), queue, clock) as meter:
        clock.advance(2.0)
        meter.drawn(2)
        for _ in range(10):
            clock.advance(0.1)
            meter.drawn(1)


def test_time_to_the_first_token_and_between_tokens_is_told(queue, clock):
    _serve(queue, clock)
    assert queue.rate.service_s(LONG) == pytest.approx(2.0 + 100 * 0.1)


def test_how_many_tokens_there_were_is_told(queue, clock):
    _serve(queue, clock)
    assert queue.rate.service_s(OPEN) == pytest.approx(2.0 + 11 * 0.1)


def test_output_is_charged_as_it_comes(queue, clock):
    with Meter(request(client="a"), queue, clock) as meter:
        meter.drawn(3)
        assert queue.fair_share.given("a") == 3 * OUTPUT_WEIGHT


def _cut_off(queue: RequestQueue, clock: FakeClock, *steps: tuple[float, int], after_s: float = 0.0) -> None:
    """Seconds and tokens, and the end before its time after `after_s` more. Its deadline is after five seconds."""
    with contextlib.suppress(KeyError), Meter(request(deadline_s=clock() + 5), queue, clock) as meter:
        for seconds, num_tokens in steps:
            clock.advance(seconds)
            meter.drawn(num_tokens)
        clock.advance(after_s)
        raise KeyError


def test_a_request_that_was_cut_off_says_how_slow_it_was_but_not_how_long(queue, clock):
    _cut_off(queue, clock, (0.0, 1), (4.0, 2))
    assert queue.rate.service_s(LONG) == pytest.approx(100 * 2.0)
    assert queue.rate.service_s(OPEN) == 0.0


def test_one_without_a_token_when_its_time_is_up_counts_as_slow(queue, clock):
    _cut_off(queue, clock, after_s=5.0)
    assert queue.rate.service_s(OPEN) == 5.0


def test_a_client_that_leaves_early_says_nothing(queue, clock):
    _cut_off(queue, clock, after_s=1.0)
    assert queue.rate.service_s(OPEN) == 0.0
