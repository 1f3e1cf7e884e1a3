"""The client of `DecodeService.Decode`: one stream, which is one reservation. Protobuf stops here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import grpc.aio

from common.errors import Internal, PdserveError, Unavailable, from_rpc_error
from common.wire import sampling_to_proto, stopping_to_proto
from pdserve.v1 import decode_pb2, decode_pb2_grpc, types_pb2
from router.output import Ending, FinishReason
from router.request import Request

# What travels beside a call.
Metadata = tuple[tuple[str, str], ...]


class KvPath(Enum):
    """Where decode's copy of the prompt's KV came from, for the last attempt."""

    REMOTE = "remote"
    LOCAL = "local"
    RECOMPUTED = "recomputed"
    CACHED = "cached"


class Reserved(NamedTuple):
    """Blocks are held; prefill may begin."""

    reservation: int
    attempt: int
    pair_endpoint: str
    num_cached_tokens: int
    queue_ms: float


class PrefillNeeded(NamedTuple):
    """The attempt was lost; decode waits for `retry`."""

    attempt: int
    # Its blocks went to older sequences; nothing has failed.
    is_preemption: bool
    detail: str


class Chunk(NamedTuple):
    """Tokens in order. Log-probabilities stay messages: they only pass through."""

    token_ids: list[int]
    logprobs: Sequence[Any]
    prompt_logprobs: Sequence[Any]


class DecodeCompletion(NamedTuple):
    """The end, and what the worker says of the path. The fields mean what DecodeCompletion says."""

    ending: Ending
    kv_path: KvPath
    kv_bytes: int
    kv_transport: str
    first_decode_ms: float
    decode_worker: str
    num_cached_tokens: int
    local_prefill_ms: float


class StreamLost(NamedTuple):
    """The stream ended before its completion."""

    error: PdserveError


Event = Reserved | PrefillNeeded | Chunk | DecodeCompletion | StreamLost

_REASONS = {types_pb2.FINISH_REASON_STOP: FinishReason.STOP, types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH}
_KV_PATHS = {
    types_pb2.KV_PATH_REMOTE: KvPath.REMOTE,
    types_pb2.KV_PATH_LOCAL: KvPath.LOCAL,
    types_pb2.KV_PATH_RECOMPUTED: KvPath.RECOMPUTED,
    types_pb2.KV_PATH_CACHED: KvPath.CACHED,
}


class DecodeStream:
    """One stream. Commands never wait; what the worker says is handed to `deliver`, in order, StreamLost last."""

    def __init__(
        self,
        stub: decode_pb2_grpc.DecodeServiceStub,
        opening: decode_pb2.Open,
        *,
        timeout_s: float,
        metadata: Metadata = (),
        deliver: Callable[[Event], None],
    ) -> None:
        self._call = stub.Decode(timeout=timeout_s, metadata=metadata)
        # Requests go out one at a time, in order; few streams have any but the first.
        self._writing = asyncio.Lock()
        self._commands: set[asyncio.Task[None]] = set()
        self._deliver = deliver
        self._has_logprobs = opening.HasField("num_logprobs") or opening.HasField("num_prompt_logprobs")
        self._is_complete = False
        self._reader = asyncio.create_task(self._read(opening))

    def retry(self, attempt: int, *, local_prefill: bool) -> None:
        """Gives up `attempt` and asks for the next."""
        retry = decode_pb2.Retry(attempt=attempt, local_prefill=local_prefill)
        self._command(decode_pb2.DecodeRequest(retry=retry))

    def finish(self) -> None:
        """Asks for the completion: the output has met a stop string."""
        self._command(decode_pb2.DecodeRequest(finish=decode_pb2.Finish()))

    def close(self) -> None:
        """Ends the stream, and with it the reservation. Nothing is delivered any more."""
        if not self._is_complete:
            self._reader.cancel()
            self._call.cancel()

    def _command(self, request: decode_pb2.DecodeRequest) -> None:
        command = asyncio.create_task(self._write(request))
        self._commands.add(command)
        command.add_done_callback(self._commands.discard)

    async def _write(self, request: decode_pb2.DecodeRequest) -> None:
        # Whatever has ended the call is told by what is read from it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with self._writing:
                await self._call.write(request)

    def _chunk(self, message: decode_pb2.DecodeChunk) -> Chunk:
        if self._has_logprobs:
            return Chunk(message.token_ids[:], message.logprobs, message.prompt_logprobs)
        return Chunk(message.token_ids[:], (), ())

    async def _read(self, opening: decode_pb2.Open) -> None:
        try:
            await self._write(decode_pb2.DecodeRequest(open=opening))
            async for response in self._call:
                kind = response.WhichOneof("response")
                if kind == "chunk":
                    self._deliver(self._chunk(response.chunk))
                elif kind == "completion":
                    self._is_complete = True
                    self._deliver(_completion(response.completion))
                elif kind == "reserved":
                    self._deliver(Reserved(*(getattr(response.reserved, name) for name in Reserved._fields)))
                elif kind == "prefill_needed":
                    self._deliver(_prefill_needed(response.prefill_needed))
            error: PdserveError = Internal("the decode worker ended the stream without a completion")
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            error = Unavailable("the stream was cancelled with its channel", reason="WORKER_LOST")
        if not self._is_complete:
            self._deliver(StreamLost(error))


def opening(
    request: Request, token_ids: Sequence[int], *, model_fingerprint: str, local_prefill: bool
) -> decode_pb2.Open:
    """Asks for a reservation for `token_ids`: the prompt, and on a resumption the output so far."""
    is_first = len(token_ids) == request.num_prompt_tokens
    return decode_pb2.Open(
        request_id=request.request_id,
        token_ids=types_pb2.TokenIds(ids=token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=sampling_to_proto(request.sampling),
        stopping=stopping_to_proto(request.stopping),
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs if is_first else None,
        cache_salt=request.cache_salt,
        model_fingerprint=model_fingerprint,
        local_prefill=local_prefill,
    )


def _prefill_needed(message: decode_pb2.PrefillNeeded) -> PrefillNeeded:
    is_preemption = message.reason == decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED
    return PrefillNeeded(message.attempt, is_preemption, message.detail)


def _completion(message: decode_pb2.DecodeCompletion) -> DecodeCompletion:
    stop_token_id = message.stop_token_id if message.HasField("stop_token_id") else None
    return DecodeCompletion(
        ending=Ending(_REASONS.get(message.finish_reason, FinishReason.STOP), stop_token_id=stop_token_id),
        kv_path=_KV_PATHS.get(message.kv_path, KvPath.REMOTE),
        kv_bytes=message.kv_bytes,
        kv_transport=message.kv_transport,
        first_decode_ms=message.first_decode_ms,
        decode_worker=message.decode_worker,
        num_cached_tokens=message.num_cached_tokens,
        local_prefill_ms=message.local_prefill_ms,
    )
