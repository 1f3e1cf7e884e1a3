"""What a machine does when its peer breaks the rules."""

from __future__ import annotations

import pytest

from common.transport.messages import (
    AbandonAttempt,
    Acknowledgement,
    AttemptBegin,
    AttemptKey,
    AttemptOutcome,
    ChunkHeader,
    Commit,
    CommitAcknowledgement,
    Credit,
    Goodbye,
    ReservationGone,
    TransferStatus,
)
from common.transport.protocol import Deliver, End, Finish, Free, Receive, Send
from common.transport.receiving_protocol import ReceivingProtocol
from common.transport.sending_protocol import SendingProtocol

OK, FENCED, CORRUPT, INVALID = TransferStatus
A = AttemptKey(1, 1)
SHAPE = {"first_layer": 0, "num_layers": 1, "first_block": 0, "num_blocks": 1, "num_bytes": 8, "checksum": 5}


def header(number: int, key: AttemptKey = A, *, num_bytes: int = 8) -> ChunkHeader:
    return ChunkHeader(number, key, **(SHAPE | {"num_bytes": num_bytes}))


@pytest.fixture
def decode() -> ReceivingProtocol:
    protocol = ReceivingProtocol(2, max_chunk_bytes=8)
    assert protocol.handle(AttemptBegin(A)) == [Deliver(AttemptBegin(A))]
    return protocol


@pytest.fixture
def prefill() -> SendingProtocol:
    protocol = SendingProtocol(2, max_chunk_bytes=8)
    assert protocol.begin(A) == [Send(AttemptBegin(A))]
    return protocol


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (header(1), "prefill announced chunk 1 where 0 was due"),
        (header(0, num_bytes=9), "prefill announced 9 bytes, allowed are 1 to 8"),
        (header(0, num_bytes=0), "prefill announced 0 bytes, allowed are 1 to 8"),
        (
            header(0, AttemptKey(1, 2)),
            "prefill announced a chunk of AttemptKey(reservation=1, attempt=2), which is not",
        ),
        (AttemptBegin(A), "prefill began AttemptKey(reservation=1, attempt=1) twice"),
        (Commit(AttemptKey(2, 1), 0, 0), "prefill ended AttemptKey(reservation=2, attempt=1), which is not open"),
        (AbandonAttempt(AttemptKey(2, 1)), "prefill ended AttemptKey(reservation=2, attempt=1), which is not open"),
        (Goodbye("idle"), "idle"),
        (Goodbye(""), "closed"),
    ],
)
def test_decode_ends_the_pair_and_says_why(decode: ReceivingProtocol, message, reason: str) -> None:
    (end,) = decode.handle(message)
    assert isinstance(end, End)
    assert end.reason.startswith(reason)
    assert decode.handle(header(0)) == decode.end("again") == []


def test_an_announcement_without_credit_ends_the_pair(decode: ReceivingProtocol) -> None:
    for number in range(2):
        assert decode.handle(header(number)) == [Receive(header(number))]
    assert decode.handle(header(2)) == [End("prefill announced chunk 2 without a credit")]


@pytest.mark.parametrize("ending", [Commit(A, 8, 0), AbandonAttempt(A)])
def test_nothing_may_follow_the_end_of_an_attempt(decode: ReceivingProtocol, ending) -> None:
    decode.handle(header(0))
    assert decode.handle(ending) == []
    (end,) = decode.handle(header(1))
    assert end.reason.endswith("which is not open")


def test_acknowledgements_come_in_order_and_credits_half_a_window_at_a_time() -> None:
    decode = ReceivingProtocol(4, max_chunk_bytes=8)
    decode.handle(AttemptBegin(A))
    for number in range(4):
        decode.handle(header(number))
    assert decode.landed(1, OK, "") == [Free(1)]
    assert decode.landed(0, FENCED, "over") == [
        Free(0),
        Send(Acknowledgement(0, FENCED, "over")),
        Send(Acknowledgement(1, OK, "")),
        Send(Credit(2)),
    ]
    assert decode.landed(2, OK, "") == [Free(2)]
    assert decode.landed(3, OK, "") == [Free(3), Send(Acknowledgement(3, OK, "")), Send(Credit(2))]
    assert decode.num_credits == 4


def test_the_end_of_an_attempt_answers_its_chunks_though_others_are_under_way() -> None:
    decode = ReceivingProtocol(8, max_chunk_bytes=8)
    other = AttemptKey(2, 1)
    for message in (AttemptBegin(A), AttemptBegin(other), header(0), header(1, other), header(2)):
        decode.handle(message)
    assert decode.landed(0, OK, "") == [Free(0)]
    assert decode.landed(1, OK, "") == [Free(1)]
    acknowledgement = Send(Acknowledgement(1, OK, ""))
    assert decode.handle(AbandonAttempt(other)) == [acknowledgement, Deliver(AbandonAttempt(other))]


def test_a_commit_waits_for_what_was_announced_before_it(decode: ReceivingProtocol) -> None:
    commit = Commit(A, 8, 0)
    decode.handle(header(0))
    assert decode.handle(commit) == []
    assert decode.received(0, checksum=5) == [Deliver(header(0))]
    assert Deliver(commit) in decode.landed(0, OK, "")
    assert decode.committed(A, OK, "") == [Send(CommitAcknowledgement(A, OK, ""))]


def test_a_commit_after_a_corrupt_chunk_never_reaches_the_engine(decode: ReceivingProtocol) -> None:
    decode.handle(header(0))
    decode.handle(Commit(A, 8, 0))
    actions = decode.received(0, checksum=6)
    detail = "chunk 0: checksum 0000000000000006 where 0000000000000005 was announced"
    assert Send(Acknowledgement(0, CORRUPT, detail)) in actions
    assert Send(CommitAcknowledgement(A, CORRUPT, detail)) in actions
    assert [action for action in actions if isinstance(action, Deliver)] == [Deliver(AbandonAttempt(A))]


def test_only_open_attempts_are_told_that_their_reservation_is_gone(decode: ReceivingProtocol) -> None:
    assert decode.reservation_gone(AttemptKey(1, 3)) == [Send(ReservationGone(AttemptKey(1, 3)))]
    assert decode.reservation_gone(AttemptKey(1, 0)) == decode.reservation_gone(AttemptKey(2, 1)) == []


def test_after_the_end_decode_only_frees_slots(decode: ReceivingProtocol) -> None:
    decode.handle(header(0))
    decode.handle(header(1))
    decode.received(0, checksum=5)
    assert decode.end("lost") == [End("lost")]
    assert decode.landed(0, OK, "") == [Free(0)]
    assert decode.received(1, checksum=5) == [Free(1)]
    assert decode.committed(A, OK, "") == decode.reservation_gone(A) == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Acknowledgement(0, OK, ""), "decode acknowledged chunk 0 where none was due"),
        (Credit(1), "decode granted 3 credits in a window of 2"),
        (CommitAcknowledgement(A, OK, ""), "decode acknowledged a commit of AttemptKey(reservation=1, attempt=1) that"),
        (Goodbye("draining"), "draining"),
    ],
)
def test_prefill_ends_the_pair_and_every_attempt_with_it(prefill: SendingProtocol, message, reason: str) -> None:
    finish, end = prefill.handle(message)
    assert isinstance(end, End)
    assert end.reason.startswith(reason)
    assert finish == Finish(A, AttemptOutcome(None, end.reason, 0))
    assert prefill.handle(Credit(1)) == prefill.end("again") == []


def test_one_acknowledgement_answers_all_chunks_before_it(prefill: SendingProtocol) -> None:
    other = AttemptKey(2, 1)
    prefill.begin(other)
    prefill.announce(A, **SHAPE)
    prefill.announce(other, **SHAPE)
    prefill.abandon(A)
    assert prefill.handle(Acknowledgement(1, INVALID, "why")) == [
        Finish(A, AttemptOutcome(FENCED, "abandoned by prefill", 8)),
        Send(AbandonAttempt(other)),
        Finish(other, AttemptOutcome(INVALID, "why", 8)),
    ]


@pytest.mark.parametrize("number", [0, 3])
def test_an_acknowledgement_of_what_is_not_open_ends_the_pair(prefill: SendingProtocol, number: int) -> None:
    prefill.announce(A, **SHAPE)
    prefill.handle(Acknowledgement(0, OK, ""))
    prefill.handle(Credit(1))
    prefill.announce(A, **SHAPE)
    prefill.announce(A, **SHAPE)
    expected = End(f"decode acknowledged chunk {number} where 1 to 2 were due")
    assert prefill.handle(Acknowledgement(number, OK, ""))[-1] == expected


@pytest.mark.parametrize("status", [FENCED, CORRUPT, INVALID])
def test_a_chunk_that_is_not_ok_stops_its_attempt(prefill: SendingProtocol, status: TransferStatus) -> None:
    for _ in range(2):
        prefill.announce(A, **SHAPE)
    assert prefill.handle(Acknowledgement(0, status, "why")) == [Send(AbandonAttempt(A))]
    assert prefill.is_gone(A)
    assert prefill.announce(A, **SHAPE) == prefill.commit(Commit(A, 16, 0)) == prefill.abandon(A) == []
    assert prefill.handle(Acknowledgement(1, OK, "")) == [Finish(A, AttemptOutcome(status, "why", 16))]


def test_a_commit_acknowledgement_before_its_chunks_ends_the_pair(prefill: SendingProtocol) -> None:
    prefill.announce(A, **SHAPE)
    prefill.commit(Commit(A, 8, 0))
    assert isinstance(prefill.handle(CommitAcknowledgement(A, OK, ""))[-1], End)


def test_after_its_commit_an_attempt_is_in_the_hands_of_decode(prefill: SendingProtocol) -> None:
    prefill.commit(Commit(A, 0, 0))
    assert prefill.awaits_decode
    assert prefill.abandon(A) == prefill.handle(ReservationGone(A)) == []
    assert prefill.handle(CommitAcknowledgement(A, OK, "")) == [Finish(A, AttemptOutcome(OK, "", 0))]
    assert not prefill.awaits_decode


def test_a_gone_reservation_stops_this_attempt_and_older_ones_alone(prefill: SendingProtocol) -> None:
    newer, elsewhere = AttemptKey(1, 2), AttemptKey(2, 1)
    prefill.begin(newer)
    prefill.begin(elsewhere)
    actions = prefill.handle(ReservationGone(A))
    assert actions == [Send(AbandonAttempt(A)), Finish(A, AttemptOutcome(FENCED, "fenced by decode", 0))]
    assert prefill.is_open(newer)
    assert prefill.is_open(elsewhere)


def test_an_attempt_on_an_ended_pair_ends_at_once(prefill: SendingProtocol) -> None:
    prefill.end("lost")
    other = AttemptKey(2, 1)
    assert prefill.begin(other) == [Finish(other, AttemptOutcome(None, "lost", 0))]
