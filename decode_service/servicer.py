"""DecodeService: protobuf in, engine calls out, engine events back into protobuf."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from common.admission import admit
from common.clock import Clock
from common.errors import Internal, InvalidArgument, PdserveError
from common.sequence import Sequence
from common.tracing import DECODE, Tracer
from common.worker import WorkerFront
from decode_service.engine import DecodeEngine
from decode_service.events import Completed, Event
from decode_service.pairs import PairServer
from decode_service.pipeline.decisions import Mode
from decode_service.pipeline.order import Cut
from decode_service.pipeline.scheduler import PipelineStats
from decode_service.stages import Stages
from decode_service.streams import Mailbox, responses
from pdserve.v1 import decode_pb2, decode_pb2_grpc

# The engine answers between two steps, and a new pair of streams takes a moment to be made and checked.
CONFIGURE_S = 60.0

_MODES = {
    decode_pb2.PIPELINE_MODE_AUTO: Mode.AUTO,
    decode_pb2.PIPELINE_MODE_STATIC: Mode.STATIC,
    decode_pb2.PIPELINE_MODE_DISABLED: Mode.DISABLED,
}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}


class EventRouter:
    """Hands the engine's events to the mailboxes of their streams, in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.mailboxes: dict[Sequence, Mailbox] = {}

    def on_events(self, events: dict[Sequence, list[Event]]) -> None:
        """Called from the engine thread."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: dict[Sequence, list[Event]]) -> None:
        for sequence, of_sequence in events.items():
            mailbox = self.mailboxes.get(sequence)
            if mailbox is not None:
                mailbox.put(*of_sequence)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """One handler a stream; the stream's life is the reservation's life."""

    def __init__(
        self,
        engine: DecodeEngine,
        events: EventRouter,
        pairs: PairServer,
        front: WorkerFront,
        *,
        pair_endpoint: str,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._events = events
        self._pairs = pairs
        self._front = front
        self._pair_endpoint = pair_endpoint
        self._tracer = tracer
        self._clock = clock

    async def Decode(
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        with (
            self._tracer.serving(DECODE, context.invocation_metadata() or ()) as span,
            Stages(span, self._clock) as stages,
        ):
            opening = await anext(request_iterator, None)
            if opening is None or opening.WhichOneof("request") != "open":
                raise InvalidArgument("the first request of a Decode stream is `open`", field="open")
            worker = self._front.identity.instance_id
            span.set(request_id=opening.open.request_id, worker=worker)
            sequence = admit(opening.open, context, self._front.identity, self._clock)
            mailbox = Mailbox(stages.note if span.is_recorded else None)
            with self._front.call(mailbox.put):
                self._events.mailboxes[sequence] = mailbox
                stages.asked(local=opening.open.local_prefill)
                self._engine.open(sequence, local=opening.open.local_prefill)
                reader = asyncio.create_task(self._read(sequence, mailbox, stages, request_iterator))
                try:
                    done = False
                    while not done:
                        events = await mailbox.take()
                        done = any(isinstance(event, Completed) for event in events)
                        for response in responses(events, pair_endpoint=self._pair_endpoint, decode_worker=worker):
                            yield response
                finally:
                    del self._events.mailboxes[sequence]
                    self._engine.close(sequence)
                    reader.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await reader

    async def ConnectPair(
        self, request_iterator: AsyncIterator[decode_pb2.ConnectPairRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.ConnectPairResponse]:
        async with contextlib.aclosing(self._pairs.connect(request_iterator, context)) as messages:
            async for message in messages:
                yield message

    async def GetPipelineStats(
        self, request: decode_pb2.GetPipelineStatsRequest, context: grpc.aio.ServicerContext
    ) -> decode_pb2.GetPipelineStatsResponse:
        return _stats_to_proto(self._engine.pipeline.stats())

    async def SetPipeline(
        self, request: decode_pb2.SetPipelineRequest, context: grpc.aio.ServicerContext
    ) -> decode_pb2.SetPipelineResponse:
        mode = _mode_of(request) if request.HasField("mode") else None
        changes = self._engine.configure_pipeline(
            mode=mode,
            cut=_cut_of(request) if request.HasField("decode_pipeline_cut") else None,
            attention_sm=_positive(request, "decode_attention_sm"),
            ffn_sm=_positive(request, "decode_ffn_sm"),
            profiling=request.decode_pipeline_profiling if request.HasField("decode_pipeline_profiling") else None,
        )
        stats = await asyncio.wait_for(asyncio.wrap_future(changes), CONFIGURE_S)
        return decode_pb2.SetPipelineResponse(stats=_stats_to_proto(stats))

    async def _read(
        self,
        sequence: Sequence,
        mailbox: Mailbox,
        stages: Stages,
        requests: AsyncIterator[decode_pb2.DecodeRequest],
    ) -> None:
        try:
            async for request in requests:
                match request.WhichOneof("request"):
                    case "retry":
                        stages.asked(local=request.retry.local_prefill)
                        self._engine.retry(sequence, request.retry.attempt, local=request.retry.local_prefill)
                    case "finish":
                        self._engine.finish(sequence)
                    case "open":
                        raise InvalidArgument("a Decode stream is opened once", field="open")
                    case _:
                        raise InvalidArgument("a Decode request without content", field="request")
        except PdserveError as error:
            mailbox.put(error)
        except grpc.aio.BaseError as error:
            mailbox.put(Internal(f"reading the stream failed: {error}"))


def _mode_of(request: decode_pb2.SetPipelineRequest) -> Mode:
    if request.mode not in _MODES:
        raise InvalidArgument(f"unknown pipeline mode {request.mode}", field="mode")
    return _MODES[request.mode]


def _cut_of(request: decode_pb2.SetPipelineRequest) -> Cut:
    try:
        return Cut(request.decode_pipeline_cut)
    except ValueError:
        names = " or ".join(repr(cut.value) for cut in Cut)
        raise InvalidArgument(f"{request.decode_pipeline_cut!r}, not {names}", field="decode_pipeline_cut") from None


def _positive(request: decode_pb2.SetPipelineRequest, field: str) -> int | None:
    if not request.HasField(field):
        return None
    number: int = getattr(request, field)
    if number < 1:
        raise InvalidArgument("at least 1", field=field)
    return number


def _stats_to_proto(stats: PipelineStats) -> decode_pb2.GetPipelineStatsResponse:
    fields = {name: getattr(stats, name) for name in PipelineStats.__slots__ if name != "mode"}
    return decode_pb2.GetPipelineStatsResponse(mode=_MODE_NUMBERS[stats.mode], **fields)
