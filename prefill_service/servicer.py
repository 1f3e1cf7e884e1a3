"""PrefillService: protobuf in, one engine task, protobuf out."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc.aio

from common.address import Address
from common.admission import admit
from common.clock import Clock
from common.errors import Cancelled, InvalidArgument, PdserveError
from common.tracing import PREFILL, Span, Tracer
from common.transport.messages import AttemptKey
from common.worker import WorkerFront
from pdserve.v1 import prefill_pb2, prefill_pb2_grpc
from prefill_service.engine import PrefillEngine, PrefillResult, Task
from prefill_service.pairs import PairRegistry
from prefill_service.scheduler import Job
from prefill_service.stages import record_stages


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One handler a prompt: from the request to decode's last acknowledgement."""

    def __init__(
        self,
        engine: PrefillEngine,
        pairs: PairRegistry,
        front: WorkerFront,
        *,
        block_size: int,
        pair_connect_s: float,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._pairs = pairs
        self._front = front
        self._block_size = block_size
        self._pair_connect_s = pair_connect_s
        self._tracer = tracer
        self._clock = clock
        self._loop = asyncio.get_running_loop()

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> prefill_pb2.PrefillResponse:
        with self._tracer.serving(PREFILL, context.invocation_metadata() or ()) as span:
            span.set(request_id=request.request_id, attempt=request.attempt, worker=self._front.identity.instance_id)
            return await self._prefill(request, context, span)

    async def _prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext, span: Span
    ) -> prefill_pb2.PrefillResponse:
        sequence = admit(request, context, self._front.identity, self._clock)
        self._check(request)
        done: asyncio.Future[PrefillResult] = self._loop.create_future()
        task: Task | None = None

        def evict(error: PdserveError) -> None:
            if not done.done():
                done.set_exception(error)

        with self._front.call(evict):
            try:
                remaining_s = sequence.request.deadline_s - self._clock()
                with span.child("connect"):
                    pair = await self._pairs.acquire(
                        request.pair_endpoint, timeout_s=min(self._pair_connect_s, remaining_s)
                    )
                job = Job(sequence, num_remote_cached_tokens=request.num_cached_tokens)
                key = AttemptKey(request.reservation, request.attempt)
                task = Task(job, key, pair, partial(self._tell, done))
                self._engine.submit_task(task)
                result = await done
            except BaseException as error:
                if task is not None:
                    record_stages(span, task.job, self._clock(), error)
                    self._engine.cancel(
                        task, error if isinstance(error, PdserveError) else Cancelled("the caller left")
                    )
                raise
            finally:
                done.cancel()
            record_stages(span, job, self._clock(), result, transport=pair.transport)
        return prefill_pb2.PrefillResponse(
            prefill_worker=self._front.identity.instance_id, kv_transport=pair.transport, **result._asdict()
        )

    def _tell(self, done: asyncio.Future[PrefillResult], outcome: PrefillResult | PdserveError) -> None:
        """Called from the engine thread."""
        self._loop.call_soon_threadsafe(_resolve, done, outcome)

    def _check(self, request: prefill_pb2.PrefillRequest) -> None:
        cached, num_tokens = request.num_cached_tokens, len(request.token_ids.ids)
        if cached > num_tokens or cached % self._block_size:
            raise InvalidArgument(
                f"num_cached_tokens {cached} is not a multiple of the block size {self._block_size} up to {num_tokens}",
                field="num_cached_tokens",
            )
        if not request.attempt:
            raise InvalidArgument("attempts count from 1", field="attempt")
        try:
            Address.parse(request.pair_endpoint)
        except ValueError as error:
            raise InvalidArgument(f"{request.pair_endpoint!r}: {error}", field="pair_endpoint") from None


def _resolve(done: asyncio.Future[PrefillResult], outcome: PrefillResult | PdserveError) -> None:
    if done.done():
        return
    if isinstance(outcome, PdserveError):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
