"""Keeps calibrations between starts, one JSON file for each GPU, driver, model and version of the code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decode_service.pipeline.arrangements import Arrangement, Cell
from decode_service.pipeline.calibration import Calibration, CellCalibration, StageTime, StepTime
from decode_service.pipeline.order import Cut, Lane

log = logging.getLogger(__name__)

# Of the file. Another one is not read.
FORMAT = 2


@dataclass(frozen=True)
class CalibrationKey:
    """What measurements hold for. With any other value they are measured again."""

    gpu_name: str
    num_sm: int
    driver: str
    # Fingerprint or shape.
    model: str
    # Version of whatever changes stage times: kernels, cuts.
    code: str

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return f"pipeline-{re.sub(r'[^a-z0-9]+', '-', self.gpu_name.lower()).strip('-')}-{digest}.json"


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pdserve"


def save(calibration: Calibration, key: CalibrationKey, folder: Path) -> Path:
    """Replaces the key's file as a whole: readers see the old one or the new one. Safe to repeat.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / key.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "key": asdict(key), "cells": [_cell_to_json(cell) for cell in calibration.cells]}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def load(key: CalibrationKey, folder: Path) -> Calibration | None:
    """What was saved for this key. None if there is nothing, or nothing that can be used; that is logged."""
    path = folder / key.file_name
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        if content["key"] != asdict(key):
            raise ValueError(f"it is for {content['key']}")
        return Calibration(tuple(_cell_from_json(cell) for cell in content["cells"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("calibration file %s is ignored (%s: %s): measuring again", path, type(error).__name__, error)
        return None


def _cell_to_json(cell: CellCalibration) -> dict[str, Any]:
    return {
        **cell.cell._asdict(),
        "sequential_s": cell.sequential_s,
        "head_s": cell.head_s,
        "stages": [{**one._asdict(), "cut": one.cut.value, "lane": one.lane.value} for one in cell.stages],
        "steps": [{**one._asdict(), "cut": one.cut.value, "seconds": seconds} for one, seconds in cell.steps],
    }


def _cell_from_json(content: dict[str, Any]) -> CellCalibration:
    return CellCalibration(
        Cell(_count(content["num_seqs"]), _count(content["context"])),
        _seconds(content["sequential_s"]),
        tuple(
            StageTime(
                Cut(one["cut"]),
                Lane(one["lane"]),
                _count(one["num_sm"]),
                _seconds(one["seconds"]),
                None if one["first_s"] is None else _seconds(one["first_s"]),
                None if one["last_s"] is None else _seconds(one["last_s"]),
            )
            for one in content["stages"]
        ),
        tuple(
            StepTime(
                Arrangement(Cut(one["cut"]), _count(one["attention_sm"]), _count(one["ffn_sm"])),
                _seconds(one["seconds"]),
            )
            for one in content["steps"]
        ),
        _seconds(content["head_s"]),
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no time")
    return float(value)
