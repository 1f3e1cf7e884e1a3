"""The manifests of k8s/ as `kubectl kustomize` renders them, and their parts by name."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.config import DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig, load

ROOT = Path(__file__).resolve().parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("cpu", "one-gpu", "two-gpu", "cluster")
COMPONENTS = ("autoscaling", "model-volume", "monitoring", "mtls", "network-policies")
# With prefill and decode as two containers of one Pod.
PAIR_OVERLAYS = ("one-gpu", "two-gpu")
# Workloads as docs/kubernetes.md updates them: callees before callers.
UPDATE_ORDER = ("decode", "prefill", "router")

Object = dict[str, Any]
_ARGUMENTS = "/spec/template/spec/containers/{}/args"


class Container(NamedTuple):
    """One container of a workload."""

    workload: Object
    spec: Object

    @property
    def pod(self) -> Object:
        """The Pod's spec."""
        return self.workload["spec"]["template"]["spec"]

    @property
    def role(self) -> str:
        return self.spec["name"]

    @property
    def ports(self) -> dict[str, int]:
        """By what they are for (grpc, health, metrics), also where their names have the role as well."""
        return {port["name"].partition("-")[0]: port["containerPort"] for port in self.spec["ports"]}

    @property
    def volumes(self) -> dict[str, Object]:
        """By the path at which the container has them."""
        named = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {mount["mountPath"]: named[mount["name"]] for mount in self.spec["volumeMounts"]}


class Manifests(list[Object]):
    """Every object of one rendering, in order."""

    def named(self, kind: str, name: str) -> Object:
        return next(one for one in self if one["kind"] == kind and one["metadata"]["name"] == name)

    def of_kind(self, *kinds: str) -> list[Object]:
        return [one for one in self if one["kind"] in kinds]

    @property
    def workloads(self) -> list[Object]:
        return self.of_kind("Deployment", "StatefulSet")

    @property
    def containers(self) -> Iterator[Container]:
        for workload in self.workloads:
            for spec in workload["spec"]["template"]["spec"]["containers"]:
                yield Container(workload, spec)

    def container(self, role: str) -> Container:
        return next(one for one in self.containers if one.role == role)

    def selected_by(self, labels: Mapping[str, str]) -> list[Object]:
        """The workloads whose Pods have all of these labels."""
        return [one for one in self.workloads if labels.items() <= pod_labels(one).items()]


def pod_labels(workload: Object) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """As Kubernetes compares a label selector."""
    wanted = all(
        (labels.get(one["key"]) in one["values"]) == (one["operator"] == "In")
        for one in selector.get("matchExpressions", ())
    )
    return wanted and selector.get("matchLabels", {}).items() <= labels.items()


def kubectl() -> str:
    """The one of this environment, or the machine's. Raises FileNotFoundError."""
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("kubectl", path=where)
    if found is None:
        raise FileNotFoundError("there is no kubectl: make install brings one")
    return found


@functools.cache
def render(overlay: str, *components: str, more_arguments: Sequence[tuple[str, int, str]] = ()) -> Manifests:
    """`k8s/<overlay>` with components on top, as a kustomization of a user's own has them. `more_arguments`: name of a
    StatefulSet, index of its container, a flag."""
    with tempfile.TemporaryDirectory() as folder:
        # kustomize takes no absolute paths.
        k8s = os.path.relpath(K8S, Path(folder).resolve())
        own = {
            "namespace": "pdserve",
            "resources": [f"{k8s}/{overlay}"],
            "components": [f"{k8s}/components/{name}" for name in components],
            "patches": [
                {
                    "target": {"kind": "StatefulSet", "name": name},
                    "patch": json.dumps([{"op": "add", "path": _ARGUMENTS.format(index) + "/-", "value": flag}]),
                }
                for name, index, flag in more_arguments
            ],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(own))
        return _rendered(Path(folder))


def _rendered(folder: Path) -> Manifests:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise ValueError(f"kubectl kustomize {folder}: {done.stderr}")
    return Manifests(yaml.safe_load_all(done.stdout))


# What stands for `$(POD_IP)` and the like until there is a Pod.
DOWNWARD = {"metadata.name": "pod-0", "status.podIP": "127.77.0.9"}
CONFIGS: dict[str, type[ServiceConfig]] = {"router": RouterConfig, "prefill": PrefillConfig, "decode": DecodeConfig}


def environment(container: Container, downward: Mapping[str, str] = DOWNWARD) -> dict[str, str]:
    """The variables that the container has; `downward`: by field path."""
    return {
        one["name"]: one["value"] if "value" in one else downward[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in container.spec.get("env", ())
    }


def arguments(container: Container, downward: Mapping[str, str] = DOWNWARD) -> list[str]:
    """Those of its command, each `$(NAME)` replaced by the variable, as the kubelet does. Raises KeyError."""
    variables = environment(container, downward)
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], one) for one in container.spec["args"]]


def config_files(manifests: Manifests, volume: Object) -> dict[str, str]:
    """The files of a volume that is a ConfigMap, by name."""
    return manifests.named("ConfigMap", volume["configMap"]["name"])["data"]


def configuration(manifests: Manifests, role: str) -> Any:
    """What the service itself makes of its arguments and of the file among them. Raises ConfigError."""
    container = manifests.container(role)
    argv = arguments(container)
    with tempfile.TemporaryDirectory() as folder:
        for path, volume in container.volumes.items():
            if "configMap" in volume:
                for name, text in config_files(manifests, volume).items():
                    (Path(folder) / name).write_text(text)
                    argv = [one.replace(f"{path}/{name}", f"{folder}/{name}") for one in argv]
        return load(CONFIGS[role], argv)
