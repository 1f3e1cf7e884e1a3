"""Conversions between the messages of a pair's control stream and protobuf, for the two ends of that stream."""

from __future__ import annotations

from common.errors import InvalidArgument
from common.transport.messages import (
    AbandonAttempt,
    Acknowledgement,
    AttemptBegin,
    AttemptKey,
    ChunkHeader,
    Commit,
    CommitAcknowledgement,
    Credit,
    FromDecode,
    FromPrefill,
    Goodbye,
    PairHello,
    PairIdentity,
    PairWelcome,
    ReservationGone,
    TransferStatus,
)
from common.wire import logprob_from_proto, logprob_to_proto, logprobs_to_proto
from pdserve.v1 import decode_pb2 as pb

_STATUS_NUMBERS = {
    TransferStatus.OK: pb.TRANSFER_STATUS_OK,
    TransferStatus.FENCED: pb.TRANSFER_STATUS_FENCED,
    TransferStatus.CORRUPT: pb.TRANSFER_STATUS_CORRUPT,
    TransferStatus.INVALID: pb.TRANSFER_STATUS_INVALID,
}
_STATUSES = {number: status for status, number in _STATUS_NUMBERS.items()}


def request_to_proto(message: PairHello | FromPrefill) -> pb.ConnectPairRequest:
    match message:
        case PairHello(identity, transports, rendezvous):
            hello = pb.PairHello(
                prefill_worker=identity.worker,
                boot_id=identity.boot_id,
                model_fingerprint=identity.model_fingerprint,
                kv_layout=identity.kv_layout,
                protocol_version=identity.protocol_version,
                transports=transports,
                rendezvous=rendezvous,
            )
            return pb.ConnectPairRequest(hello=hello)
        case AttemptBegin(key):
            return pb.ConnectPairRequest(begin=pb.AttemptBegin(**key._asdict()))
        case ChunkHeader():
            announcement = pb.ChunkAnnouncement(
                sequence_number=message.sequence_number,
                reservation=message.key.reservation,
                attempt=message.key.attempt,
                first_layer=message.first_layer,
                num_layers=message.num_layers,
                first_block=message.first_block,
                num_blocks=message.num_blocks,
                num_bytes=message.num_bytes,
                checksum=message.checksum,
            )
            return pb.ConnectPairRequest(announcement=announcement)
        case Commit(key, num_bytes, first_token_id, logprob, prompt_logprobs):
            commit = pb.KvCommit(
                **key._asdict(),
                num_bytes=num_bytes,
                first_token_id=first_token_id,
                first_token_logprob=None if logprob is None else logprob_to_proto(logprob),
                prompt_logprobs=logprobs_to_proto(prompt_logprobs),
            )
            return pb.ConnectPairRequest(commit=commit)
        case AbandonAttempt(key):
            return pb.ConnectPairRequest(abandon=pb.AbandonAttempt(**key._asdict()))
        case Goodbye(reason):
            return pb.ConnectPairRequest(goodbye=pb.PairGoodbye(reason=reason))


def request_from_proto(request: pb.ConnectPairRequest) -> PairHello | FromPrefill:
    """Raises InvalidArgument for a request without content."""
    match request.WhichOneof("request"):
        case "hello":
            hello = request.hello
            identity = PairIdentity(
                hello.prefill_worker, hello.boot_id, hello.model_fingerprint, hello.kv_layout, hello.protocol_version
            )
            return PairHello(identity, tuple(hello.transports), hello.rendezvous)
        case "begin":
            return AttemptBegin(_key(request.begin))
        case "announcement":
            said = request.announcement
            return ChunkHeader(
                said.sequence_number,
                _key(said),
                said.first_layer,
                said.num_layers,
                said.first_block,
                said.num_blocks,
                said.num_bytes,
                said.checksum,
            )
        case "commit":
            commit = request.commit
            logprob = commit.first_token_logprob if commit.HasField("first_token_logprob") else None
            return Commit(
                _key(commit),
                commit.num_bytes,
                commit.first_token_id,
                None if logprob is None else logprob_from_proto(logprob),
                tuple(logprob_from_proto(entry) for entry in commit.prompt_logprobs),
            )
        case "abandon":
            return AbandonAttempt(_key(request.abandon))
        case "goodbye":
            return Goodbye(request.goodbye.reason)
    raise InvalidArgument("a ConnectPair request without content; is prefill newer than decode?", field="request")


def response_to_proto(message: PairWelcome | FromDecode) -> pb.ConnectPairResponse:
    match message:
        case PairWelcome():
            welcome = pb.PairWelcome(
                decode_worker=message.worker,
                boot_id=message.boot_id,
                token=message.token,
                transport=message.transport,
                rendezvous=message.rendezvous,
                num_credits=message.num_credits,
                max_chunk_bytes=message.max_chunk_bytes,
            )
            return pb.ConnectPairResponse(welcome=welcome)
        case Acknowledgement(sequence_number, status, detail):
            answer = pb.ChunkAcknowledgement(
                sequence_number=sequence_number, status=_STATUS_NUMBERS[status], detail=detail
            )
            return pb.ConnectPairResponse(acknowledgement=answer)
        case Credit(num_chunks):
            return pb.ConnectPairResponse(credit=pb.PairCredit(num_chunks=num_chunks))
        case CommitAcknowledgement(key, status, detail):
            verdict = pb.CommitAcknowledgement(**key._asdict(), status=_STATUS_NUMBERS[status], detail=detail)
            return pb.ConnectPairResponse(commit_acknowledgement=verdict)
        case ReservationGone(key):
            return pb.ConnectPairResponse(reservation_gone=pb.ReservationGone(**key._asdict()))
        case Goodbye(reason):
            return pb.ConnectPairResponse(goodbye=pb.PairGoodbye(reason=reason))


def response_from_proto(response: pb.ConnectPairResponse) -> PairWelcome | FromDecode:
    """Raises InvalidArgument for a response without content, or with a status that this side does not know."""
    match response.WhichOneof("response"):
        case "welcome":
            welcome = response.welcome
            return PairWelcome(
                welcome.decode_worker,
                welcome.boot_id,
                welcome.token,
                welcome.transport,
                welcome.rendezvous,
                welcome.num_credits,
                welcome.max_chunk_bytes,
            )
        case "acknowledgement":
            answer = response.acknowledgement
            return Acknowledgement(answer.sequence_number, _status(answer.status), answer.detail)
        case "credit":
            return Credit(response.credit.num_chunks)
        case "commit_acknowledgement":
            verdict = response.commit_acknowledgement
            return CommitAcknowledgement(_key(verdict), _status(verdict.status), verdict.detail)
        case "reservation_gone":
            return ReservationGone(_key(response.reservation_gone))
        case "goodbye":
            return Goodbye(response.goodbye.reason)
    raise InvalidArgument("a ConnectPair response without content; is decode newer than prefill?", field="response")


def _key(
    message: pb.AttemptBegin
    | pb.ChunkAnnouncement
    | pb.KvCommit
    | pb.AbandonAttempt
    | pb.CommitAcknowledgement
    | pb.ReservationGone,
) -> AttemptKey:
    return AttemptKey(message.reservation, message.attempt)


def _status(number: pb.TransferStatus) -> TransferStatus:
    status = _STATUSES.get(number)
    if status is None:
        raise InvalidArgument(f"transfer status {number} is not one of {sorted(_STATUSES)}", field="status")
    return status
