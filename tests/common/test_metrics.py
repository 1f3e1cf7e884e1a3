from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from common import metrics, metrics_page
from common.address import Address

ALL = [metrics.RouterMetrics, metrics.PrefillMetrics, metrics.DecodeMetrics]


def fetch(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        return response.read().decode()


def test_the_page_in_docs_is_up_to_date():
    committed = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert committed.read_text() == metrics_page.page(), "run `make docs`"


@pytest.mark.parametrize("cls", ALL)
def test_names_have_the_prefix_and_a_base_unit(cls):
    for family in cls().registry.collect():
        if not family.name.startswith("process_"):
            assert family.name.startswith("pdserve_")
            assert not family.name.endswith(("_ms", "_s", "_gib"))


def test_services_in_one_process_do_not_share_values():
    one, other = metrics.DecodeMetrics(), metrics.DecodeMetrics()
    one.preemptions.inc()
    assert one.registry.get_sample_value("pdserve_decode_preemptions_total") == 1
    assert other.registry.get_sample_value("pdserve_decode_preemptions_total") == 0


def test_what_is_counted_is_served_over_http(unused_address):
    router = metrics.RouterMetrics()
    router.requests.labels(code="OK").inc(2)
    router.queue_requests.set_function(lambda: 5)
    with metrics.exposed(router, unused_address):
        text = fetch(unused_address)
    assert 'pdserve_router_requests_total{code="OK"} 2.0' in text
    assert "pdserve_router_queue_requests 5.0" in text
    Address.parse(unused_address).check_free()


def test_what_is_counted_can_be_read_by_label():
    router = metrics.RouterMetrics()
    router.requests.labels(code="OK").inc(2)
    router.requests.labels(code="CANCELLED").inc()
    router.output_tokens.inc(7)
    assert metrics.totals(router.requests) == {("OK",): 2, ("CANCELLED",): 1}
    assert metrics.totals(router.output_tokens) == {(): 7}
    assert metrics.totals(router.turned_away) == {}


def test_an_empty_address_serves_nowhere():
    with metrics.exposed(metrics.RouterMetrics(), ""):
        pass


def test_a_port_in_use_is_refused_by_name(unused_address):
    with (
        metrics.exposed(metrics.RouterMetrics(), unused_address),
        pytest.raises(OSError, match=f"cannot listen on {unused_address}: Address already in use"),
        metrics.exposed(metrics.DecodeMetrics(), unused_address),
    ):
        pass
