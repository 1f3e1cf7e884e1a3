"""A cluster of one machine for rendered manifests: Pods by `kubelet`, Services, names, and updates as by controllers.

Names of Services stand in a hosts file that every Pod has, and are as new as it: DNS here keeps nothing. A Service with
an address of its own hands each new connection to a Pod that is ready, and leaves those that stand alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.kubelet import Pod
from tests.support.manifests import Manifests, Object
from tests.support.network import Host

# How long cluster DNS keeps an answer; the manifests reckon with it.
DNS_S = 30
# How long after a Pod has begun to end Services still send connections there.
ENDPOINTS_LAG_S = 2.0
_HOSTS_BYTES = 2**14


class Kubernetes:
    """Runs what is `apply`d to it, inside `with`."""

    def __init__(
        self,
        *,
        secrets: Mapping[str, Path] | None = None,
        claims: Mapping[str, Path] | None = None,
        hosts: Sequence[Host] = (),
    ) -> None:
        """`secrets`, `claims`: the folders that stand for Secrets and PersistentVolumeClaims, by name. `hosts`: a
        network namespace for each Pod, in the order in which they are made."""
        self._sources = {"secrets": secrets or {}, "claims": claims or {}}
        self._manifests = Manifests()
        self._numbers = itertools.count(1)
        self._networks = iter(hosts)
        # By workload, in the order of their ordinals.
        self.pods: dict[str, list[Pod]] = {}
        self._leaving: list[threading.Thread] = []
        self.exit_codes: list[int] = []
        self.failures: list[str] = []
        self._proxies: dict[str, _Proxy] = {}
        self._hosts_lock = threading.Lock()

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._hosts = self._folder / "hosts"
        self._hosts.write_bytes(b"\n" * _HOSTS_BYTES)
        self._stack.callback(self._kill_all)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def apply(
        self,
        manifests: Manifests,
        *,
        replicas: Mapping[str, int] | None = None,
        before_start: Callable[[list[Pod]], None] = lambda pods: None,
    ) -> None:
        """Everything, from nothing; returns when every Pod is ready. `replicas`: others than the manifests'."""
        self._manifests = manifests
        for service in manifests.of_kind("Service"):
            if service["spec"].get("clusterIP") != "None":
                [port] = service["spec"]["ports"]
                proxy = _Proxy(
                    f"127.78.0.{len(self._proxies) + 1}", port["port"], lambda one=service: self._targets(one)
                )
                self._proxies[service["metadata"]["name"]] = self._stack.enter_context(proxy)
        for workload in manifests.workloads:
            name = workload["metadata"]["name"]
            count = (replicas or {}).get(name, workload["spec"].get("replicas", 1))
            self.pods[name] = [self._pod(workload, ordinal) for ordinal in range(count)]
        before_start(list(self.all_pods))
        for pod in self.all_pods:
            pod.start()
        # Routers wait for workers, so of a worker that fails it is told first.
        for pod in sorted(self.all_pods, key=lambda pod: pod.name.startswith("router")):
            pod.wait_until_ready()

    def address(self, service: str) -> str:
        """HOST:PORT of a Service that has an address of its own."""
        proxy = self._proxies[service]
        return f"{proxy.ip}:{proxy.port}"

    def update(self, manifests: Manifests, workload_name: str) -> None:
        """One workload to what `manifests` say, as its controller goes about it; what leaves may go on leaving."""
        self._manifests = manifests
        workload = next(one for one in manifests.workloads if one["metadata"]["name"] == workload_name)
        pods = self.pods[workload_name]
        spec = workload["spec"]
        if workload["kind"] == "StatefulSet":
            # From the last, one at a time, each at its place.
            for ordinal in reversed(range(len(pods))):
                _wait_until_available(pods, spec["minReadySeconds"] - DNS_S)
                self._end(pods[ordinal])
                pods[ordinal] = self._pod(workload, ordinal)
                pods[ordinal].start()
                pods[ordinal].wait_until_ready()
            _wait_until_available(pods, spec["minReadySeconds"] - DNS_S)
            return
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        for ordinal, old in enumerate(list(pods)):
            new = self._pod(workload, ordinal)
            pods.append(new)
            new.start()
            new.wait_until_ready()
            # From here on it is no longer this controller's.
            ending = threading.Thread(target=self._end, args=(old,))
            ending.start()
            self._leaving.append(ending)
        for ending in self._leaving:
            ending.join()
        pods[:] = [one for one in pods if not one.is_terminating]

    @property
    def all_pods(self) -> Iterator[Pod]:
        return itertools.chain.from_iterable(list(pods) for pods in list(self.pods.values()))

    def _pod(self, workload: Object, ordinal: int) -> Pod:
        number = next(self._numbers)
        host = next(self._networks, None)
        suffix = f"{ordinal}" if workload["kind"] == "StatefulSet" else f"{number:05x}"
        return Pod(
            f"{workload['metadata']['name']}-{suffix}",
            host.ip if host else f"127.77.0.{number}",
            workload,
            self._manifests,
            folder=self._folder,
            hosts=self._hosts,
            on_change=self._write_hosts,
            prefix=host.command if host else (),
            **self._sources,
        )

    def _end(self, pod: Pod) -> None:
        self.exit_codes += pod.delete(endpoints_lag_s=ENDPOINTS_LAG_S)
        self.failures += pod.failures

    def _kill_all(self) -> None:
        for pod in self.all_pods:
            pod.kill()

    def _backends(self, service: Object) -> list[Pod]:
        """The Pods that traffic for a Service goes to."""
        selector, wants_all = service["spec"]["selector"], service["spec"].get("publishNotReadyAddresses", False)
        chosen = [pod for pod in self.all_pods if selector.items() <= pod.labels.items()]
        return [pod for pod in chosen if wants_all or (pod.is_ready and not pod.is_terminating)]

    def _targets(self, service: Object) -> list[tuple[str, int]]:
        [port] = service["spec"]["ports"]
        return [
            (pod.ip, named["containerPort"])
            for pod in self._backends(service)
            for container in pod.containers
            for named in container.spec["ports"]
            if named["name"] == port["targetPort"]
        ]

    def _write_hosts(self) -> None:
        """In place and at one go: Pods have the file itself, and read it at any time."""
        with self._hosts_lock:
            lines = ["127.0.0.1 localhost"]
            for service in self._manifests.of_kind("Service"):
                name = service["metadata"]["name"]
                names = f"{name} {name}.pdserve {name}.pdserve.svc {name}.pdserve.svc.cluster.local"
                ips = [self._proxies[name].ip] if name in self._proxies else [one.ip for one in self._backends(service)]
                lines += [f"{ip} {names}" for ip in ips]
            text = ("\n".join(lines) + "\n").encode().ljust(_HOSTS_BYTES, b"\n")
            with self._hosts.open("r+b") as file:
                os.pwrite(file.fileno(), text, 0)
        for proxy in self._proxies.values():
            proxy.refresh()


def _wait_until_available(pods: Sequence[Pod], min_ready_s: float) -> None:
    """Until each has been ready for so long."""
    time.sleep(max(0.0, *(pod.ready_since_s + min_ready_s - time.monotonic() for pod in pods)))


class _Proxy:
    """One address of a Service: a connection goes to one of the targets and stays there."""

    def __init__(self, ip: str, port: int, look_up: Callable[[], list[tuple[str, int]]]) -> None:
        self.ip = ip
        self.port = port
        self._look_up = look_up
        # What is known here, as of the latest `refresh`.
        self._targets: list[tuple[str, int]] = []
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def refresh(self) -> None:
        self._targets = self._look_up()

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, self.ip, self.port), self._loop)
        self._server = started.result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            targets = self._targets
            if not targets:
                return
            there, back = await asyncio.open_connection(*targets[next(self._turn) % len(targets)])
            with contextlib.closing(back):
                # Either side's end is the end: HTTP/2 knows no half of a connection.
                tasks = [asyncio.ensure_future(_pump(reader, back)), asyncio.ensure_future(_pump(there, writer))]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
