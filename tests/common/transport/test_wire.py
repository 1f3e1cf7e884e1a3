from __future__ import annotations

import pytest

from common.errors import InvalidArgument
from common.params import TokenLogprob, TopLogprob
from common.transport import wire
from common.transport.messages import (
    AbandonAttempt,
    Acknowledgement,
    AttemptBegin,
    AttemptKey,
    ChunkHeader,
    Commit,
    CommitAcknowledgement,
    Credit,
    Goodbye,
    PairHello,
    PairIdentity,
    PairWelcome,
    ReservationGone,
    TransferStatus,
)
from pdserve.v1 import decode_pb2

KEY = AttemptKey(2**64 - 1, 2**32 - 1)
LOGPROB = TokenLogprob(5, -0.5, 2, (TopLogprob(4, -0.25), TopLogprob(5, -0.5)))

REQUESTS = [
    PairHello(PairIdentity("prefill-0", "boot", "digest", "layers=2", 3), ("nccl", "gloo"), b"\x00\xff"),
    AttemptBegin(KEY),
    ChunkHeader(2**63, KEY, 1, 2, 3, 4, 2**40, 2**64 - 1),
    Commit(KEY, 2**40, 7),
    Commit(KEY, 2**40, 7, LOGPROB, (LOGPROB, LOGPROB)),
    AbandonAttempt(KEY),
    Goodbye("idle"),
]
RESPONSES = [
    PairWelcome("decode-0", "boot", b"\x00\xff", "gloo", b"1", 8, 2**22),
    *(Acknowledgement(9, status, "why") for status in TransferStatus),
    Credit(4),
    *(CommitAcknowledgement(KEY, status, "why") for status in TransferStatus),
    ReservationGone(KEY),
    Goodbye("draining"),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_what_prefill_says_arrives_as_it_was(message) -> None:
    sent = wire.request_to_proto(message).SerializeToString()
    assert wire.request_from_proto(decode_pb2.ConnectPairRequest.FromString(sent)) == message


@pytest.mark.parametrize("message", RESPONSES, ids=lambda message: type(message).__name__)
def test_what_decode_says_arrives_as_it_was(message) -> None:
    sent = wire.response_to_proto(message).SerializeToString()
    assert wire.response_from_proto(decode_pb2.ConnectPairResponse.FromString(sent)) == message


def test_messages_of_a_newer_peer_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="without content"):
        wire.request_from_proto(decode_pb2.ConnectPairRequest())
    with pytest.raises(InvalidArgument, match="without content"):
        wire.response_from_proto(decode_pb2.ConnectPairResponse())
    unknown = decode_pb2.ChunkAcknowledgement(sequence_number=1, status=9)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="transfer status 9"):
        wire.response_from_proto(decode_pb2.ConnectPairResponse(acknowledgement=unknown))
