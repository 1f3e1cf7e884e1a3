"""How every gRPC channel and server of the system is made, and how its errors cross the wire.

A dead or stopped peer is noticed by both ends within 2 s (keepalive). A handler raises PdserveError and the caller
sees its status with google.rpc details; `translate()` turns it back into the same class. `common.service` runs a
whole service on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from common import errors
from common.address import Address
from common.identities import Gate
from common.tls import Tls

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 8 * 2**10
# A router has one connection to each worker.
MAX_CALLS_PER_CONNECTION = 8192

# Keepalive of 500 ms + 1000 ms: a machine whose cores are all taken for most of a second breaks no stream. Without
# http2.ping_timeout_ms the server side still waits a minute; without the server's minimum ping interval, idle streams
# are killed for "too_many_pings".
_BOTH_ENDS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    # A peer that comes back is met within a second, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 2000),  # despite its name: how long one attempt to connect may take
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
]

_ROUND_ROBIN: list[tuple[str, int | str]] = [
    ("grpc.lb_policy_name", "round_robin"),
    # Whenever an address is lost the name is looked up again, within this and not within gRPC's half minute.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_BOTH_ENDS,
    # Soft and hard limit of a call's metadata; beyond it gRPC answers RESOURCE_EXHAUSTED by itself.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


def connect(target: str, tls: Tls | None = None, *, round_robin: bool = False) -> grpc.aio.Channel:
    """A channel to HOST:PORT, plaintext without `tls`. Connects on first use and again whenever the peer is back.

    With `round_robin` calls take turns over all addresses that a name leads to. It keeps the certificates that it is
    made with.
    """
    options: list[tuple[str, int | str]] = [*CHANNEL_OPTIONS]
    if round_robin:
        options += _ROUND_ROBIN
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=options)


def create_server(
    *, reuse_port: bool = False, max_connection_age_s: float = 0.0, gate: Gate | None = None
) -> grpc.aio.Server:
    """A server whose handlers raise PdserveError, and are called by whom `gate` lets in (None: anybody).

    With `reuse_port` several processes may share one port. From `max_connection_age_s` on (0: never) a connection takes
    no new call, its client makes another by itself, and the calls on it go on: none is lost, as some would be by
    stopping the server.
    """
    options = dict(SERVER_OPTIONS) | {"grpc.so_reuseport": int(reuse_port)}
    if max_connection_age_s:
        options["grpc.max_connection_age_ms"] = math.ceil(1000 * max_connection_age_s)
    return grpc.aio.server(interceptors=[GuardInterceptor(gate)], options=list(options.items()))


def bind(
    server: grpc.aio.Server,
    address: str,
    *,
    reuse_port: bool = False,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Makes `server` listen on HOST:PORT and returns the port (of interest when 0 was asked for). Plaintext without
    `credentials`.

    Raises OSError naming the address and the reason, such as "Address already in use".
    """
    Address.parse(address).check_free(reuse_port=reuse_port)
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error


def time_remaining(context: grpc.aio.ServicerContext) -> float | None:
    """Seconds until the caller's deadline, never below 0. None when the caller set none."""
    return context.time_remaining()


@contextlib.contextmanager
def translate() -> Iterator[None]:
    """Around a call to a service: its failure is raised as the PdserveError that the service raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise errors.from_rpc_error(error) from error
    except asyncio.CancelledError as error:
        if _is_cancelled_itself():
            raise
        # Some methods of a call raise this when the other side ended it as CANCELLED.
        raise errors.Cancelled("the other side cancelled the call") from error


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Lets the gate have its say, and gives every failure of a handler the status it deserves; UNKNOWN is never one.

    PdserveError: its own status and details; a task group's error counts as the first one in it. A request that does
    not parse: INVALID_ARGUMENT. Anything else is a bug: INTERNAL, and the traceback is logged. Responses of an async
    generator are written from here, so that the generator is closed, and its `finally` has run, by the time that the
    call is over.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else _guard(handler, handler_call_details.method, self._gate)


def _guard(handler: grpc.RpcMethodHandler, method: str, gate: Gate | None) -> grpc.RpcMethodHandler:
    behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    serialize = handler.response_serializer

    def parse(raw: bytes) -> Any:
        try:
            return handler.request_deserializer(raw)
        except Exception as error:
            raise errors.InvalidArgument(
                f"the request to {method} does not parse: {error}", reason="MALFORMED_MESSAGE"
            ) from error

    def request_of(received: Any) -> Any:
        # A stream parses message by message, inside the handler; gRPC would parse a single request before the guard.
        return received if handler.request_streaming else parse(received)

    async def respond(received: Any, context: grpc.aio.ServicerContext) -> bytes:
        async with _failures_become_statuses(method, context):
            if gate is not None:
                gate.admit(method, context)
            return serialize(await behavior(request_of(received), context))

    async def respond_stream(received: Any, context: grpc.aio.ServicerContext) -> None:
        async with _failures_become_statuses(method, context):
            if gate is not None:
                gate.admit(method, context)
            if not inspect.isasyncgenfunction(behavior):
                await behavior(request_of(received), context)
                return
            async with contextlib.aclosing(behavior(request_of(received), context)) as responses:
                async for response in responses:
                    await context.write(response)

    deserializer = parse if handler.request_streaming else None
    if handler.response_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(respond_stream, deserializer, serialize)
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(respond, deserializer, None)


@contextlib.asynccontextmanager
async def _failures_become_statuses(method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except asyncio.CancelledError as error:
        if _is_cancelled_itself():
            raise
        # The call itself goes on: a task that the handler awaited was cancelled. Let through, the client would wait
        # for ever.
        await _abort(method, context, error)
    except Exception as error:
        await _abort(method, context, error)


async def _abort(method: str, context: grpc.aio.ServicerContext, error: BaseException) -> None:
    while isinstance(error, BaseExceptionGroup):
        _, bugs = error.split(errors.PdserveError)
        if bugs is not None:
            break
        error = error.exceptions[0]
    if not isinstance(error, errors.PdserveError):
        log.error("bug in %s", method, exc_info=error)
    await context.abort_with_status(errors.to_status(error))


def _is_cancelled_itself() -> bool:
    """Tells the cancellation of the running task from that of something it awaits."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
