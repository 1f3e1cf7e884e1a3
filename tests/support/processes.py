"""The services as real processes on free loopback ports, one of each or many, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.device import TEST_DEVICE
from tests.support.network import Host

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
    # Where it runs, when not on this machine's own network.
    host: Host | None = None
    process: subprocess.Popen = field(init=False)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(self.host.command if self.host else ()), sys.executable, "-m", self.name, *self.arguments],
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

    def kill(self) -> None:
        """SIGKILL; the address is free afterwards, and `start` begins anew there."""
        self.process.kill()
        self.process.wait(STOP_S)


@dataclass
class Services:
    """One of each, ready."""

    router: Service
    prefill: Service
    decode: Service


@dataclass
class Cluster:
    """Many of each, ready. Workers are called prefill-0, decode-1 and so on."""

    routers: list[Service]
    prefills: list[Service]
    decodes: list[Service]

    @property
    def workers(self) -> list[Service]:
        return [*self.prefills, *self.decodes]

    def restore(self) -> None:
        """Starts whoever has ended again, and waits until it is ready."""
        ended = [one for one in (*self.workers, *self.routers) if one.process.poll() is not None]
        for service in ended:
            service.start()
        for service in ended:
            service.wait_ready()

    def named(self, instance_id: str) -> Service:
        """The worker that a serving path names so."""
        role, _, index = instance_id.partition("-")
        return {"prefill": self.prefills, "decode": self.decodes}[role][int(index)]


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
    with _starting() as start:
        device = ("--device", TEST_DEVICE)
        prefill = start("prefill_service", *device, *prefill_args, environment=prefill_environment)
        decode = start("decode_service", *device, *decode_args, environment=decode_environment)
        # However long the workers take to start, a router that is ready has met both: without prefill it would serve,
        # and prompts would be prefilled at decode.
        grace = ("--startup-grace-s", str(2 * ready_s))
        # Where a prompt is computed is not to depend on what was measured of this machine.
        way = ("--local-prefill", "never")
        router = start("router", "--prefill", prefill.address, "--decode", decode.address, *grace, *way, *router_args)
        for service in (prefill, decode, router):
            service.wait_ready(ready_s)
        yield Services(router, prefill, decode)


@contextlib.contextmanager
def running_cluster(
    *,
    num_prefill: int = 2,
    num_decode: int = 2,
    num_routers: int = 1,
    worker_args: Sequence[str] = (),
    decode_args: Sequence[str] = (),
    router_args: Sequence[str] = (),
    hosts: Sequence[Host] = (),
    ready_s: float = READY_S,
) -> Iterator[Cluster]:
    """Starts as many of each, waits until all are ready, and stops them at the end.

    With `hosts` each process has one of its own, in the order prefill, decode, routers.
    """
    with _starting(hosts) as start:

        def workers(role: str, count: int, *arguments: str) -> list[Service]:
            shared = ("--device", TEST_DEVICE, "--num-threads", "1", *worker_args, *arguments)
            return [start(f"{role}_service", "--instance-id", f"{role}-{n}", *shared) for n in range(count)]

        prefills, decodes = workers("prefill", num_prefill), workers("decode", num_decode, *decode_args)
        known = [flag for one in prefills for flag in ("--prefill", one.address)]
        known += [flag for one in decodes for flag in ("--decode", one.address)]
        routers = [start("router", "--instance-id", f"router-{n}", *known, *router_args) for n in range(num_routers)]
        for service in (*prefills, *decodes, *routers):
            service.wait_ready(ready_s)
        yield Cluster(routers, prefills, decodes)


Start = Callable[..., Service]


@contextlib.contextmanager
def _starting(hosts: Sequence[Host] = ()) -> Iterator[Start]:
    """`start(name, *arguments, environment=None)` starts a service, which is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        count = itertools.count()

        def start(name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Service:
            number = next(count)
            host = hosts[number] if hosts else None
            address = f"{host.ip}:50050" if host else f"127.0.0.1:{free_port()}"
            listen = ["--listen", address, "--metrics-listen", ""]
            if host and name != "router":
                listen += ["--kv-interface", host.ip]
            log = Path(folder) / f"{name}-{number}.log"
            service = Service(name, [*listen, *arguments], address, log, environment or {}, host)
            service.start()
            stack.callback(service.stop)
            return service

        yield start
