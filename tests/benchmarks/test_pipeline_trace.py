"""The picture and the trace of pipelined steps."""

from __future__ import annotations

import json

import pytest

from benchmarks import pipeline_trace, report
from benchmarks.pipeline_device import HostDevice
from benchmarks.pipeline_picture import idle_share, step_s
from benchmarks.pipeline_steps import Workload
from benchmarks.pipeline_trace import measured, simulated, write
from benchmarks.shapes import TINY
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.order import Cut, Lane


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_lane_that_is_twice_as_fast_stands_idle_half_the_time():
    (track,) = simulated(Cut.LAYER, 100, 1e-3, 2e-3)
    assert idle_share(track, Lane.ATTENTION) == pytest.approx(0.5, abs=0.01)
    assert idle_share(track, Lane.FFN) == pytest.approx(0, abs=0.01)
    assert step_s(track) == pytest.approx(0.401)


def test_simulated_steps_are_written_as_trace_and_picture(results):
    pytest.importorskip("matplotlib")
    pipeline_trace.run(["--simulate", "1", "1.3", "--layers", "4", "--cut", "layer"])
    trace = json.loads((results / "simulated-pipeline-trace-layer.perfetto-trace").read_text())
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 2 * 2 * 4
    assert (results / "simulated-pipeline-trace-layer.png").stat().st_size > 10_000


@pytest.mark.parametrize("cut", Cut)
def test_profiled_steps_stand_beside_the_sequential_one(results, cut):
    pytest.importorskip("matplotlib")
    device = HostDevice()
    tracks = measured(device, Workload(TINY, device.device), Cell(8, 20), cut, 60, 2)
    assert [(len(track.steps), track.order.num_micro_batches) for track in tracks] == [(2, 1), (2, 2)]
    assert tracks[1].title(Lane.ATTENTION) == "attention (64 SMs)"
    assert all(path.exists() for path in write(tracks, "some-gpu", "title"))


def test_results_are_not_taken_for_those_of_a_benchmark(results):
    write(simulated(Cut.LAYER, 3, 1e-3, 1e-3), "simulated", "title")
    assert not list(results.glob("*.json"))
