"""The door of a worker: turns an Open or a PrefillRequest into a Sequence, or says what is wrong with it."""

from __future__ import annotations

import grpc.aio

from common.clock import Clock
from common.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from common.identities import MAX_NAME_BYTES
from common.params import MAX_CACHE_SALT_BYTES, MAX_LOGPROBS, MAX_REQUEST_ID_BYTES
from common.sequence import Request, Sequence
from common.wire import sampling_from_proto, stopping_from_proto
from pdserve.v1 import decode_pb2, prefill_pb2, worker_pb2


def admit(
    message: decode_pb2.Open | prefill_pb2.PrefillRequest,
    context: grpc.aio.ServicerContext,
    identity: worker_pb2.WorkerIdentity,
    clock: Clock,
) -> Sequence:
    """A new sequence for `message`, with the caller's deadline on the worker's clock.

    Raises:
        FailedPrecondition: it was meant for another model.
        InvalidArgument: naming the field and the limit.
        DeadlineExceeded: the deadline is past already.
    """
    if message.model_fingerprint != identity.model_fingerprint:
        raise FailedPrecondition(
            f"this worker serves model {identity.model_fingerprint}, "
            f"the request is for {message.model_fingerprint or '(unset)'}",
            field="model_fingerprint",
            reason="FINGERPRINT_MISMATCH",
        )
    _check_limits(message)
    token_ids = tuple(message.token_ids.ids)
    _check_tokens(token_ids, message.num_prompt_tokens, identity)
    if not message.sampling.HasField("seed"):
        raise InvalidArgument("the router draws a seed for every request", field="sampling.seed")
    sampling = sampling_from_proto(message.sampling)
    stopping = stopping_from_proto(message.stopping)
    sampling.validate(identity.vocab_size)
    stopping.validate(identity.vocab_size)
    remaining_s = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineExceeded("the deadline was past on arrival")
    request = Request(
        request_id=message.request_id,
        token_ids=token_ids,
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling,
        stopping=stopping,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
        cache_salt=message.cache_salt,
        priority=getattr(message, "priority", 0),
        deadline_s=float("inf") if remaining_s is None else clock() + remaining_s,
    )
    eos = () if stopping.ignore_eos else tuple(identity.eos_token_ids)
    return Sequence(request, frozenset((*stopping.stop_token_ids, *eos)))


# A router binds a salt to the name of a caller.
_MAX_SALT_BYTES = MAX_CACHE_SALT_BYTES + MAX_NAME_BYTES + len(f"{MAX_NAME_BYTES}:")


def _check_limits(message: decode_pb2.Open | prefill_pb2.PrefillRequest) -> None:
    """Those of GenerateRequest, which a router has seen to; but a worker takes nobody's word for it."""
    limits = {"request_id": MAX_REQUEST_ID_BYTES, "cache_salt": _MAX_SALT_BYTES}
    for field, limit in limits.items():
        if len(getattr(message, field).encode()) > limit:
            raise InvalidArgument(f"{field} must have at most {limit} bytes", field=field)
    for field in ("num_logprobs", "num_prompt_logprobs"):
        if getattr(message, field) > MAX_LOGPROBS:
            raise InvalidArgument(f"{field} must be at most {MAX_LOGPROBS}, got {getattr(message, field)}", field=field)


def _check_tokens(token_ids: tuple[int, ...], num_prompt_tokens: int, identity: worker_pb2.WorkerIdentity) -> None:
    if not token_ids:
        raise InvalidArgument("there is no token to work on", field="token_ids")
    if len(token_ids) >= identity.context_length:
        raise InvalidArgument(
            f"{len(token_ids)} tokens leave no room in the context of {identity.context_length}", field="token_ids"
        )
    if max(token_ids) >= identity.vocab_size:
        raise InvalidArgument(
            f"token id {max(token_ids)} is not below the vocabulary size {identity.vocab_size}", field="token_ids"
        )
    if not 1 <= num_prompt_tokens <= len(token_ids):
        raise InvalidArgument(
            f"num_prompt_tokens {num_prompt_tokens} is not between 1 and the {len(token_ids)} tokens given",
            field="num_prompt_tokens",
        )
