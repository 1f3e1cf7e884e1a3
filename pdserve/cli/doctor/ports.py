"""The default ports of the three services: free, or who answers there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client

from common.address import Address
from common.config import DecodeConfig, PrefillConfig, RouterConfig
from pdserve.cli.doctor.check import Check

TIMEOUT_S = 2.0

_MAX_PAGE_BYTES = 1 << 20
_SERVICES = {
    "router": "pdserve.v1.RouterService",
    "prefill": "pdserve.v1.PrefillService",
    "decode": "pdserve.v1.DecodeService",
}


async def default_ports() -> list[Check]:
    configs = (RouterConfig(), PrefillConfig(), DecodeConfig())
    listen = [grpc_port(config.role, config.listen) for config in configs]
    metrics = [metrics_port(config.role, config.metrics_listen) for config in configs]
    return await asyncio.gather(*listen, *metrics)


async def grpc_port(role: str, address: str) -> Check:
    """Whether a service of that role can listen there, or does already."""
    trouble = _why_not(address)
    holder = await _service_at(address, role) if trouble else ""
    owner = "the router" if role == "router" else f"the {role} worker"
    return _check(address, owner, "--listen", trouble, holder)


async def metrics_port(role: str, address: str) -> Check:
    """The same for its metrics."""
    trouble = _why_not(address)
    holder = await asyncio.to_thread(_page_at, address, role) if trouble else ""
    return _check(address, f"the {role}'s metrics", "--metrics-listen", trouble, holder)


def _check(address: str, owner: str, flag: str, trouble: str, holder: str) -> Check:
    name = f"port {Address.parse(address).port}"
    if trouble and not holder:
        remedy = f"end what holds it, or move {owner} with {flag} HOST:PORT"
        return Check(name, "cpu", "failed", f"{trouble}; it is for {owner}", remedy)
    return Check(name, "cpu", "ok", holder or f"free, for {owner}")


def _why_not(address: str) -> str:
    """Why nothing can listen there; empty when something can."""
    try:
        Address.parse(address).check_free()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        return "another program has it" if taken else str(error.strerror)
    return ""


async def _service_at(address: str, role: str) -> str:
    """Empty when no service of that role answers."""
    try:
        import grpc.aio
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from common import rpc
        from pdserve.access import Access
    except ModuleNotFoundError:  # which has a line of its own in the report
        return ""
    async with rpc.connect(address, Access.from_environment().tls()) as channel:
        request = health_pb2.HealthCheckRequest(service=_SERVICES[role])
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return ""
    ready = response.status == health_pb2.HealthCheckResponse.SERVING
    return f"a pdserve {role} answers, {'ready' if ready else 'not ready'}"


def _page_at(address: str, role: str) -> str:
    """Empty when no metrics of pdserve are there."""
    host, port = Address.parse(address)
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)) as connection:
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read(_MAX_PAGE_BYTES)
        except (OSError, http.client.HTTPException):
            return ""
    return f"metrics of a pdserve {role} answer" if b"pdserve_" in page else ""
