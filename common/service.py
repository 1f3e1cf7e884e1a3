"""The life of one service process: configuration, logging, metrics, gRPC with health and reflection, an orderly end.

A service's `__main__` is `main(XConfig, run)`; its `run(config)` builds what the service does and then awaits
`serve(...)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from common import logs, rpc
from common.config import ConfigError, ServiceConfig, load
from common.health import Health
from common.identities import gate_of
from common.metrics import Metrics, exposed
from common.tls import server_credentials_of

log = logging.getLogger(__name__)

# After a drain only calls that watch are left; they get this long to end by themselves.
STOP_GRACE_S = 0.5

C = TypeVar("C", bound=ServiceConfig)


def main(config_class: type[C], run: Callable[[C], Coroutine[Any, Any, None]]) -> None:
    """Runs a service with the flags of this process until SIGTERM or SIGINT.

    What the operator must mend (ConfigError, from here or from `run`) ends it with one line on stderr and exit code 2.
    """
    try:
        config = load(config_class, sys.argv[1:])
        logs.configure(config.log_level, config.log_format, service=config.role, instance=config.instance_id)
        uvloop.run(run(config))
    except ConfigError as error:
        print(f"{config_class.role}: {error}", file=sys.stderr)
        sys.exit(2)


async def serve(
    config: ServiceConfig,
    add_servicers: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    health: Health,
    metrics: Metrics,
    drain: Callable[[], Awaitable[None]],
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and stops. A second signal cuts the drain short.

    `service_names` are the full names of what `add_servicers` adds: they answer health and appear in reflection. When
    `health` becomes ready is the caller's decision; it stops being ready when the end begins. `drain` waits until no
    work is left. Raises ConfigError when one of the configured addresses cannot be listened on.
    """

    def add_all(server: grpc.aio.Server) -> None:
        add_servicers(server)
        health.add_to(server, service_names)
        names = [*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)

    credentials = server_credentials_of(config)
    gate = gate_of(config)
    with _stop_signals() as signals:
        async with contextlib.AsyncExitStack() as stack:
            try:
                stack.enter_context(exposed(metrics, config.metrics_listen))
                share = getattr(config, "reuse_port", False)
                age_s = getattr(config, "max_connection_age_s", 0.0)
                server = rpc.create_server(reuse_port=share, max_connection_age_s=age_s, gate=gate)
                port = await stack.enter_async_context(
                    _listening(server, config.listen, add_all, reuse_port=share, credentials=credentials)
                )
                if config.health_listen:
                    await stack.enter_async_context(
                        _listening(rpc.create_server(), config.health_listen, health.add_to)
                    )
            except OSError as error:
                raise ConfigError(error.strerror or str(error)) from error
            addresses = {"listen": config.listen, "port": port, "metrics": config.metrics_listen}
            log.info("serving", extra=addresses | {"health": config.health_listen})

            await signals.get()
            log.info("stopping: finishing what runs")
            health.set_ready(False)
            await _first_of(drain(), signals.get())
        log.info("stopped")


@contextlib.asynccontextmanager
async def _listening(
    server: grpc.aio.Server,
    address: str,
    add: Callable[[grpc.aio.Server], None],
    *,
    reuse_port: bool = False,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[int]:
    add(server)
    port = rpc.bind(server, address, reuse_port=reuse_port, credentials=credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(STOP_GRACE_S)


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """A queue into which each SIGTERM and SIGINT goes meanwhile."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, queue.put_nowait, one)
    try:
        yield queue
    finally:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)


async def _first_of(*awaitables: Awaitable[Any]) -> None:
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
