"""A real Prometheus scrapes real services, and every panel of the dashboard shows something."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request

import grpc
import pytest

from pdserve.v1 import router_pb2_grpc
from tests.fakes.cluster import generate_request
from tests.monitoring.test_dashboard import PANELS
from tests.support.processes import free_port, running_services

PROMETHEUS = shutil.which("prometheus")
# They show something once something has gone wrong, or once a local prefill is a choice.
EMPTY_IN_PEACE = {"Refusals", "Ended before their time", "Retries", "Resumptions", "Held back"}
PATIENCE_S = 60.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus (Debian's package of that name)"),
]


def ask(port: int, query: str) -> list[dict]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)["data"]["result"]


def test_every_panel_shows_something_of_real_services(tmp_path):
    ports = {role: free_port() for role in ("router", "prefill", "decode", "prometheus")}
    targets = [f"127.0.0.1:{ports[role]}" for role in ("router", "prefill", "decode")]
    config = {"scrape_configs": [{"job_name": "pdserve", "static_configs": [{"targets": targets}]}]}
    # JSON is YAML.
    (tmp_path / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, **config}))
    listen = {role: ["--metrics-listen", f"127.0.0.1:{ports[role]}"] for role in ("router", "prefill", "decode")}
    command = [
        PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}", "--log.level=error",
    ]  # fmt: skip
    with (
        running_services(
            router_args=listen["router"], prefill_args=listen["prefill"], decode_args=listen["decode"]
        ) as services,
        subprocess.Popen(command) as prometheus,
    ):
        try:
            _wait_until_scraped(ports["prometheus"])
            empty = _generate_until_shown(services.router.address, ports["prometheus"])
        finally:
            prometheus.terminate()
    assert empty <= EMPTY_IN_PEACE


def _wait_until_scraped(port: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            if len(ask(port, "up == 1")) == 3:
                return
        except OSError:
            assert time.monotonic() < deadline_s
        time.sleep(0.1)


def _generate_until_shown(router: str, port: int) -> set[str]:
    """The titles of the panels that show nothing, although requests are made until only those are left that may."""
    deadline_s = time.monotonic() + PATIENCE_S
    with grpc.insecure_channel(router, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        while True:
            list(stub.Generate(generate_request("Return a list of", max_tokens=8, ignore_eos=True), timeout=30))
            empty = {panel["title"] for panel in PANELS if not _shows(panel, port)}
            if empty <= EMPTY_IN_PEACE or time.monotonic() > deadline_s:
                return empty


def _shows(panel: dict, port: int) -> bool:
    queries = [
        target["expr"].replace("$__rate_interval", "10s").replace("$namespace", ".*") for target in panel["targets"]
    ]
    return any(one["value"][1] != "NaN" for query in queries for one in ask(port, query))
