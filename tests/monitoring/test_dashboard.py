"""The Grafana dashboard asks for nothing that the services do not export."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

import pytest

from tests.monitoring.promql import TARGET, exported, faults, selectors
from tests.support.processes import ROOT

DASHBOARD = json.loads((ROOT / "k8s/components/monitoring/dashboards/pdserve.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Grafana puts something in the place of these.
VARIABLES = {"$__rate_interval": "1m", "$namespace": "default"}


def queries(panel: dict) -> Iterator[tuple[str, str]]:
    """Each with its legend."""
    for target in panel["targets"]:
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        yield query, target["legendFormat"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_finds_what_it_asks_for(panel):
    series = exported()
    for query, legend in queries(panel):
        assert faults(query, series) == [], query
        known = TARGET.union(*(series[name] for name in selectors(query)))
        assert set(re.findall(r"{{(\w+)}}", legend)) <= known, legend


def test_a_query_for_what_nobody_exports_is_found_out():
    series = exported()
    assert faults("rate(pdserve_router_request_total[1m])", series) == ["no series pdserve_router_request_total"]
    assert faults('pdserve_worker_info{kind="decode"}', series) == ["pdserve_worker_info has no label kind"]
    assert faults('pdserve_router_workers{state="SERVING"}', series) == ["state is never SERVING"]
    assert faults("sum by (reason) (pdserve_router_degraded)", series) == ["nothing here has the label reason"]
    with pytest.raises(ValueError):
        faults("sum by (", series)


def test_every_query_is_bound_to_the_namespace_that_was_chosen():
    for panel in PANELS:
        for target in panel["targets"]:
            num_selectors = target["expr"].count("pdserve_")
            assert target["expr"].count('namespace=~"$namespace"') == num_selectors, panel["title"]


def test_what_operators_look_for_is_there():
    asked = {name for panel in PANELS for query, _ in queries(panel) for name in selectors(query)}
    assert asked >= {
        "pdserve_router_requests_total",
        "pdserve_router_good_requests_total",
        "pdserve_router_time_to_first_token_seconds_bucket",
        "pdserve_router_inter_token_seconds_bucket",
        "pdserve_router_queue_requests",
        "pdserve_router_turned_away_total",
        "pdserve_router_workers",
        "pdserve_worker_free_blocks",
        "pdserve_worker_kv_bytes_total",
        "pdserve_decode_attempts_lost_total",
        "pdserve_router_resumptions_total",
        "pdserve_router_prefill_ways_total",
        "pdserve_decode_pipeline_mode",
        "pdserve_decode_pipeline_sm",
        "pdserve_decode_pipeline_gain",
        "pdserve_decode_pipeline_fallback",
        "pdserve_worker_step_seconds_bucket",
    }


def test_panels_have_ids_of_their_own_and_do_not_lie_on_each_other():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above, (one, other)
