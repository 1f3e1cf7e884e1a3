"""Calibrations between starts: what is read back, and what is not."""

import json
import os
from dataclasses import replace

import pytest

from decode_service.pipeline.arrangements import Arrangement, Cell
from decode_service.pipeline.calibration import Calibration, CellCalibration, StageTime, StepTime
from decode_service.pipeline.calibration_file import FORMAT, CalibrationKey, load, save
from decode_service.pipeline.order import Cut, Lane

KEY = CalibrationKey(gpu_name="NVIDIA H200", num_sm=132, driver="580.159", model="8b-bf16", code="3")
CALIBRATION = Calibration(
    (
        CellCalibration(
            Cell(1024, 512),
            0.016,
            (StageTime(Cut.LAYER, Lane.ATTENTION, 64, 2e-4), StageTime(Cut.LAYER, Lane.FFN, 68, 3e-4, 1e-4, 5e-4)),
            (StepTime(Arrangement(Cut.LAYER, 64, 68), 0.015),),
            0.002,
        ),
    )
)


def test_what_was_saved_is_loaded_and_nothing_else_lies_beside_it(tmp_path):
    path = save(CALIBRATION, KEY, tmp_path / "deep")
    save(CALIBRATION, KEY, tmp_path / "deep")
    assert load(KEY, tmp_path / "deep") == CALIBRATION
    assert list((tmp_path / "deep").iterdir()) == [path]
    assert path.name.startswith("pipeline-nvidia-h200-")


@pytest.mark.parametrize("other", [{"driver": "590"}, {"num_sm": 78}, {"model": "8b"}, {"code": "4"}])
def test_whatever_else_it_is_for_there_is_nothing(tmp_path, caplog, other):
    save(CALIBRATION, KEY, tmp_path)
    assert load(replace(KEY, **other), tmp_path) is None
    assert not caplog.records


def broken(content: dict, **changes) -> str:
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-20],
        lambda content: "[]",
        lambda content: "[" * 100_000,
        lambda content: broken(content, format=FORMAT - 1),
        lambda content: broken(content, key=content["key"] | {"driver": "1"}),
        lambda content: broken(content, cells=[{}]),
        lambda content: broken(content, cells=[content["cells"][0] | {"sequential_s": float("nan")}]),
        lambda content: broken(content, cells=[content["cells"][0] | {"num_seqs": 0}]),
        lambda content: broken(content, cells=[content["cells"][0] | {"steps": [{"cut": "diagonal"}]}]),
        lambda content: "\x00\xff",
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning_that_names_it(tmp_path, caplog, damage):
    path = save(CALIBRATION, KEY, tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    assert load(KEY, tmp_path) is None
    assert str(path) in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(CALIBRATION, KEY, tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(Calibration(), KEY, tmp_path)
    assert load(KEY, tmp_path) == CALIBRATION
    assert list(tmp_path.iterdir()) == [path]
