"""What is known of one cell: the share of a sequential step that a step takes in each arrangement. Below 1 is a gain.

    share = makespan of the order, by stage times × residual: what measured steps took, over their makespan

As shares, so that what slows all of the device alike (heat, power) changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from decode_service.pipeline.arrangements import Arrangement, Arrangements
from decode_service.pipeline.average import Average
from decode_service.pipeline.calibration import CellCalibration
from decode_service.pipeline.order import Cut, Lane
from decode_service.pipeline.stage_times import StageTimes


class Predictions:
    """Of one cell. Starts from its calibration, or from another cell's predictions."""

    def __init__(self, arrangements: Arrangements, num_layers: int, calibration: CellCalibration | None) -> None:
        # Some of it was measured in this cell.
        self.is_own = calibration is not None
        self._arrangements = arrangements
        self._stages: dict[Cut, StageTimes] = {}
        self._residuals: dict[Arrangement, Average] = {}
        # Seconds of a step of the whole batch without the pipeline.
        self.sequential: Average | None = None
        if calibration is None:
            return
        self.sequential = Average(calibration.sequential_s, num_values=0)
        head = calibration.head_s / calibration.sequential_s
        for cut in Cut:
            times = [time.relative_to(calibration.sequential_s) for time in calibration.stages if time.cut is cut]
            if {time.lane for time in times} == set(Lane):
                self._stages[cut] = StageTimes(cut, num_layers, times, head=head)
        for arrangement, seconds in calibration.steps:
            if arrangement in arrangements.all:
                self.add_step(arrangement, seconds / calibration.sequential_s)

    def lend(self) -> Predictions:
        """For a cell without data: the same shares as guesses, which its first measurements replace."""
        lent = copy.copy(self)
        lent.is_own = False
        lent.sequential = None
        lent._stages = {cut: stages.lend() for cut, stages in self._stages.items()}
        lent._residuals = {one: residual.guess() for one, residual in self._residuals.items()}
        return lent

    def share(self, arrangement: Arrangement) -> float | None:
        """None where neither stages nor a step were measured."""
        residual = self._residual(arrangement)
        if residual is None and arrangement.cut not in self._stages:
            return None
        return self._makespan(arrangement) * (1.0 if residual is None else residual.value)

    def known(self) -> dict[Arrangement, float]:
        """Shares of the arrangements in which steps were measured."""
        return {one: self._makespan(one) * residual.value for one, residual in self._residuals.items()}

    def add_sequential(self, seconds: float) -> None:
        if self.sequential is None:
            self.sequential = Average(seconds)
        else:
            self.sequential.add(seconds)

    def restart_sequential(self) -> None:
        """What was measured of sequential steps is old: the next one replaces that."""
        if self.sequential is not None:
            self.sequential = self.sequential.guess()

    def add_step(self, arrangement: Arrangement, share: float) -> None:
        """A step took this share of a sequential one."""
        residual = self._residuals.setdefault(arrangement, Average(1.0, num_values=0))
        residual.add(share / self._makespan(arrangement))
        self.is_own = True

    def restart(self, arrangement: Arrangement) -> None:
        """What was measured of it is old: its next step replaces that."""
        if arrangement in self._residuals:
            self._residuals[arrangement] = self._residuals[arrangement].guess()

    def add_stages(self, arrangement: Arrangement, busy_s: Mapping[Lane, float]) -> None:
        """In a step each lane was busy for so many seconds."""
        stages = self._stages.get(arrangement.cut)
        if stages is None or self.sequential is None or not self._arrangements.is_partitioned(arrangement):
            return
        was_sampled = stages.is_sampled
        before = {one: self._makespan(one) for one in self._residuals if one.cut is arrangement.cut}
        sequential_s = self.sequential.value
        busy = {lane: seconds / sequential_s for lane, seconds in busy_s.items()}
        stages.add_busy(arrangement.attention_sm, arrangement.ffn_sm, busy)
        if stages.is_sampled and not was_sampled:
            # The first samples show how much the lanes slow each other, which residuals contained. Later ones are news.
            for one, makespan in before.items():
                self._residuals[one].value *= makespan / self._makespan(one)

    def _residual(self, arrangement: Arrangement) -> Average | None:
        """Its own, else that of the nearest pair of the same cut."""
        own = self._residuals.get(arrangement)
        if own is not None or not self._arrangements.is_partitioned(arrangement):
            return own
        pairs = [one for one in self._arrangements.pairs(arrangement.cut) if one in self._residuals]
        nearest = min(pairs, key=lambda one: abs(one.attention_sm - arrangement.attention_sm), default=None)
        return None if nearest is None else self._residuals[nearest]

    def _makespan(self, arrangement: Arrangement) -> float:
        """In sequential steps; 1 where stages were not measured. Lanes that share all SMs promise no overlap."""
        stages = self._stages.get(arrangement.cut)
        if stages is None:
            return 1.0
        overlaps = self._arrangements.is_partitioned(arrangement)
        return stages.makespan(arrangement.attention_sm, arrangement.ffn_sm, overlaps=overlaps)
