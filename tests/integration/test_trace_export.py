"""Traces on their way to a collector: from real processes, and while there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import grpc
import pytest

from common.config import ConfigError, RouterConfig
from common.tracing import DECODE, GENERATE, PREFILL, tracing
from pdserve.v1 import router_pb2_grpc
from tests.fakes.cluster import FakeCluster, eventually, generate_request
from tests.support.collector import collecting_over_grpc, collecting_over_http
from tests.support.processes import ROOT, Services, running_services

# Of one request: three of the router's, four of prefill's stages, three of decode's, and the calls that both serve.
NUM_SPANS = 4 + 5 + 4
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def generate(services: Services, *metadata: tuple[str, str]) -> None:
    with grpc.insecure_channel(services.router.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        list(stub.Generate(generate_request("Return a list of", max_tokens=4), timeout=60, metadata=metadata))


@pytest.mark.slow
def test_three_processes_send_one_trace_to_a_collector():
    with collecting_over_grpc() as collector, collecting_over_http(collector) as http_address:
        # Batches leave at once.
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
        by_grpc = ["--trace-endpoint", collector.address]
        by_http = ["--trace-endpoint", http_address, "--trace-protocol", "http"]
        with running_services(
            router_args=by_grpc,
            prefill_args=[*by_http, "--instance-id", "prefill-0"],
            decode_args=by_grpc,
            prefill_environment=environment,
            decode_environment=environment,
        ) as services:
            generate(services, ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"))
            spans = collector.wait_for(NUM_SPANS, timeout_s=60)
            log = services.router.log.read_text()
    assert f"trace_id={TRACE_ID}" in log
    assert {one.span.trace_id.hex() for one in spans} == {TRACE_ID}
    assert {one.service for one in spans} == {"pdserve-router", "pdserve-prefill", "pdserve-decode"}
    by_id = {one.span.span_id: one for one in spans}
    parents = {
        (one.service, one.span.name.rpartition("/")[2]): by_id[one.span.parent_span_id].service
        for one in spans
        if one.span.parent_span_id in by_id
    }
    assert parents[("pdserve-prefill", "Prefill")] == parents[("pdserve-decode", "Decode")] == "pdserve-router"
    assert parents[("pdserve-prefill", "transfer")] == "pdserve-prefill"
    prefill = next(one for one in spans if one.service == "pdserve-prefill")
    assert prefill.resource["service.instance.id"] == "prefill-0"
    assert prefill.resource["deployment.environment"] == "test"


async def test_requests_are_served_while_no_collector_answers_and_the_log_says_so_once(
    unused_address, monkeypatch, caplog
):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    with tracing(RouterConfig(trace_endpoint=f"http://{unused_address}")) as tracer:
        async with FakeCluster(tracer=tracer).running() as cluster:
            await cluster.generate(max_tokens=3)
            await eventually(lambda: "traces do not reach" in caplog.text)
            for _ in range(5):
                assert len((await cluster.generate(max_tokens=3)).token_ids) == 3
    assert caplog.text.count("traces do not reach") == 1


async def test_a_full_queue_of_spans_holds_up_nobody(unused_address, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    with tracing(RouterConfig(trace_endpoint=f"http://{unused_address}")) as tracer:
        async with FakeCluster(tracer=tracer).running() as cluster:
            replies = await asyncio.gather(*(cluster.generate(max_tokens=3) for _ in range(20)))
    assert {len(reply.token_ids) for reply in replies} == {3}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_what_is_recorded_is_sent_before_the_end(protocol):
    with collecting_over_grpc() as collector, collecting_over_http(collector) as http_address:
        address = {"grpc": collector.address, "http": http_address}[protocol]
        with tracing(RouterConfig(trace_endpoint=address, trace_protocol=protocol)) as tracer:
            async with FakeCluster(tracer=tracer).running() as cluster:
                await cluster.generate(max_tokens=3)
        names = {one.span.name for one in collector.wait_for(4, timeout_s=0)}
    assert names == {GENERATE, "queue", DECODE, PREFILL}


def test_without_an_endpoint_no_service_imports_opentelemetry():
    script = (
        "import sys, router.__main__, prefill_service.__main__, decode_service.__main__\n"
        "from common.config import RouterConfig\n"
        "from common.tracing import OFF, tracing\n"
        "with tracing(RouterConfig()) as tracer:\n"
        "    assert tracer is OFF\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_endpoint_without_the_packages_ends_the_start_and_names_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "common.otlp", None)
    config = RouterConfig(trace_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match=r"install the packages of pdserve\[tracing\]"), tracing(config):
        pass


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://127.0.0.1:4317", "http://", "http://host:99999"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ConfigError, match=r"trace_endpoint=.*: expected a URL"):
        RouterConfig(trace_endpoint=endpoint)


def test_an_environment_that_cannot_work_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    config = RouterConfig(trace_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match="zip"), tracing(config):
        pass
