"""The queue's promises, on a clock that is turned by hand."""

import contextlib

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


def test_where_clients_take_turns_a_place_of_each_comes_free_once_in_a_round(clock):
    queue = _queue(clock, max_requests=ENOUGH + 1)
    _serve(queue, clock, ENOUGH, every_s=4.0)
    for place in range(ENOUGH):
        queue.join(request(f"more {place}", client=f"{place % 5}"))
    with pytest.raises(ResourceExhausted) as caught:
        queue.join(request("one too many", client="0"))
    # Those five, and the one whose requests were served.
    assert caught.value.retry_after_s == pytest.approx(6 * 4.0, rel=0.2)


def test_room_comes_back_when_a_ticket_is_taken_or_leaves(clock):
    queue = _queue(clock, max_requests=1, max_tokens=10)
    for end in (queue.take, queue.leave):
        end(queue.join(request("a", num_prompt_tokens=10)).ticket)
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


def test_the_prediction_has_the_first_token_that_nine_of_ten_had_by_then(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=0.1)
    for seconds in [9.0, *[5.0] * 9, *[1.0] * 5]:
        queue.rate.first_token(seconds)
    with pytest.raises(DeadlineExceeded):
        queue.join(request("hasty", deadline_s=clock() + 4))
    queue.join(request("patient", deadline_s=clock() + 6))


def _with_quick_tokens(queue: RequestQueue, clock: FakeClock) -> None:
    _serve(queue, clock, ENOUGH, every_s=0.01)
    queue.rate.first_token(1.0)
    queue.rate.streamed(10.0, num_tokens=100)


def test_a_request_must_be_able_to_end_in_time(clock):
    queue = _queue(clock)
    _with_quick_tokens(queue, clock)
    with pytest.raises(DeadlineExceeded, match="the end is"):
        queue.join(request("long", deadline_s=clock() + 10, max_tokens=101, ignore_eos=True))
    queue.join(request("short", deadline_s=clock() + 10, max_tokens=51, ignore_eos=True))


@pytest.mark.parametrize(
    ("stopping", "is_late"),
    [
        ({"max_tokens": 500}, False),
        ({"max_tokens": 500, "min_tokens": 200}, True),
        ({"max_tokens": 500, "ignore_eos": True, "stop": ("end",)}, False),
        ({"max_tokens": 500, "ignore_eos": True}, True),
    ],
)
def test_what_may_end_early_is_expected_to_be_as_long_as_the_others(clock, stopping, is_late):
    queue = _queue(clock)
    _with_quick_tokens(queue, clock)
    for num_tokens in (10, 50, 400):
        queue.rate.completed(num_tokens=num_tokens)
    with pytest.raises(DeadlineExceeded) if is_late else contextlib.nullcontext():
        queue.join(request("one", deadline_s=clock() + 10, **stopping))


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


def test_a_point_of_priority_is_worth_a_second_of_waiting(clock):
    queue = _queue(clock)
    queue.join(request("low"))
    clock.advance(4.9)
    queue.join(request("high", priority=5))
    clock.advance(0.2)
    queue.join(request("too late", priority=5))
    assert _ids(queue) == ["high", "low", "too late"]


def test_clients_take_turns_whatever_each_has_queued(clock):
    queue = _queue(clock)
    for place in range(5):
        queue.join(request(f"flood {place}", client="flood"))
    for place in range(2):
        queue.join(request(f"calm {place}", client="calm"))
    assert _ids(queue) == ["flood 0", "calm 0", "flood 1", "calm 1", "flood 2", "flood 3", "flood 4"]


def test_a_priority_does_not_pass_other_clients(clock):
    queue = _queue(clock)
    for place in range(2):
        queue.join(request(f"calm {place}", client="calm"))
    for place in range(3):
        queue.join(request(f"pushy {place}", client="pushy", priority=100))
    assert _ids(queue) == ["calm 0", "pushy 0", "calm 1", "pushy 1", "pushy 2"]


def test_turns_are_of_tokens_and_not_of_requests(clock):
    queue = _queue(clock)
    for place in range(2):
        queue.join(request(f"long {place}", client="long", num_prompt_tokens=30))
    for place in range(4):
        queue.join(request(f"short {place}", client="short", num_prompt_tokens=10))
    assert _ids(queue) == ["long 0", "short 0", "short 1", "short 2", "long 1", "short 3"]


def test_who_comes_to_a_full_queue_gets_the_place_of_whoever_has_most_of_it(clock):
    queue = _queue(clock, max_requests=3)
    for name, priority in [("a", 0), ("b", -5), ("c", 0)]:
        queue.join(request(name, client="flood", priority=priority))
    [(ticket, error)] = queue.join(request("calm", client="calm")).displaced
    assert (ticket.request.request_id, error.reason) == ("b", "QUEUE_FULL")
    assert _ids(queue) == ["a", "calm", "c"]
    with pytest.raises(ResourceExhausted):
        queue.join(request("calm again", client="calm"))


def test_room_for_tokens_is_made_in_the_same_way(clock):
    queue = _queue(clock, max_tokens=100)
    for place in range(9):
        queue.join(request(f"flood {place}", client="flood", num_prompt_tokens=10))
    with pytest.raises(ResourceExhausted, match="max_queue_tokens = 100"):
        queue.join(request("as greedy", client="calm", num_prompt_tokens=60))
    displaced = queue.join(request("fair", client="calm", num_prompt_tokens=35)).displaced
    assert [ticket.request.request_id for ticket, _ in displaced] == ["flood 8", "flood 7", "flood 6"]
    assert (len(queue), queue.num_tokens) == (7, 95)


def test_nobody_makes_room_for_one_that_is_too_late(clock):
    queue = _queue(clock, max_requests=3)
    for place in range(3):
        queue.join(request(f"flood {place}", client="flood"))
    with pytest.raises(DeadlineExceeded):
        queue.join(request("late", client="calm", deadline_s=clock()))
    assert len(queue) == 3


def test_a_higher_priority_does_not_wait_for_lower_ones(clock):
    queue = _queue(clock)
    _serve(queue, clock, ENOUGH, every_s=1.0)
    queue.take(queue.head)
    for place in range(20):
        queue.join(request(f"low {place}", deadline_s=clock() + 1000))
    with pytest.raises(DeadlineExceeded):
        queue.join(request("low and hasty", deadline_s=clock() + 5))
    queue.join(request("high and hasty", priority=1, deadline_s=clock() + 5))
