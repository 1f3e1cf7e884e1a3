"""One completion from a message to its end: what every face of the router calls, gRPC and HTTP alike.

Limits, deadlines, the books of what is in flight, access log and metrics are kept here, once. A face turns what came
over its wire into a GenerateRequest, says who asks, and sends what is put out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from common import logs
from common.config import RouterConfig
from common.errors import DeadlineExceeded, Unavailable
from common.identities import Caller
from common.tracing import GENERATE, TRACE_FIELDS, Metadata
from pdserve.v1 import router_pb2
from router.fleet import ServedModel
from router.in_flight import InFlight
from router.intake import Intake
from router.output import Piece
from router.parts import Parts
from router.record import Record
from router.request import Arrival, Request
from router.session import Completed, PutOut, Session


class Generation:
    """An admitted request; runs once, while it is admitted. Cancelling `run` ends the work on every worker."""

    def __init__(self, request: Request, record: Record, parts: Parts) -> None:
        self.request = request
        self._record = record
        self._parts = parts

    async def run(self, put_out: PutOut) -> Completed:
        """Hands every piece of output to `put_out`, which may take its time: meanwhile tokens gather.

        Raises the PdserveError that ends the request.
        """

        async def recorded(piece: Piece) -> None:
            self._record.put_out(piece)
            await put_out(piece)

        completed = await Session(self.request, self._parts, self._record.span).run(recorded)
        self._record.completed(completed)
        return completed


class Generations:
    """Belongs to the event loop."""

    def __init__(self, config: RouterConfig, parts: Parts, in_flight: InFlight) -> None:
        self._config = config
        self._parts = parts
        self._in_flight = in_flight
        self.intake = Intake(parts.tokenizer, model_id=config.model_id, max_prompt_tokens=config.max_prompt_tokens)

    @property
    def num_in_flight(self) -> int:
        """Queued or running, and not over."""
        return len(self._in_flight)

    @property
    def model(self) -> ServedModel:
        """What requests are held against. Raises Unavailable while no decode worker has been met."""
        model = self._parts.fleet.model
        if model is None:
            raise Unavailable("no decode worker has been met yet", retry_after_s=1.0, reason="NO_WORKER")
        return model

    def arrival(self, host: str, caller: Caller | None, *, timeout_s: float | None, metadata: Metadata = ()) -> Arrival:
        """Of a request that has just come in from `host`. `timeout_s` None: max_request_s.

        Of `metadata` the trace is kept and nothing else: a caller's token is in there too.
        """
        trace = tuple((name, value) for name, value in metadata if name in TRACE_FIELDS)
        now_s = self._parts.clock()
        deadline_s = now_s + (self._config.max_request_s if timeout_s is None else timeout_s)
        return Arrival(caller.name if caller and caller.name else host, now_s, deadline_s, caller, trace)

    @contextlib.asynccontextmanager
    async def admitted(self, message: router_pb2.GenerateRequest, arrival: Arrival) -> AsyncIterator[Generation]:
        """In flight from here to the end of the block, which has until the deadline; recorded once it is over.

        Raises what `Intake` and `InFlight` raise, and DeadlineExceeded.
        """
        timeout_s = arrival.deadline_s - self._parts.clock()
        span = self._parts.tracer.serving(GENERATE, arrival.trace, start_s=arrival.received_s)
        record = Record(arrival, self._config, self._parts.metrics, span, self._parts.clock)
        with logs.bound(**span.log_fields), span, record, _as_deadline_exceeded(arrival):
            record.request_id = self.intake.check(message)
            with logs.bound(request_id=record.request_id):
                async with asyncio.timeout(timeout_s), self._in_flight.entry(arrival.client, record.request_id):
                    request = await self.intake.admit(message, self.model, record.request_id, arrival)
                    record.admitted(request)
                    yield Generation(request, record, self._parts)


@contextlib.contextmanager
def _as_deadline_exceeded(arrival: Arrival) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        allowed_s = arrival.deadline_s - arrival.received_s
        raise DeadlineExceeded(f"the request took longer than its {allowed_s:g} s") from None
