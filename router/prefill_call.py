"""The client of `PrefillService.Prefill`: one attempt to fill a reservation. Protobuf stops here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import grpc.aio

from common.errors import Unavailable, from_rpc_error
from common.wire import sampling_to_proto, stopping_to_proto
from pdserve.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from router.decode_stream import Metadata, Reserved
from router.request import Request


class PrefillResult(NamedTuple):
    """What a prefill worker did. The fields mean what PrefillResponse says."""

    prefill_worker: str
    queue_ms: float
    prefill_ms: float
    kv_transfer_ms: float
    kv_bytes: int
    kv_transport: str
    num_cached_tokens: int


async def prefill(
    stub: prefill_pb2_grpc.PrefillServiceStub,
    request: Request,
    token_ids: Sequence[int],
    reserved: Reserved,
    *,
    decode_address: str,
    model_fingerprint: str,
    timeout_s: float,
    metadata: Metadata = (),
) -> PrefillResult:
    """Has `token_ids` (the prompt, and on a resumption the output so far) computed and shipped into what is reserved.

    Cancelling it stops the work. Raises the PdserveError that the worker raised.
    """
    is_first = len(token_ids) == request.num_prompt_tokens
    message = prefill_pb2.PrefillRequest(
        request_id=request.request_id,
        reservation=reserved.reservation,
        attempt=reserved.attempt,
        pair_endpoint=reserved.pair_endpoint or decode_address,
        token_ids=types_pb2.TokenIds(ids=token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=reserved.num_cached_tokens,
        sampling=sampling_to_proto(request.sampling),
        stopping=stopping_to_proto(request.stopping),
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs if is_first else None,
        cache_salt=request.cache_salt,
        model_fingerprint=model_fingerprint,
        priority=request.priority,
    )
    try:
        response = await stub.Prefill(message, timeout=timeout_s, metadata=metadata)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("the call was cancelled with its channel", reason="WORKER_LOST") from None
    return PrefillResult(*(getattr(response, name) for name in PrefillResult._fields))
