"""The sweep over the attention/FFN pipeline: what is measured, what is kept, and that all of it runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import decode_pipeline, pipeline_cell, report
from benchmarks.decode_pipeline import cell_bytes, measure_on_cpu, named, options_of, rows_of, select
from benchmarks.pipeline_cell import Timed, best_splits, candidates, same, stage_times
from benchmarks.pipeline_device import HostDevice
from benchmarks.pipeline_heat_map import best_of, draw, label
from benchmarks.shapes import PIPELINE_SHAPES
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.calibration import StageTime
from decode_service.pipeline.order import Cut, Lane, Span, Stage, order
from decode_service.pipeline.stage_times import StageTimes

SHAPE = replace(PIPELINE_SHAPES["8B"], num_layers=8)
GIB = 1 << 30


def measured(gain: float = 1.1) -> list[Timed]:
    return [
        Timed("sequential", 11e-3, whole_s=44e-3),
        Timed("two micro-batches", 12e-3),
        Timed("layer 64:68", 11e-3 / gain, Cut.LAYER, predicted_s=9e-3, ideal_s=8e-3, whole_s=40e-3, same_bits=True),
        Timed("attention-core, plain streams", 13e-3, Cut.ATTENTION_CORE, ideal_s=7e-3, same_bits=True),
    ]


def test_cells_that_do_not_fit_are_left_out_and_named():
    cells = [Cell(512, 4096), Cell(1024, 4096), Cell(2048, 1024)]
    left = select(cells, [], SHAPE, 138 * GIB)
    assert (left.to_measure, left.too_large) == ([Cell(512, 4096), Cell(2048, 1024)], [Cell(1024, 4096)])
    assert named(left.too_large) == "1024 x 4096"


def test_a_cell_takes_its_kv_and_more():
    larger, smaller = (cell_bytes(SHAPE, Cell(512, context)) for context in (4096, 1024))
    assert larger - smaller == 512 * 3072 * SHAPE.kv_bytes_per_token
    assert smaller > 2 * SHAPE.layer_parameters + 4 * SHAPE.head_parameters


def test_what_is_kept_is_not_measured_again():
    kept = rows_of("Qwen3-8B", SHAPE, Cell(512, 1024), measured(), "abc")
    assert select([Cell(512, 1024), Cell(64, 256)], kept, SHAPE, 138 * GIB).to_measure == [Cell(64, 256)]


def test_rows_stand_beside_the_sequential_step_and_the_ideal():
    sequential, _, layer, plain = rows_of("Qwen3-8B", SHAPE, Cell(512, 1024), measured(), "abc")
    assert (sequential["gain"], sequential["ideal_ms"], sequential["pipelined"]) == (1, None, False)
    assert layer["gain"] == pytest.approx(1.1)
    assert layer["predicted_gain"] == pytest.approx(11 / 9)
    assert (layer["ideal_ms"], layer["over_ideal"]) == pytest.approx((8, 10 / 8))
    assert layer["whole_model_gain"] == pytest.approx(1.1)
    assert (plain["predicted_gain"], plain["whole_model_gain"]) == (None, None)


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A run measures nothing by itself, and keeps its results apart."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    report.RESULTS.parent.mkdir()
    monkeypatch.setattr(decode_pipeline, "GraphDevice", lambda: contextlib.nullcontext(HostDevice()))
    monkeypatch.setattr(decode_pipeline, "Workload", Mock())


@pytest.mark.usefixtures("no_gpu")
def test_a_run_goes_on_where_the_last_one_stopped(monkeypatch):
    seen: list[Cell] = []

    def measure_cell(device, workload, cell, *, whole_layers):
        seen.append(cell)
        if cell == Cell(64, 1024):
            raise torch.OutOfMemoryError("too little memory")
        return measured()

    monkeypatch.setattr(decode_pipeline, "measure_cell", measure_cell)
    arguments = ["8B", "--batch", "512", "64", "--context", "1024"]
    decode_pipeline.run([*arguments, "--seconds", "0"])
    assert seen == []
    decode_pipeline.run([*arguments[:3], *arguments[4:]])
    decode_pipeline.run(arguments)
    assert seen == [Cell(512, 1024), Cell(64, 1024)]
    (path,) = report.RESULTS.glob("*-decode-pipeline-8b.json")
    content = json.loads(path.read_text())
    assert {(row["batch"], row["context"]) for row in content["rows"]} == {(512, 1024)}
    assert content["notes"][-1] == "Not measured, for lack of memory (batch x context): 64 x 1024."
    decode_pipeline.run([*arguments[:3], *arguments[4:], "--fresh"])
    assert seen[2:] == [Cell(512, 1024)]


@pytest.mark.usefixtures("no_gpu")
def test_another_number_of_layers_is_another_result(monkeypatch):
    monkeypatch.setattr(decode_pipeline, "measure_cell", lambda *_, **__: measured())
    decode_pipeline.run(["8B", "--batch", "512", "--context", "1024", "--layers", "36"])
    assert next(path.stem for path in report.RESULTS.glob("*.md")).endswith("-decode-pipeline-36-layers-8b")


@pytest.mark.parametrize("arguments", [[], ["7B"], ["8B", "--layers", "2"]])
def test_what_cannot_be_meant_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        options_of(arguments)
    assert "error" in capsys.readouterr().err


def stages_of(cut: Cut) -> StageTimes:
    """Both lanes have as much work, and take as long as their SMs are few."""
    return StageTimes(cut, 8, [StageTime(cut, lane, num_sm, 1 / num_sm) for lane in Lane for num_sm in (16, 132)])


def test_the_pairs_with_the_shortest_predicted_steps_are_measured():
    assert sorted(best_splits(HostDevice().splits, 132, stages_of(Cut.LAYER))) == [56, 64, 72]


def test_the_fixed_pair_and_two_plain_streams_are_measured_of_both_cuts():
    chosen = list(candidates(HostDevice(), {cut: stages_of(cut) for cut in Cut}))
    assert [one.name for one in chosen if one.asked == "16:16"] == ["layer 16:16", "attention-core 16:16"]
    assert [one.name for one in chosen if not one.pair.partitioned] == [
        "layer, plain streams",
        "attention-core, plain streams",
    ]
    assert len(chosen) == 10


def test_a_fixed_pair_that_is_among_the_best_is_measured_once():
    times = [StageTime(Cut.LAYER, lane, 132, 1.0) for lane in Lane]
    times.append(StageTime(Cut.LAYER, Lane.FFN, 16, 50.0))
    chosen = list(candidates(HostDevice(), {Cut.LAYER: StageTimes(Cut.LAYER, 8, times)}))
    assert len({one.name for one in chosen}) == len(chosen)
    assert [one.asked for one in chosen].count("16:16") == 1


def test_stage_times_are_medians_with_the_ends_apart():
    steps = order(Cut.ATTENTION_CORE, 3, 1)
    spans = [
        {
            step.stage: Span(0.0, slow * (10.0 if step.stage == Stage(Lane.FFN, 3, 0) else 1.0 + step.stage.layer))
            for step in steps.steps
        }
        for slow in (1.0, 1.0, 7.0)
    ]
    attention, ffn = stage_times(steps, spans, {Lane.ATTENTION: 64, Lane.FFN: 68})
    assert attention == StageTime(Cut.ATTENTION_CORE, Lane.ATTENTION, 64, 2.0, 1.0, 3.0)
    assert ffn == StageTime(Cut.ATTENTION_CORE, Lane.FFN, 68, 2.5, 1.0, 10.0)


def test_logits_are_compared_to_the_bit():
    logits = torch.randn(300, 5)
    other = logits.clone()
    assert same(logits, other)
    other[299, 4] += 1e-6
    assert not same(logits, other)


@pytest.fixture
def one_thread():
    """Small products take many times as long where threads have to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_every_step_of_a_cell_runs_on_a_cpu_with_the_same_bits(monkeypatch):
    monkeypatch.setattr(pipeline_cell, "TURNS", 1)
    monkeypatch.setattr(pipeline_cell, "SOLO_REPEATS", 1)
    rows = measure_on_cpu(Cell(9, 20))
    assert [row["what"] for row in rows[:2]] == ["sequential", "two micro-batches"]
    assert len(rows) == 12
    assert all(row["same_bits"] for row in rows if row["pipelined"])
    assert all(row["same_tokens"] == 1 for row in rows[1:])
    assert all(row["ms"] > 0 and row["over_ideal"] > 0 and row["whole_model_gain"] > 0 for row in rows[2:])


def test_the_heat_map_shows_the_best_of_each_cell(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row
        for cell, gain in ((Cell(512, 1024), 1.1), (Cell(64, 256), 0.9))
        for row in rows_of("Qwen3-8B", SHAPE, cell, measured(gain), "abc")
    ]
    assert label(best_of(rows, Cell(512, 1024))) == "1.10 ×\nlayer\n64:68"
    assert label(best_of(rows, Cell(64, 256))) == "0.90 ×\nlayer\n64:68"
    draw(rows, tmp_path / "map.png", title="Qwen3-8B, some GPU")
    assert (tmp_path / "map.png").stat().st_size > 10_000
