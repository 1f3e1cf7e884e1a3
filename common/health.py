"""grpc.health.v1 for one process: may it be given work, and does it still make progress.

`""` and each of the process's services answer readiness; `liveness` answers scheduler progress, without which nothing
is ready. Neither depends on another worker. The servicer is our own because the library's `Watch` holds its lock while
it writes: one slow watcher would hold up every change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors

LIVENESS = "liveness"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Starts not ready and live. The setters belong to the event loop's thread (elsewhere: `call_soon_threadsafe`)."""

    def __init__(self) -> None:
        self.is_ready = False
        self.is_live = True
        self._ready_names = {""}
        self._changed = asyncio.Event()

    def add_to(self, server: grpc.aio.Server, service_names: Iterable[str] = ()) -> None:
        """Serves health on `server`; `service_names` (full names) answer readiness. May be added to several servers."""
        self._ready_names.update(service_names)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set_ready(self, ready: bool) -> None:
        self.is_ready = ready
        self._wake_watchers()

    def set_live(self, live: bool) -> None:
        self.is_live = live
        self._wake_watchers()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == SERVICE_UNKNOWN:
            known = ", ".join(sorted({*self._ready_names, LIVENESS} - {""}))
            raise errors.NotFound(f"no service {request.service!r} here; there are: {known}", field="service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last_sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last_sent:
                last_sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service == LIVENESS:
            return SERVING if self.is_live else NOT_SERVING
        if service in self._ready_names:
            return SERVING if self.is_ready and self.is_live else NOT_SERVING
        return SERVICE_UNKNOWN

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
