"""A prefill worker without a model: it commits to a fake decode worker, unless it is told to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc.aio

from common.errors import PdserveError, Unavailable
from pdserve.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from tests.fakes.decode import FakeDecode
from tests.fakes.worker import FakeWorker


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """`decodes`: the fake decode workers by address, in the place of pairs."""

    role = types_pb2.ROLE_PREFILL

    def __init__(self, decodes: Mapping[str, FakeDecode], **identity: object) -> None:
        super().__init__(**identity)
        self._decodes = decodes
        # One is raised by each call, as long as there are any.
        self.failures: list[PdserveError] = []
        # Raised after the commit.
        self.failure_after_commit: PdserveError | None = None
        # While clear, no call commits; or, once it has, none answers.
        self.may_commit = asyncio.Event()
        self.may_commit.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_cached_tokens = 0
        # What happened, for tests to look at.
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.time_remaining_s: float | None = None
        self.num_cut_off = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        super().add_to(server)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> prefill_pb2.PrefillResponse:
        with self._working(request.model_fingerprint):
            self.requests.append(request)
            self.time_remaining_s = context.time_remaining()
            try:
                if self.failures:
                    raise self.failures.pop(0)
                await self.may_commit.wait()
                decode = self._decodes.get(request.pair_endpoint)
                if decode is None:
                    raise Unavailable(f"no decode worker at {request.pair_endpoint}")
                decode.commit(request)
                await self.may_answer.wait()
            except asyncio.CancelledError:
                self.num_cut_off += 1
                raise
            if self.failure_after_commit is not None:
                raise self.failure_after_commit
        return prefill_pb2.PrefillResponse(
            prefill_worker=self.identity.instance_id,
            queue_ms=2.0,
            prefill_ms=3.0,
            kv_transfer_ms=1.5,
            kv_bytes=4096,
            kv_transport="fake",
            num_cached_tokens=self.num_cached_tokens,
        )
