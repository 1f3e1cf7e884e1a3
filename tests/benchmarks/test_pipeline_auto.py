"""Mode auto beside the sequential step: that all of it runs, and that auto keeps what it learns between its windows."""

from __future__ import annotations

import pytest
import torch

from benchmarks import pipeline_auto
from benchmarks.offline import OfflineEngine
from benchmarks.pipeline_auto import calibrate, measure, options_of
from benchmarks.pipeline_ways import AUTO, SEQUENTIAL, Batch
from benchmarks.shapes import TINY
from common.engine.loop import on_device
from decode_service.pipeline.arrangements import Cell
from decode_service.sm.green_manager import GreenManager
from tests.fakes.gpu import FakeGpu

SETTINGS = {"device": "cpu", "num_blocks": 128, "max_num_seqs": 4, "decode_pipeline": "auto"}
CELL = Cell(4, 192)


@pytest.fixture(autouse=True)
def one_thread():
    """Small products take many times as long where threads have to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    made = FakeGpu()
    monkeypatch.setattr(GreenManager, "of", lambda device: GreenManager(made, made))
    return made


def test_without_a_gpu_auto_says_why_it_is_sequential(capsys):
    pipeline_auto.run(["--cpu", "--turns", "1", "--most-steps", "32"])
    shown = capsys.readouterr().out
    assert "chosen=sequential  reason=NO_GPU" in shown
    assert "profiling_cost=" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_a_static_split_is_measured_beside_auto(tmp_path):
    engine = OfflineEngine(TINY, **SETTINGS, decode_pipeline_folder=str(tmp_path))
    calibrate(engine)
    static = options_of(["--cpu", "--static", "layer", "64", "68"]).static
    row = measure(engine, CELL, static=static, num_turns=1, most_steps=32)
    assert (row["batch"], row["context"], row["reason"]) == (4, 192, "NOT_CALIBRATED")
    assert row["static_gain"] > 0
    # There was no time for a choice.
    assert row["settled_steps"] is None


@pytest.mark.usefixtures("gpu")
def test_what_auto_has_learned_outlives_other_ways(tmp_path):
    engine = OfflineEngine(TINY, **SETTINGS, decode_pipeline_folder=str(tmp_path))
    batch = Batch(engine, CELL, {})
    with on_device(engine.parts.device):
        batch.run(AUTO, 8)
        policy = engine.engine.pipeline._policy
        batch.run(SEQUENTIAL, 8)
        assert engine.engine.pipeline._policy is None
        batch.run(AUTO, 8)
        assert engine.engine.pipeline._policy is policy is not None
        batch.close()


@pytest.mark.usefixtures("gpu")
def test_a_calibration_that_failed_ends_the_run(tmp_path, monkeypatch):
    engine = OfflineEngine(
        TINY, **SETTINGS | {"max_num_seqs": 32, "num_blocks": 512}, decode_pipeline_folder=str(tmp_path)
    )

    def fail(*_, **__):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr("decode_service.pipeline.stage_measuring.StageMeasuring.layers_s", fail)
    with pytest.raises(SystemExit, match="the calibration failed: out of memory"):
        calibrate(engine)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["7B"], ["8B", "--context", "64"], ["8B", "--static", "half", "64", "68"]])
def test_what_cannot_be_meant_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        options_of(arguments)
    assert "error" in capsys.readouterr().err
