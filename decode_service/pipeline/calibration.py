"""What was measured of the pipeline on one GPU with one model. Plain values, in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from decode_service.pipeline.arrangements import Arrangement, Cell
from decode_service.pipeline.order import Cut, Lane


class StageTime(NamedTuple):
    """Seconds of one stage of one of two micro-batches, with so many SMs and nothing beside it."""

    cut: Cut
    lane: Lane
    num_sm: int
    seconds: float
    # Of the lane's first and last stage, where they do something else: embedding, final norm.
    first_s: float | None = None
    last_s: float | None = None

    @property
    def ends(self) -> tuple[float, float, float]:
        """Seconds of the first stage, of those between, and of the last."""
        first_s = self.seconds if self.first_s is None else self.first_s
        return first_s, self.seconds, self.seconds if self.last_s is None else self.last_s

    def relative_to(self, unit_s: float) -> StageTime:
        """The same times in units of so many seconds."""
        first, middle, last = (seconds / unit_s for seconds in self.ends)
        return StageTime(self.cut, self.lane, self.num_sm, middle, first, last)


class StepTime(NamedTuple):
    """Seconds of a whole pipelined step."""

    arrangement: Arrangement
    seconds: float


@dataclass(frozen=True)
class CellCalibration:
    cell: Cell
    # Seconds of a step of the whole batch without the pipeline.
    sequential_s: float
    stages: tuple[StageTime, ...] = ()
    steps: tuple[StepTime, ...] = ()
    # Of the sequential step, the head, which has the whole device in a pipelined one as well.
    head_s: float = 0.0


@dataclass(frozen=True)
class Calibration:
    cells: tuple[CellCalibration, ...] = ()
