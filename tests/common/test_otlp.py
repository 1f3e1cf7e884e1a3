"""The way of spans to a collector that comes and goes."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from common.clock import FakeClock
from common.otlp import REST_S, Delivery


class FakeExporter(SpanExporter):
    """Fails with `fault`: a result, or something to raise."""

    def __init__(self) -> None:
        self.fault: SpanExportResult | Exception = SpanExportResult.SUCCESS
        self.num_tries = 0

    def export(self, spans):
        self.num_tries += 1
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault


@pytest.mark.parametrize("fault", [SpanExportResult.FAILURE, ValueError("a bug of the exporter")])
def test_after_a_failure_nothing_is_tried_for_a_while_and_both_turns_are_told_once(fault, caplog):
    caplog.set_level("INFO")
    exporter, clock = FakeExporter(), FakeClock()
    delivery = Delivery(exporter, "http://collector:4317", clock)
    exporter.fault = fault
    for seconds, num_tries in ((0.0, 1), (REST_S / 2, 1), (REST_S, 2), (REST_S / 2, 2)):
        clock.advance(seconds)
        assert delivery.export([]) is SpanExportResult.FAILURE
        assert exporter.num_tries == num_tries
    exporter.fault = SpanExportResult.SUCCESS
    clock.advance(REST_S)
    for _ in range(3):
        assert delivery.export([]) is SpanExportResult.SUCCESS
    assert [record.getMessage() for record in caplog.records] == [
        "traces do not reach http://collector:4317, and are lost until they do",
        "traces reach http://collector:4317 again",
    ]
