"""The alert rules: about what the services export, each with a page to turn to, and firing when they should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.promql import exported, faults
from tests.support.processes import ROOT

MONITORING = ROOT / "k8s/components/monitoring"
RULES = MONITORING / "alerts/pdserve.rules.yaml"
FIRING = Path(__file__).parent / "alerts.test.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]

PROMTOOL, KUBECTL = shutil.which("promtool"), shutil.which("kubectl")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian's prometheus has it)")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_is_about_what_is_exported_and_says_what_to_do(rule):
    assert faults(rule["expr"], exported()) == []
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert rule["alert"] in headings


def test_every_runbook_has_an_alert():
    page = (ROOT / "docs/observability.md").read_text()
    assert set(re.findall(r"^### (Pdserve\w+)$", page, re.MULTILINE)) == {rule["alert"] for rule in ALERTS}


def test_the_rule_of_the_operator_is_the_file_of_rules():
    rule = yaml.safe_load((MONITORING / "alerts/prometheus-rule.yaml").read_text())
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text()), "run `make docs`"


@needs_promtool
def test_promtool_takes_the_rules():
    done = subprocess.run([PROMTOOL, "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    (tmp_path / "alerts.test.yaml").write_text(FIRING.read_text().replace("RULES", str(RULES)))
    done = subprocess.run([PROMTOOL, "test", "rules", tmp_path / "alerts.test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires():
    cases = yaml.safe_load(FIRING.read_text())["tests"]
    fired = {one["alertname"] for case in cases for one in case["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl")
def test_both_components_render(tmp_path):
    components = [os.path.relpath(MONITORING / name, tmp_path) for name in ("alerts", "dashboards")]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"components": components}))
    done = subprocess.run([KUBECTL, "kustomize", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rule, board = sorted(yaml.safe_load_all(done.stdout), key=lambda one: one["kind"], reverse=True)
    assert (rule["kind"], board["kind"]) == ("PrometheusRule", "ConfigMap")
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert board["data"]["pdserve.json"] == (MONITORING / "dashboards/pdserve.json").read_text()
