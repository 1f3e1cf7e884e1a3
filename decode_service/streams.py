"""From engine events to the messages of one Decode stream: tokens coalesce while the reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from common.errors import PdserveError
from common.wire import logprob_to_proto, logprobs_to_proto
from decode_service.events import Completed, Event, Lost, Reserved, Token
from decode_service.reservations import Verdict
from pdserve.v1 import decode_pb2, types_pb2

_KV_PATH = {
    Verdict.REMOTE: types_pb2.KV_PATH_REMOTE,
    Verdict.LOCAL: types_pb2.KV_PATH_LOCAL,
    Verdict.RECOMPUTED: types_pb2.KV_PATH_RECOMPUTED,
    Verdict.CACHED: types_pb2.KV_PATH_CACHED,
}


class Mailbox:
    """Events of one stream, in order, until its handler takes them. Belongs to the event loop."""

    def __init__(self, on_put: Callable[..., None] | None = None) -> None:
        """`on_put` gets what is put, as it is."""
        self._on_put = on_put
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, *events: Event) -> None:
        if self._on_put is not None:
            self._on_put(*events)
        self._events += events
        self._filled.set()

    async def take(self) -> list[Event]:
        """Everything that has come; waits until there is something."""
        await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        return events


def responses(
    events: Iterable[Event], *, pair_endpoint: str, decode_worker: str
) -> Iterator[decode_pb2.DecodeResponse]:
    """Messages for `events`; consecutive tokens become one chunk.

    Raises:
        PdserveError: the event that ends the stream with an error, after everything before it.
    """
    chunk: decode_pb2.DecodeChunk | None = None
    for event in events:
        if isinstance(event, int):
            chunk = chunk or decode_pb2.DecodeChunk()
            chunk.token_ids.append(event)
            continue
        if isinstance(event, Token):
            chunk = chunk or decode_pb2.DecodeChunk()
            chunk.token_ids.append(event.token_id)
            if event.logprob is not None:
                chunk.logprobs.append(logprob_to_proto(event.logprob))
            if event.prompt_logprobs:
                chunk.prompt_logprobs.extend(logprobs_to_proto(event.prompt_logprobs))
            continue
        if chunk is not None:
            yield decode_pb2.DecodeResponse(chunk=chunk)
            chunk = None
        if isinstance(event, PdserveError):
            raise event
        yield _response(event, pair_endpoint, decode_worker)
    if chunk is not None:
        yield decode_pb2.DecodeResponse(chunk=chunk)


def _response(event: Reserved | Lost | Completed, pair_endpoint: str, decode_worker: str) -> decode_pb2.DecodeResponse:
    match event:
        case Reserved():
            reserved = decode_pb2.Reserved(pair_endpoint=pair_endpoint, **event._asdict())
            return decode_pb2.DecodeResponse(reserved=reserved)
        case Lost():
            reason = (
                decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED
                if event.preempted
                else decode_pb2.PREFILL_NEEDED_REASON_PAIR_LOST
            )
            needed = decode_pb2.PrefillNeeded(attempt=event.attempt, reason=reason, detail=event.detail)
            return decode_pb2.DecodeResponse(prefill_needed=needed)
        case Completed():
            fields = event._asdict()
            by_length = fields.pop("by_length")
            fields["kv_path"] = _KV_PATH[event.kv_path]
            finish_reason = types_pb2.FINISH_REASON_LENGTH if by_length else types_pb2.FINISH_REASON_STOP
            completion = decode_pb2.DecodeCompletion(finish_reason=finish_reason, decode_worker=decode_worker, **fields)
            return decode_pb2.DecodeResponse(completion=completion)
