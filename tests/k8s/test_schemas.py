"""Whatever is rendered fits the schemas of Kubernetes, cert-manager and the Prometheus operator, strictly."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import kubernetes_validate
import pytest

from tests.support.manifests import COMPONENTS, OVERLAYS, PAIR_OVERLAYS, Object, render

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cloudcoil.models.cert_manager.v1 import Certificate, Issuer
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

# preStop.sleep came with 1.30, claims of resource.k8s.io/v1 with 1.34.
VERSIONS = ("1.30", "1.34", "1.37")
VERSIONS_OF_PAIRS = ("1.34", "1.37")
# From the schemas of the operators' own custom resources.
CUSTOM = {
    ("cert-manager.io/v1", "Certificate"): Certificate,
    ("cert-manager.io/v1", "Issuer"): Issuer,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
}
CASES = [(f"overlays/{overlay}", ()) for overlay in OVERLAYS]
CASES += [("base", (component,)) for component in COMPONENTS]
# Everything that goes together; overlays with GPUs have the model's volume already.
CASES += [
    ("overlays/cluster", tuple(one for one in COMPONENTS if one != "model-volume")),
    ("overlays/two-gpu", ("monitoring", "mtls", "network-policies")),
]


def check(one: Object, version: str) -> None:
    """Raises ValidationError."""
    model = CUSTOM.get((one["apiVersion"], one["kind"]))
    if model is None:
        kubernetes_validate.validate(one, version, strict=True)
    else:
        taken = model.model_validate(one).model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert taken == one, "fields that the schema does not know are left out"


@functools.cache
def check_once(text: str, version: str) -> None:
    """Most objects are in many renderings."""
    check(json.loads(text), version)


@pytest.mark.parametrize(("overlay", "components"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_every_object_fits_the_schemas_of_each_version(overlay, components):
    for version in VERSIONS_OF_PAIRS if overlay.rpartition("/")[2] in PAIR_OVERLAYS else VERSIONS:
        for one in render(overlay, *components):
            check_once(json.dumps(one), version)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("StatefulSet", lambda one: one["spec"].update(replica=2)),
        ("StatefulSet", lambda one: one["spec"]["template"]["spec"]["containers"][0].update(readinesProbe={})),
        ("Certificate", lambda one: one["spec"].update(dnsName="router")),
        ("PodMonitor", lambda one: one["spec"]["podMetricsEndpoints"][0].update(intervall="15s")),
    ],
)
def test_a_field_with_a_slip_is_found(kind, change):
    one = copy.deepcopy(render("base", "monitoring", "mtls").of_kind(kind)[0])
    check(one, VERSIONS[-1])
    change(one)
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        check(one, VERSIONS[-1])
