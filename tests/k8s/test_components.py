"""What the components add: who reaches whom, what scales on what, whose certificate says what, what is scraped."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from common.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    PAIR_OVERLAYS,
    Manifests,
    Object,
    configuration,
    matches,
    pod_labels,
    render,
)

ANYONE = {"app.kubernetes.io/name": "somebody-else"}


def reaches(
    manifests: Manifests, source: dict[str, str], target: dict[str, str], port: int, namespace="pdserve"
) -> bool:
    """Whether a Pod with labels `source`, in `namespace`, gets through to a port of one with labels `target`."""

    def is_from(peer: Object) -> bool:
        if "namespaceSelector" in peer:
            return matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        return namespace == "pdserve" and matches(peer["podSelector"], source)

    policies = [
        one["spec"] for one in manifests.of_kind("NetworkPolicy") if matches(one["spec"]["podSelector"], target)
    ]
    rules = [rule for policy in policies for rule in policy.get("ingress", ())]
    return not policies or any(
        (not rule.get("from") or any(map(is_from, rule["from"])))
        and any(one["port"] <= port <= one.get("endPort", one["port"]) for one in rule["ports"])
        for rule in rules
    )


@pytest.fixture(scope="module")
def walled() -> Manifests:
    return render("base", "network-policies")


def kv_ports(manifests: Manifests) -> set[tuple[int, int]]:
    """The range from which the kernel of each worker's Pod chooses ports to listen on."""
    sets = manifests.of_kind("StatefulSet")
    sysctls = [one["spec"]["template"]["spec"]["securityContext"]["sysctls"] for one in sets]
    assert all([one["name"] for one in few] == ["net.ipv4.ip_local_port_range"] for few in sysctls)
    return {(int(few[0]["value"].split()[0]), int(few[0]["value"].split()[1])) for few in sysctls}


def test_only_prefill_and_decode_reach_each_others_kv_ports(walled):
    [(first, last)] = kv_ports(walled)
    labels = {one["metadata"]["name"]: pod_labels(one) for one in walled.workloads} | {"anyone": ANYONE}
    through = {
        (source, target)
        for source in labels
        for target in ("router", "prefill", "decode")
        if any(reaches(walled, labels[source], labels[target], port) for port in (first, (first + last) // 2, last))
    }
    assert through == {("prefill", "decode"), ("decode", "prefill")}
    assert not reaches(walled, labels["prefill"], labels["decode"], last + 1)
    assert not reaches(walled, labels["prefill"], labels["decode"], first - 1)


def test_each_grpc_port_is_reached_by_its_callers_alone(walled):
    labels = {one["metadata"]["name"]: pod_labels(one) for one in walled.workloads} | {"anyone": ANYONE}
    through = {
        (source, role)
        for source in labels
        for role in ("router", "prefill", "decode")
        if reaches(walled, labels[source], labels[role], walled.container(role).ports["grpc"])
    }
    everybody = {(source, "router") for source in labels}
    assert through == everybody | {("router", "prefill"), ("router", "decode"), ("prefill", "decode")}
    assert reaches(walled, ANYONE, labels["router"], 50051, namespace="elsewhere")


def test_metrics_are_read_from_the_namespace_of_prometheus_and_health_by_nobody_else_than_the_node(walled):
    for container in walled.containers:
        target, ports = pod_labels(container.workload), container.ports
        assert reaches(walled, ANYONE, target, ports["metrics"], namespace="monitoring")
        assert not reaches(walled, ANYONE, target, ports["metrics"])
        assert not reaches(walled, ANYONE, target, ports["health"], namespace="monitoring")


@pytest.mark.parametrize("overlay", PAIR_OVERLAYS)
def test_a_pair_is_reached_by_routers_and_its_kv_by_nobody_outside(overlay):
    manifests = render(f"overlays/{overlay}", "network-policies")
    [(first, _)] = kv_ports(manifests)
    router, pair = (pod_labels(manifests.container(role).workload) for role in ("router", "decode"))
    assert [reaches(manifests, router, pair, port) for port in (50052, 50053, first)] == [True, True, False]
    assert not reaches(manifests, ANYONE, pair, 50053)


def exported_names() -> set[str]:
    """Every series of the services."""
    registries = [metrics().registry for metrics in (RouterMetrics, PrefillMetrics, DecodeMetrics)]
    return {name for one in registries for name in one._names_to_collectors}


def adapter_rules() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load((K8S / "components/autoscaling/adapter-rules.yaml").read_text())["rules"]


def name_of(rule: dict[str, Any]) -> str:
    """Under which the adapter offers what the rule computes."""
    return rule.get("name", {}).get("as") or rule["seriesQuery"].partition("{")[0]


def test_autoscalers_ask_for_metrics_that_the_adapter_makes_of_series_that_exist():
    manifests, rules = render("base", "autoscaling"), adapter_rules()
    asked = {"Pods": set(), "External": set()}
    for one in manifests.of_kind("HorizontalPodAutoscaler"):
        for metric in one["spec"]["metrics"]:
            if metric["type"] in asked:
                asked[metric["type"]].add(metric[metric["type"].lower()]["metric"]["name"])
    assert asked == {"Pods": set(map(name_of, rules["custom"])), "External": set(map(name_of, rules["external"]))}
    for rule in [*rules["custom"], *rules["external"]]:
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
        used = set(re.findall(r"pdserve_\w+", query + rule["seriesQuery"]))
        assert used <= exported_names()
        assert query.count("(") == query.count(")")


def test_autoscalers_own_the_number_of_pods_and_leave_two_of_each():
    manifests = render("overlays/cluster", "autoscaling")
    scaled = []
    for one in manifests.of_kind("HorizontalPodAutoscaler"):
        reference = one["spec"]["scaleTargetRef"]
        workload = manifests.named(reference["kind"], reference["name"])
        assert "replicas" not in workload["spec"]
        assert 2 <= one["spec"]["minReplicas"] < one["spec"]["maxReplicas"]
        scaled.append(workload)
    assert len(scaled) == len(manifests.workloads)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_scraped_once(overlay):
    manifests = render(f"overlays/{overlay}", "monitoring")
    [monitor] = manifests.of_kind("PodMonitor")
    ports = [one["port"] for one in monitor["spec"]["podMetricsEndpoints"]]
    for container in manifests.containers:
        assert matches(monitor["spec"]["selector"], pod_labels(container.workload))
        named = {port["name"]: port["containerPort"] for port in container.spec["ports"]}
        assert [named[one] for one in ports if one in named] == [container.ports["metrics"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_service_shows_a_certificate_that_its_callers_ask_for(overlay):
    manifests = render(f"overlays/{overlay}", "mtls")
    certificates = {one["spec"]["secretName"]: one["spec"] for one in manifests.of_kind("Certificate")}
    issuers = {one["metadata"]["name"]: one["spec"] for one in manifests.of_kind("Issuer")}
    names = {}
    for role in ("router", "prefill", "decode"):
        container, config = manifests.container(role), configuration(manifests, role)
        secret = container.volumes["/etc/pdserve-tls"]["secret"]
        assert secret["defaultMode"] == 0o440
        certificate = certificates[secret["secretName"]]
        # cert-manager writes these three into the Secret.
        files = config.tls_certificate, config.tls_key, config.tls_ca
        assert files == tuple(f"/etc/pdserve-tls/{name}" for name in ("tls.crt", "tls.key", "ca.crt"))
        assert {"server auth", "client auth"} <= set(certificate["usages"])
        # One authority for all, itself a certificate of this rendering.
        assert certificates[issuers[certificate["issuerRef"]["name"]]["ca"]["secretName"]]["isCA"] is True
        names[role] = certificate["dnsNames"]
    # Workers are dialled by address; what their certificates have in common is asked for.
    dialled = configuration(manifests, "router").tls_server_name
    assert dialled == configuration(manifests, "prefill").tls_server_name
    assert dialled in names["prefill"]
    assert dialled in names["decode"]
    assert {"router", "router.pdserve.svc", "router-headless.pdserve.svc.cluster.local"} <= set(names["router"])
    configs = [configuration(manifests, role) for role in ("router", "prefill", "decode")]
    assert [config.tls_client_certificates for config in configs] == [False, True, True]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_model_of_ones_own_is_read_by_every_service_from_one_claim(overlay):
    components = () if overlay != "cpu" else ("model-volume",)
    manifests = render(f"overlays/{overlay}", *components)
    for container in manifests.containers:
        config = configuration(manifests, container.role)
        claim = container.volumes[config.model]["persistentVolumeClaim"]
        assert claim == {"claimName": "model", "readOnly": True}
    manifests.named("PersistentVolumeClaim", "model")
