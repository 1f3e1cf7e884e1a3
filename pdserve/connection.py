"""One service process as a client meets it: a channel, readiness, and failures as `common.errors` classes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors, rpc
from pdserve.access import Access

RETRY_S = 0.1


class Connection:
    """A channel to HOST:PORT, closed at the end of `async with` or by `close`. Dials on the first call, and again after
    a loss; where a name leads to several addresses, calls take turns over them."""

    def __init__(self, target: str, *, access: Access | None = None) -> None:
        """`access`: what to show and believe; None: what the environment says (`Access.from_environment`).

        Raises ConfigError for what cannot be used, or would send a token in plaintext.
        """
        self.target = target
        self._access = Access.from_environment() if access is None else access
        # Goes with every call.
        self.metadata = self._access.metadata_for(target)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is under way. Nothing can be called afterwards."""
        await self.channel.close()

    @functools.cached_property
    def channel(self) -> grpc.aio.Channel:
        # Made by the first call: it belongs to the event loop that runs then.
        return rpc.connect(self.target, self._access.tls(), round_robin=True)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once the process answers health and is ready for work.

        Raises:
            Unavailable: it was not within `timeout_s`; the message says whether anything answered.
            FailedPrecondition: what listens there does not serve grpc.health.v1.
        """
        seen = "nothing answered"
        watch = health_pb2_grpc.HealthStub(self.channel).Watch
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    call = watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                    try:
                        with self.failures():
                            async for response in call:
                                if response.status == health_pb2.HealthCheckResponse.SERVING:
                                    return
                                seen = "it is up, but not ready"
                    except errors.Unavailable:
                        seen = "it went away again"
                    finally:
                        call.cancel()
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            message = f"{self.target} was not ready within {timeout_s:g} s: {seen}"
            raise errors.Unavailable(message, reason="NOT_READY") from None

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Around a call: what the service raised is raised here, and trouble on the way to it says so.

        Raises:
            Unavailable: with reason UNREACHABLE when the service never answered or the connection was lost.
            FailedPrecondition: with reason WRONG_SERVICE when what listens there does not know the call.
            PdserveError: whatever else the service raised.
        """
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, error: grpc.aio.AioRpcError) -> errors.PdserveError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            message = f"{self.target} does not serve this call ({details}); is it the address of another service?"
            return errors.FailedPrecondition(message, reason="WRONG_SERVICE")
        if code is grpc.StatusCode.UNAVAILABLE and not _from_a_service(error):
            # gRPC wraps it: "failed to connect to all addresses; last error: UNKNOWN: ipv4:…: Connection refused".
            _, wrapped, last = details.rpartition("last error: ")
            # … and a failed handshake ends with the outcome of something else, "OK".
            cause = last.removesuffix(": OK").rpartition(": ")[2] if wrapped else details
            return errors.Unavailable(f"no connection to {self.target}: {cause}", reason="UNREACHABLE")
        return errors.from_rpc_error(error)


def _from_a_service(error: grpc.aio.AioRpcError) -> bool:
    """Every status of a pdserve service carries details; one that gRPC makes up on this side has none."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
