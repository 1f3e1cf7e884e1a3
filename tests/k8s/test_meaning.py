"""What the manifests say fits what the services do: ports, names, probes, times, rights, room."""

from __future__ import annotations

import re

import pytest

from common.address import Address
from common.health import LIVENESS
from tests.support.manifests import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    PAIR_OVERLAYS,
    ROOT,
    UPDATE_ORDER,
    Container,
    Manifests,
    configuration,
    pod_labels,
    render,
)

# How long cluster DNS may keep an answer, and a Service a Pod that is about to end, in seconds.
DNS_S = 30
ENDPOINT_S = 5
ROLES = ("router", "prefill", "decode")
MODULES = {"router": "router", "prefill": "prefill_service", "decode": "decode_service"}


@pytest.fixture(params=[*OVERLAYS, "everything"])
def manifests(request) -> Manifests:
    if request.param == "everything":
        return render("overlays/cluster", *(one for one in COMPONENTS if one != "model-volume"))
    return render(f"overlays/{request.param}")


def prestop_s(container: Container) -> int:
    return container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)


def gib(quantity: str) -> float:
    return float(quantity[:-2]) / {"Mi": 1024, "Gi": 1}[quantity[-2:]]


def cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


@pytest.mark.parametrize("role", ROLES)
def test_each_service_listens_where_its_container_says(manifests, role):
    config, container = configuration(manifests, role), manifests.container(role)
    listens = {"grpc": config.listen, "health": config.health_listen, "metrics": config.metrics_listen}
    assert {name: Address.parse(where).port for name, where in listens.items()} == container.ports
    assert {Address.parse(where).host for where in listens.values()} == {"0.0.0.0"}
    assert container.spec["command"] == ["python", "-m", MODULES[role]]
    assert container.spec["image"] == ("pdserve-router" if role == "router" else "pdserve-worker")
    assert container.spec["workingDir"] == "/app"


def test_containers_of_one_pod_share_its_ports_and_have_names_of_their_own(manifests):
    ids = [configuration(manifests, role).instance_id for role in ROLES]
    for workload in manifests.workloads:
        containers = [one for one in manifests.containers if one.workload is workload]
        numbers = [port for one in containers for port in one.ports.values()]
        names = [port["name"] for one in containers for port in one.spec["ports"]]
        assert len(set(numbers)) == len(numbers) == len(set(names))
        assert all(len(name) <= 15 for name in names)
        own = {configuration(manifests, one.role).instance_id for one in containers}
        # The Pod's name alone, or with the role where a Pod has two.
        assert own == ({"pod-0"} if len(containers) == 1 else {f"{one.role}-pod-0" for one in containers})
    assert all("pod-0" in one for one in ids)


def test_every_service_leads_to_ports_of_the_pods_that_it_selects(manifests):
    for service in manifests.of_kind("Service"):
        [workload] = manifests.selected_by(service["spec"]["selector"])
        names = {port["name"] for one in manifests.containers if one.workload is workload for port in one.spec["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for workload in manifests.workloads:
        assert workload["spec"]["selector"]["matchLabels"].items() <= pod_labels(workload).items()
        if workload["kind"] == "StatefulSet":
            governing = manifests.named("Service", workload["spec"]["serviceName"])
            assert governing["spec"]["clusterIP"] == "None"
            assert manifests.selected_by(governing["spec"]["selector"]) == [workload]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_router_looks_for_workers_by_the_name_of_a_headless_service(manifests, role):
    [target] = getattr(configuration(manifests, "router"), role)
    host, port = Address.parse(target)
    service = manifests.named("Service", host)["spec"]
    assert service["clusterIP"] == "None"
    # A lookup gives addresses and no ports: the worker's own is dialled.
    assert port == service["ports"][0]["port"] == manifests.container(role).ports["grpc"]


def test_users_reach_routers_at_one_address_and_at_each_ones_own(manifests):
    router, headless = (
        manifests.named("Service", "router")["spec"],
        manifests.named("Service", "router-headless")["spec"],
    )
    assert "clusterIP" not in router
    assert headless["clusterIP"] == "None"
    assert [port["port"] for port in router["ports"]] == [port["port"] for port in headless["ports"]] == [50051]


@pytest.mark.parametrize("role", ROLES)
def test_probes_ask_the_plaintext_health_port_for_names_that_it_knows(manifests, role):
    container = manifests.container(role)
    asked = {
        probe: (container.spec[probe]["grpc"]["port"], container.spec[probe]["grpc"].get("service", ""))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    health = container.ports["health"]
    assert asked == {
        "startupProbe": (health, LIVENESS),
        "readinessProbe": (health, ""),
        "livenessProbe": (health, LIVENESS),
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_has_time_to_load_its_weights_and_to_drain(manifests, role):
    container, config = manifests.container(role), configuration(manifests, role)
    startup = container.spec["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert container.pod["terminationGracePeriodSeconds"] >= prestop_s(container) + config.drain_s + 20
    # A model that is being replaced has nobody to hand a stream over to: a drain lasts as long as a request may.
    assert config.drain_s >= configuration(manifests, "router").max_request_s


def test_a_router_has_time_to_be_left_and_to_finish(manifests):
    container, config = manifests.container("router"), configuration(manifests, "router")
    # gRPC makes the age of each connection a tenth longer or shorter.
    assert prestop_s(container) >= ENDPOINT_S + 1.1 * config.max_connection_age_s > ENDPOINT_S
    assert container.pod["terminationGracePeriodSeconds"] >= prestop_s(container) + config.drain_s + 20
    assert config.drain_s >= config.max_request_s


def test_an_update_leaves_no_role_empty_and_goes_on_when_routers_know_the_new_worker(manifests):
    for workload in manifests.workloads:
        spec = workload["spec"]
        if workload["kind"] == "Deployment":
            assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
            continue
        assert spec["updateStrategy"] == {"type": "RollingUpdate"}
        assert spec["minReadySeconds"] >= DNS_S + configuration(manifests, "router").resolve_s
        assert spec.get("replicas", 2) >= 2 or workload["metadata"]["name"] == "pair"


def test_an_update_of_one_role_takes_along_what_its_pods_read(manifests):
    for container in manifests.containers:
        labels = pod_labels(container.workload)
        read = [one["configMap"]["name"] for one in container.volumes.values() if "configMap" in one]
        for one in [manifests.named("ConfigMap", name) for name in read]:
            assert labels.items() <= one["metadata"]["labels"].items()


def test_evictions_leave_each_role_a_pod(manifests):
    budgets = {one["metadata"]["name"]: one["spec"] for one in manifests.of_kind("PodDisruptionBudget")}
    several = [one for one in manifests.workloads if one["metadata"]["name"] != "pair"]
    assert sorted(budgets) == sorted(one["metadata"]["name"] for one in several)
    for workload in several:
        budget = budgets[workload["metadata"]["name"]]
        assert manifests.selected_by(budget["selector"]["matchLabels"]) == [workload]
        assert budget["maxUnavailable"] < workload["spec"].get("replicas", 2)


def test_no_pod_has_a_right_that_it_does_not_need(manifests):
    accounts = {one["metadata"]["name"]: one for one in manifests.of_kind("ServiceAccount")}
    for container in manifests.containers:
        pod, own = container.pod, container.spec["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not manifests.of_kind("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    labels = manifests.of_kind("Namespace")[0]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_everything_is_in_the_one_namespace(manifests):
    assert {one["metadata"].get("namespace", one["metadata"]["name"]) for one in manifests} == {"pdserve"}


def test_what_a_service_writes_lies_in_volumes_that_may_be_written(manifests):
    for container in manifests.containers:
        writable = {path for path, volume in container.volumes.items() if "emptyDir" in volume}
        expected = {"/tmp"} if container.role == "router" else {"/tmp", "/cache", "/dev/shm"}
        assert writable == expected
        assert all("sizeLimit" in container.volumes[path]["emptyDir"] for path in writable)
        if container.role != "router":
            # Compiled kernels, and what the pipeline measured, are below HOME.
            assert {"name": "HOME", "value": "/cache"} in container.spec["env"]
            assert configuration(manifests, "decode").decode_pipeline_folder == ""
            shm = container.volumes["/dev/shm"]["emptyDir"]
            assert (shm["medium"], gib(shm["sizeLimit"]) >= 1) == ("Memory", True)


def test_every_container_says_what_it_needs_and_takes_no_more(manifests):
    for container in manifests.containers:
        requests, limits = (container.spec["resources"][kind] for kind in ("requests", "limits"))
        assert cores(requests["cpu"]) <= cores(limits["cpu"])
        assert gib(requests["memory"]) <= gib(limits["memory"])
        if container.role != "router":
            assert 0 < configuration(manifests, container.role).num_threads <= cores(limits["cpu"])
    for workload in manifests.workloads:
        if workload["metadata"]["name"] == "pair":
            continue
        [spread] = workload["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert manifests.selected_by(spread["labelSelector"]["matchLabels"]) == [workload]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_on_a_cluster_each_worker_has_a_gpu_of_its_own(role):
    manifests = render("overlays/cluster")
    resources = manifests.container(role).spec["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 1
    config = configuration(manifests, role)
    assert (config.device, config.gpu_memory_fraction) == ("cuda:0", 0.9)


@pytest.mark.parametrize(
    ("overlay", "num_gpus", "decode_device", "fraction"),
    [("one-gpu", 1, "cuda:0", 0.45), ("two-gpu", 2, "cuda:1", 0.9)],
)
def test_the_containers_of_a_pair_see_the_same_gpus(overlay, num_gpus, decode_device, fraction):
    assert overlay in PAIR_OVERLAYS
    manifests = render(f"overlays/{overlay}")
    [template] = manifests.of_kind("ResourceClaimTemplate")
    [request] = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["count"] == num_gpus
    prefill, decode = manifests.container("prefill"), manifests.container("decode")
    assert prefill.pod is decode.pod
    [claim] = prefill.pod["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    assert prefill.spec["resources"]["claims"] == decode.spec["resources"]["claims"] == [{"name": claim["name"]}]
    # cuda-ipc works between processes of one PID and one IPC namespace, NCCL with one /dev/shm.
    assert prefill.pod["shareProcessNamespace"] is True
    assert prefill.volumes["/dev/shm"] is not None
    assert prefill.volumes["/dev/shm"]["name"] == decode.volumes["/dev/shm"]["name"]
    configs = [configuration(manifests, role) for role in ("prefill", "decode")]
    assert [config.device for config in configs] == ["cuda:0", decode_device]
    assert [config.gpu_memory_fraction for config in configs] == [fraction, fraction]


def test_the_page_names_every_overlay_and_component_and_the_order_of_updates():
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert {one.name for one in (K8S / "overlays").iterdir()} == set(OVERLAYS)
    assert {one.name for one in (K8S / "components").iterdir()} == set(COMPONENTS)
    assert all(f"| `{one}` |" in page for one in OVERLAYS)
    assert all(f"\n### {one}\n" in page for one in COMPONENTS)
    updates = page[page.index("## Updates") :]
    assert tuple(re.findall(r"rollout status \w+/(\w+)", updates)) == UPDATE_ORDER


def test_the_commands_of_the_page_name_what_there_is():
    manifests, page = render("overlays/cpu"), (ROOT / "docs" / "kubernetes.md").read_text()
    commands = re.findall(r"^\$ (kubectl .+)$", page, re.MULTILINE)
    folders = {folder for one in commands for folder in re.findall(r" -k (\S+)", one)}
    assert folders
    assert all((ROOT / folder / "kustomization.yaml").is_file() for folder in folders)
    named = {pair for one in commands for pair in re.findall(r"\b(statefulset|deployment|service|pod)/([\w-]+)", one)}
    kinds = {"statefulset": "StatefulSet", "deployment": "Deployment", "service": "Service"}
    for kind, name in named - {("pod", "decode-0")}:
        assert manifests.named(kinds[kind], name)
    selected = {label for one in commands for label in re.findall(r" -l (\S+)", one)}
    labels = [f"{name}={value}" for one in manifests for name, value in one["metadata"].get("labels", {}).items()]
    assert selected <= set(labels)
    for target, ports in [
        pair for one in commands for pair in re.findall(r"port-forward \w+/(\w+)\S*((?: \d+)+)", one)
    ]:
        assert set(map(int, ports.split())) <= set(manifests.container(target).ports.values())
