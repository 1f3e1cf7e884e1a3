"""The three services as real processes on free loopback ports, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.device import TEST_DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent
READY_S = 60.0
STOP_S = 10.0


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Service:
    """One process. Its log is a file, shown when something goes wrong."""

    name: str
    arguments: list[str]
    address: str
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen = field(init=False)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.name, *self.arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        with grpc.insecure_channel(self.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                if self.process.poll() is not None:
                    raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()}")
                with contextlib.suppress(grpc.RpcError):
                    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0, wait_for_ready=True)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    time.sleep(0.02)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name} was not ready within {timeout_s} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """SIGTERM, and its exit code; SIGKILL when that takes too long."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(STOP_S)


@dataclass
class Services:
    """One of each, ready."""

    router: Service
    prefill: Service
    decode: Service


@contextlib.contextmanager
def running_services(
    *,
    prefill_args: Sequence[str] = (),
    decode_args: Sequence[str] = (),
    router_args: Sequence[str] = (),
    prefill_environment: Mapping[str, str] | None = None,
    decode_environment: Mapping[str, str] | None = None,
    ready_s: float = READY_S,
) -> Iterator[Services]:
    """Starts prefill, decode and router, waits until all are ready and have met, and stops them at the end."""
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("prefill_service", "decode_service", "router")}
    extra = {
        "prefill_service": ["--device", TEST_DEVICE, *prefill_args],
        "decode_service": ["--device", TEST_DEVICE, *decode_args],
        # However long the workers take to start, one that is ready has met both: without prefill it would serve, and
        # prompts would be prefilled at decode.
        "router": [
            "--prefill", addresses["prefill_service"], "--decode", addresses["decode_service"],
            "--startup-grace-s", str(2 * ready_s), *router_args,
        ],
    }  # fmt: skip
    environments = {"prefill_service": prefill_environment, "decode_service": decode_environment}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        services = {}
        for name, address in addresses.items():
            arguments = ["--listen", address, "--metrics-listen", "", *extra[name]]
            log = Path(folder) / f"{name}.log"
            service = Service(name, arguments, address, log, environments.get(name) or {})
            service.start()
            stack.callback(service.stop)
            services[name] = service
        for service in services.values():
            service.wait_ready(ready_s)
        yield Services(services["router"], services["prefill_service"], services["decode_service"])
