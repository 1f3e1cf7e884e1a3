"""A cell of the sweep on a real GPU: graphs, partitions, and logits that no overlap changes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.pipeline_cell import measure_cell
from benchmarks.pipeline_device import GraphDevice
from benchmarks.pipeline_steps import Workload
from benchmarks.pipeline_trace import measured
from benchmarks.shapes import Shape
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.order import Cut
from tests.support.device import needs_gpus

pytest.importorskip("triton")

pytestmark = needs_gpus()

SMALL = Shape(
    name="small", num_layers=4, hidden_size=1024, intermediate_size=3072, num_heads=16, tied=True, vocab_size=4096
)


@torch.inference_mode()
def test_every_pipelined_step_of_a_cell_computes_what_the_sequential_one_does():
    with GraphDevice() as device:
        assert device.splits, device.missing
        rows = measure_cell(device, Workload(SMALL, device.device), Cell(256, 512), whole_layers=28)
    pipelined = [row for row in rows if row.cut is not None]
    assert {row.cut for row in pipelined} == set(Cut)
    assert all(row.same_bits for row in pipelined), pipelined
    assert all(row.same_tokens > 0.8 for row in rows[1:]), rows


@torch.inference_mode()
def test_stages_of_a_replayed_graph_have_times():
    with GraphDevice() as device:
        tracks = measured(device, Workload(SMALL, device.device), Cell(64, 512), Cut.ATTENTION_CORE, 64, 2)
    for track in tracks:
        for spans in track.steps:
            assert len(spans) == len(track.order.steps)
            assert all(span.end_s > span.start_s for span in spans.values())
