"""What an operator asks one worker directly: its pipeline's statistics and mode, and to leave service."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from common import errors
from pdserve.connection import Connection
from pdserve.results import PipelineStats, pipeline_stats_from_proto
from pdserve.v1 import decode_pb2, decode_pb2_grpc, worker_pb2, worker_pb2_grpc

LOOKUP_TIMEOUT_S = 10.0
# A new pair of SM partitions is made and checked in between.
CONFIGURE_TIMEOUT_S = 60.0
# A drain without a deadline takes the worker's own, which the worker bounds.
DRAIN_TIMEOUT_S = 3600.0
# What a worker may take to report the end of a drain whose deadline has passed.
DRAIN_MARGIN_S = 10.0


class DrainProgress(NamedTuple):
    """How many requests the worker still works on; `done` on the last one."""

    num_remaining: int
    done: bool


class WorkerClient(Connection):
    """One worker (HOST:PORT), used inside `async with`."""

    async def get_pipeline_stats(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> PipelineStats:
        """Decode workers alone. Raises FailedPrecondition for any other service."""
        stub = decode_pb2_grpc.DecodeServiceStub(self.channel)
        request = decode_pb2.GetPipelineStatsRequest()
        with self.failures():
            stats = await stub.GetPipelineStats(request, timeout=timeout_s, metadata=self.metadata)
            return pipeline_stats_from_proto(stats)

    async def set_pipeline(
        self,
        *,
        mode: str | None = None,
        cut: str | None = None,
        attention_sm: int | None = None,
        ffn_sm: int | None = None,
        profiling: bool | None = None,
        timeout_s: float = CONFIGURE_TIMEOUT_S,
    ) -> PipelineStats:
        """Changes what is given between two steps; running requests lose no token. Decode workers alone.

        `mode` is auto, static or disabled; `cut`, of static, is layer or attention-core.

        Raises:
            FailedPrecondition: static cannot be run there; its reason says why.
            InvalidArgument: there is no such mode or cut, or a number of SMs is 0.
        """
        request = decode_pb2.SetPipelineRequest(
            decode_pipeline_cut=cut, decode_attention_sm=attention_sm, decode_ffn_sm=ffn_sm
        )
        if profiling is not None:
            request.decode_pipeline_profiling = profiling
        if mode is not None:
            try:
                request.mode = decode_pb2.PipelineMode.Value(f"PIPELINE_MODE_{mode.upper()}")
            except ValueError:
                names = "'auto', 'static' or 'disabled'"
                raise errors.InvalidArgument(f"{mode!r}, not {names}", field="mode") from None
        stub = decode_pb2_grpc.DecodeServiceStub(self.channel)
        with self.failures():
            response = await stub.SetPipeline(request, timeout=timeout_s, metadata=self.metadata)
            return pipeline_stats_from_proto(response.stats)

    async def drain(self, deadline_s: float | None = None) -> AsyncGenerator[DrainProgress, None]:
        """Takes the worker out of service and follows until nothing is left.

        After `deadline_s` (the worker's own when None) the worker ends what is left. The drain goes on when this
        iterator is closed; a second call joins it.

        Raises:
            Unavailable: the worker is gone before it was done.
        """
        stub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        timeout_s = DRAIN_TIMEOUT_S if deadline_s is None else deadline_s + DRAIN_MARGIN_S
        request = worker_pb2.DrainRequest(deadline_s=deadline_s)
        call = stub.Drain(request, timeout=timeout_s, metadata=self.metadata)
        try:
            with self.failures():
                async for message in call:
                    yield DrainProgress(message.num_remaining, message.done)
                    if message.done:
                        return
        finally:
            call.cancel()
        raise errors.Unavailable(f"{self.target} ended the stream before it was drained", reason="NOT_DRAINED")
