"""Random words on the control stream, judged without a stream: a refusal or the end of the pair, never a crash."""

from __future__ import annotations

import contextlib
import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.transport import wire
from common.transport.messages import AttemptKey, PairHello
from common.transport.protocol import End, Free, Receive
from common.transport.receiving_protocol import ReceivingProtocol
from common.transport.sending_protocol import SendingProtocol
from pdserve.v1 import decode_pb2
from tests.support import fuzzing

WINDOW = 2
MAX_BYTES = 4096
EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
randoms = st.randoms(use_true_random=False)


@EXAMPLES
@given(st.binary(max_size=200))
@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (decode_pb2.ConnectPairRequest, wire.request_from_proto),
        (decode_pb2.ConnectPairResponse, wire.response_from_proto),
    ],
)
def test_bytes_are_a_message_or_refused(kind, read, raw):
    try:
        message = read(kind.FromString(raw))
    except (DecodeError, InvalidArgument):
        return
    assert message is not None


@EXAMPLES
@given(randoms, st.integers(1, 30))
def test_decode_never_promises_more_than_its_slots_whatever_prefill_says(draw: random.Random, count: int):
    machine = ReceivingProtocol(WINDOW, MAX_BYTES)
    under_way: set[int] = set()
    for _ in range(count):
        raw = fuzzing.spoilt(draw, fuzzing.header(draw, [(1, 1)], len(under_way), block_bytes=64).SerializeToString())
        message = None
        with contextlib.suppress(DecodeError, InvalidArgument):
            message = wire.request_from_proto(decode_pb2.ConnectPairRequest.FromString(raw))
        if message is None or isinstance(message, PairHello):
            break
        was_over = machine.ended
        actions = machine.handle(message)
        assert not (was_over and actions)
        for action in actions:
            if isinstance(action, Receive):
                assert 0 < action.header.num_bytes <= MAX_BYTES
                under_way.add(action.header.sequence_number)
        assert len(under_way) <= WINDOW
        assert 0 <= machine.num_credits <= WINDOW
    ended = machine.end("over")
    assert machine.ended
    assert all(isinstance(action, End) for action in ended)
    for number in under_way:
        assert machine.received(number, 0) == [Free(number)]


@EXAMPLES
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_prefill_ends_a_pair_whose_answers_make_no_sense(answers: list[bytes]):
    machine = SendingProtocol(WINDOW, MAX_BYTES)
    machine.begin(AttemptKey(1, 1))
    for raw in answers:
        with contextlib.suppress(DecodeError, InvalidArgument):
            message = wire.response_from_proto(decode_pb2.ConnectPairResponse.FromString(raw))
            was_over = machine.ended
            actions = machine.handle(message)
            assert not (was_over and actions)
