"""The queue's promises, on a clock that is turned by hand."""

import pytest

from common.clock import FakeClock
from common.errors import DeadlineExceeded, ResourceExhausted
from router.queue import RequestQueue
from router.service_rate import ENOUGH
from tests.router.values import request


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def _queue(clock: FakeClock, **limits: int) -> RequestQueue:
    return RequestQueue(**{"max_requests": 100, "max_tokens": 10_000, **limits}, clock=clock)


def _ids(queue: RequestQueue) -> list[str]:
    return [ticket.request.request_id for ticket in queue]


def _serve(queue: RequestQueue, clock: FakeClock, count: int, every_s: float) -> None:
    """A backlog from which one request is taken every so often."""
    for place in range(count + 1):
        queue.join(request(f"served {place}", priority=100))
    for _ in range(count):
        clock.advance(every_s)
        queue.take(queue.head)


def test_first_come_first_served_within_a_priority(clock):
    queue = _queue(clock)
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -5)]:
        queue.join(request(name, priority=priority))
    assert _ids(queue) == ["b", "d", "a", "c", "e"]


@pytest.mark.promise(19)
def test_one_request_too_many_is_told_when_to_come_again(clock):
    queue = _queue(clock, max_requests=2)
    queue.join(request("a"))
    queue.join(request("b"))
    with pytest.raises(ResourceExhausted, match="max_queue_requests = 2") as caught:
        queue.join(request("c"))
    assert caught.value.retry_after_s == 1.0


def test_prompt_tokens_are_bounded_too(clock):
    queue = _queue(clock, max_tokens=100)
    queue.join(request("a", num_prompt_tokens=60))
    with pytest.raises(ResourceExhausted, match="max_queue_tokens = 100"):
        queue.join(request("b", num_prompt_tokens=41))
    queue.join(request("c", num_prompt_tokens=40))


def test_the_delay_to_retry_follows_the_measured_rate(clock):
    queue = _queue(clock, max_requests=ENOUGH + 1)
    _serve(queue, clock, ENOUGH, every_s=4.0)
    for place in range(ENOUGH):
        queue.join(request(f"more {place}"))
    with pytest.raises(ResourceExhausted) as caught:
        queue.join(request("one too many"))
    assert caught.value.retry_after_s == pytest.approx(4.0, rel=0.2)


def test_room_comes_back_when_a_ticket_is_taken_or_leaves(clock):
    queue = _queue(clock, max_requests=1, max_tokens=10)
    for end in (queue.take, queue.leave):
        end(queue.join(request("a", num_prompt_tokens=10)))
        assert (len(queue), queue.num_tokens, queue.head) == (0, 0, None)


def test_a_request_whose_deadline_passes_is_dropped(clock):
    queue = _queue(clock)
    queue.join(request("soon", deadline_s=clock() + 1))
    queue.join(request("later", deadline_s=clock() + 10))
    clock.advance(1.5)
    [(ticket, error)] = queue.drop_late()
    assert ticket.request.request_id == "soon"
    assert isinstance(error, DeadlineExceeded)
    assert _ids(queue) == ["later"]


def test_a_request_that_would_be_served_too_late_is_refused_at_once(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=2.0)
    queue.join(request("patient", deadline_s=clock() + 100))
    with pytest.raises(DeadlineExceeded, match="2 requests ahead") as caught:
        queue.join(request("hasty", deadline_s=clock() + 3))
    assert caught.value.reason == "PREDICTED_TOO_LATE"


def test_a_waiting_request_is_dropped_once_the_prediction_passes_its_deadline(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=0.1)
    queue.join(request("waiting", deadline_s=clock() + 5))
    assert queue.drop_late() == []
    clock.advance(4.5)  # and nothing was served
    assert [ticket.request.request_id for ticket, _ in queue.drop_late()] == ["waiting"]


def test_the_quickest_first_token_of_late_is_part_of_the_prediction(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=0.1)
    queue.rate.first_token(9.0)
    queue.rate.first_token(5.0)
    with pytest.raises(DeadlineExceeded):
        queue.join(request("hasty", deadline_s=clock() + 4))
    queue.join(request("patient", deadline_s=clock() + 6))


def test_nothing_is_predicted_from_few_measurements(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH - 1, every_s=1000.0)
    queue.join(request("hasty", deadline_s=clock() + 0.1))


def test_time_without_a_queue_does_not_count_against_the_rate(clock):
    queue = _queue(clock)
    for place in range(ENOUGH):
        queue.join(request(f"alone {place}"))
        clock.advance(0.1)
        queue.take(queue.head)
        clock.advance(3600.0)
    queue.join(request("hasty", deadline_s=clock() + 1))


def test_a_higher_priority_does_not_wait_for_lower_ones(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=1.0)
    queue.take(queue.head)
    for place in range(20):
        queue.join(request(f"low {place}", deadline_s=clock() + 1000))
    with pytest.raises(DeadlineExceeded):
        queue.join(request("low and hasty", deadline_s=clock() + 5))
    queue.join(request("high and hasty", priority=1, deadline_s=clock() + 5))
