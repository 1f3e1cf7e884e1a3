"""Listens for HTTP, beside the router's gRPC and in the same event loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from common.address import Address
from common.config import ConfigError, RouterConfig
from common.identities import gate_of
from common.tls import server_context_of
from router.http.api import Api
from router.http.app import build
from router.router import Router

log = logging.getLogger(__name__)

MAX_HEADERS, MAX_HEADER_BYTES, MAX_LINE_BYTES = 64, 8 * 2**10, 8 * 2**10
# A connection on which nothing is asked, from its beginning on.
IDLE_S = 75.0
# After a drain only the ends of replies are left.
STOP_GRACE_S = 2.0


@contextlib.asynccontextmanager
async def listening(config: RouterConfig, router: Router) -> AsyncIterator[int]:
    """Serves meanwhile at `http_listen`; the port. A reply that is under way at the end is broken off.

    Raises ConfigError.
    """
    address = Address.parse(config.http_listen)
    gate = gate_of(config, listen=config.http_listen)
    runner = web.AppRunner(
        build(Api(config, router, gate), router.metrics),
        handle_signals=False,
        # A caller that leaves ends its handler, and so the work on every worker.
        handler_cancellation=True,
        access_log=None,
        logger=_silent(),
        keepalive_timeout=IDLE_S,
        shutdown_timeout=STOP_GRACE_S,
        # Bodies that grow are refused.
        auto_decompress=False,
        max_headers=MAX_HEADERS,
        max_field_size=MAX_HEADER_BYTES,
        max_line_size=MAX_LINE_BYTES,
    )
    await runner.setup()
    try:
        try:
            address.check_free(reuse_port=config.reuse_port)
            site = web.TCPSite(
                runner,
                address.host,
                address.port,
                ssl_context=server_context_of(config),
                reuse_port=config.reuse_port or None,
            )
            await site.start()
        except OSError as error:
            raise ConfigError(f"http_listen={config.http_listen!r}: {error.strerror or error}") from error
        port = runner.addresses[0][1]
        log.info("serving HTTP", extra={"http_listen": config.http_listen, "port": port})
        yield port
    finally:
        await runner.cleanup()


def _silent() -> logging.Logger:
    """For aiohttp, which logs a traceback for whatever a stranger sends that is not HTTP. Bugs are logged elsewhere."""
    logger = logging.getLogger("aiohttp.server")
    logger.setLevel(logging.CRITICAL)
    return logger
