import math

import pytest

from common.clock import FakeClock
from decode_service.outbox import Outbox


@pytest.fixture
def clock():
    return FakeClock()


def outbox(clock, **limits):
    sent = []
    box = Outbox(sent.append, **{"interval_s": 0.010, "rate": math.inf, **limits}, clock=clock)
    box.put("before", 0)
    clock.advance(1)
    box.send()
    sent.clear()
    return box, sent


def test_what_can_wait_gathers_for_the_interval(clock):
    box, sent = outbox(clock)
    for token in (1, 2):
        box.put("a", token, can_wait=True)
        box.send()
    assert not sent
    clock.advance(0.011)
    box.send()
    assert sent == [{"a": [1, 2]}]


def test_what_is_urgent_takes_along_its_own_stream_alone(clock):
    box, sent = outbox(clock)
    box.put("a", 1, can_wait=True)
    box.put("b", 1, can_wait=True)
    box.put("b", 2)
    box.send()
    assert sent == [{"b": [1, 2]}]
    clock.advance(0.011)
    box.send()
    assert sent[1:] == [{"a": [1]}]


def test_more_streams_than_the_rate_allows_take_turns(clock):
    box, sent = outbox(clock, rate=1000)
    for _ in range(4):
        for stream in range(50):
            box.put(stream, 1, can_wait=True)
        clock.advance(0.0205)
        box.send()
    assert [list(streams) for streams in sent] == [
        list(range(20)),
        list(range(20, 40)),
        [*range(40, 50), *range(10)],
        list(range(10, 30)),
    ]
    assert [len(sent[index][0]) for index in (0, 2)] == [1, 2]


def test_nothing_is_delivered_where_there_is_nothing(clock):
    box, sent = outbox(clock)
    clock.advance(1)
    box.send()
    assert not sent
