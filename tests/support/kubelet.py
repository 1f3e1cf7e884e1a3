"""Pods of rendered manifests as local processes, probed over gRPC and taken down as the kubelet does.

Each Pod has an address of loopback for its own, so ports are those of the manifests; 0.0.0.0, which in a Pod means its
own addresses, is replaced by it in configuration files.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.manifests import Container, Manifests, Object, arguments, config_files, environment
from tests.support.sandbox import Sandbox

_START_S = 100.0


class Pod:
    """Not ready at first. `on_change` is told whenever it is to get traffic or is not any more."""

    def __init__(
        self,
        name: str,
        ip: str,
        workload: Object,
        manifests: Manifests,
        *,
        folder: Path,
        hosts: Path,
        on_change: Callable[[], None],
        secrets: Mapping[str, Path],
        claims: Mapping[str, Path],
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.ip = ip
        self.labels = workload["spec"]["template"]["metadata"]["labels"]
        self.is_ready = False
        self.ready_since_s = 0.0
        self.is_terminating = False
        # Liveness or startup probes that would have had a container restarted, and containers that ended by themselves.
        self.failures: list[str] = []
        self._folder = folder
        self._sources = secrets, claims
        # In a network namespace of its own a Pod has 0.0.0.0 to itself.
        self._wildcard = "0.0.0.0" if prefix else ip
        self._manifests = manifests
        self._on_change = on_change
        self._pod = workload["spec"]["template"]["spec"]
        self._changed = threading.Condition()
        self._is_over = threading.Event()
        self._ready: dict[str, bool] = {}
        self.containers = [Container(workload, spec) for spec in self._pod["containers"]]
        volumes = {one["name"]: self._materialised(one) for one in self._pod["volumes"]}
        self._sandboxes = [self._sandbox(one, volumes, hosts, prefix) for one in self.containers]

    def start(self) -> None:
        for container, sandbox in zip(self.containers, self._sandboxes, strict=True):
            sandbox.start()
            self._ready[container.role] = False
            threading.Thread(target=self._probe, args=(container, sandbox), daemon=True).start()

    def wait_until_ready(self, timeout_s: float = _START_S) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_ready or self.failures, timeout_s) or self.failures:
                raise RuntimeError(f"{self.name} did not become ready: {self.failures}\n{self.log}")

    def delete(self, *, endpoints_lag_s: float = 0.0) -> list[int]:
        """Its end as a user's `kubectl delete` brings it; the exit codes. `endpoints_lag_s`: so much later than the Pod
        itself, Services hear of it."""
        self.is_terminating = True
        lag = threading.Timer(endpoints_lag_s, self._on_change)
        lag.start()
        # preStop counts as part of the grace period.
        grace_s = self._pod["terminationGracePeriodSeconds"]
        sleeps_s = [
            container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            for container in self.containers
        ]
        threading.Event().wait(max(sleeps_s))
        self._is_over.set()
        for sandbox in self._sandboxes:
            sandbox.terminate()
        codes = [sandbox.stop(grace_s - max(sleeps_s)) for sandbox in self._sandboxes]
        lag.join()
        return codes

    def kill(self) -> None:
        """At once, whatever runs."""
        self._is_over.set()
        for sandbox in self._sandboxes:
            with contextlib.suppress(AttributeError):
                sandbox.stop(0.0)

    @property
    def log(self) -> str:
        return "".join(sandbox.log.read_text() for sandbox in self._sandboxes if sandbox.log.exists())

    def _sandbox(
        self, container: Container, volumes: Mapping[str, Path], hosts: Path, prefix: Sequence[str]
    ) -> Sandbox:
        downward = {"metadata.name": self.name, "status.podIP": self.ip}
        spec = container.spec
        mounts = {
            mount["mountPath"]: (volumes[mount["name"]], not mount.get("readOnly", False))
            for mount in spec["volumeMounts"]
        }
        command = [*spec["command"], *arguments(container, downward)]
        log = self._folder / f"{self.name}-{container.role}.log"
        return Sandbox(command, environment(container, downward), mounts, spec["workingDir"], hosts, log, prefix)

    def _materialised(self, volume: Object) -> Path:
        """The folder that stands for a volume."""
        secrets, claims = self._sources
        if "secret" in volume:
            return secrets[volume["secret"]["secretName"]]
        if "persistentVolumeClaim" in volume:
            return claims[volume["persistentVolumeClaim"]["claimName"]]
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix=f"{self.name}-{volume['name']}-"))
        if "configMap" in volume:
            for name, text in config_files(self._manifests, volume).items():
                (folder / name).write_text(text.replace('"0.0.0.0:', f'"{self._wildcard}:'))
        return folder

    def _probe(self, container: Container, sandbox: Sandbox) -> None:
        """The life of one container's probes: startup until it succeeds once, then readiness and liveness."""
        if not self._passes(container, sandbox, "startupProbe"):
            return
        counts = {"readinessProbe": 0, "livenessProbe": 0}
        for turn in itertools.count():
            for name in counts:
                probe = container.spec[name]
                if turn % probe["periodSeconds"]:
                    continue
                counts[name] = 0 if self._asks(probe) else counts[name] + 1
            readiness, liveness = container.spec["readinessProbe"], container.spec["livenessProbe"]
            if counts["readinessProbe"] in (0, readiness["failureThreshold"]):
                self._is_ready(container.role, not counts["readinessProbe"])
            if counts["livenessProbe"] >= liveness["failureThreshold"]:
                self._failed(f"{container.role} is not live")
            if self._is_over.wait(1.0):
                return
            if sandbox.exit_code is not None:
                self._failed(f"{container.role} ended with {sandbox.exit_code}")
                return

    def _passes(self, container: Container, sandbox: Sandbox, name: str) -> bool:
        probe = container.spec[name]
        for _ in range(probe["failureThreshold"]):
            if sandbox.exit_code is not None:
                self._failed(f"{container.role} ended with {sandbox.exit_code}")
                return False
            if self._asks(probe):
                return True
            if self._is_over.wait(min(probe["periodSeconds"], 1)):
                return False
        self._failed(f"{container.role} did not start")
        return False

    def _asks(self, probe: Object) -> bool:
        target, service = probe["grpc"]["port"], probe["grpc"].get("service", "")
        with grpc.insecure_channel(f"{self.ip}:{target}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe.get("timeoutSeconds", 1))
            except grpc.RpcError:
                return False
            return reply.status == health_pb2.HealthCheckResponse.SERVING

    def _is_ready(self, role: str, ready: bool) -> None:
        self._ready[role] = ready
        whole = all(self._ready.values())
        if whole is not self.is_ready:
            self.is_ready, self.ready_since_s = whole, time.monotonic()
            # Who waits for the Pod finds its Services knowing of it.
            self._on_change()
            with self._changed:
                self._changed.notify_all()

    def _failed(self, why: str) -> None:
        with self._changed:
            self.failures.append(why)
            self._changed.notify_all()
