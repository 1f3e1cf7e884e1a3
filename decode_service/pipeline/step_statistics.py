"""What is known of the steps so far: counts of all of them, and times of the stages of those that were profiled."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from decode_service.pipeline.order import Lane, Order, Span, Stage, Timeline

# Stages whose times the percentiles are of, for each lane.
NUM_STAGES = 4096


class LaneStatistics:
    """One lane in the profiled steps."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._waited_s = 0.0
        self._stages_s: deque[float] = deque(maxlen=NUM_STAGES)

    def add(self, spans: Sequence[Span], waited_s: float) -> None:
        """The stages of one step, and how long they waited for the lane, all together, once their input was there."""
        seconds = [span.end_s - span.start_s for span in spans]
        self._busy_s += sum(seconds)
        self._waited_s += waited_s
        self._stages_s.extend(seconds)

    def busy_ms(self, num_steps: int) -> float:
        """Mean of a step."""
        return self._busy_s / num_steps * 1e3 if num_steps else 0.0

    def occupancy(self, steps_s: float) -> float:
        """Share of the steps in which it was busy."""
        return self._busy_s / steps_s if steps_s else 0.0

    def queue_depth(self, steps_s: float) -> float:
        """Mean number of stages that had their input and waited for the lane (Little's law)."""
        return self._waited_s / steps_s if steps_s else 0.0

    def stage_ms(self, percent: int) -> float:
        """A percentile over its latest stages, whatever their layer."""
        if len(self._stages_s) < 2:
            return sum(self._stages_s) * 1e3
        return statistics.quantiles(self._stages_s, n=100, method="inclusive")[percent - 1] * 1e3


class PipelineStatistics:
    def __init__(self) -> None:
        self.num_steps = 0
        self.num_pipelined = 0
        self.num_rebalances = 0
        self.num_switches = 0
        self.total_tokens = 0
        self.num_profiled = 0
        self.lanes = {lane: LaneStatistics() for lane in Lane}
        self._steps_s = 0.0
        # Of the profiled ones.
        self.profiled_s = 0.0

    def add_step(self, seconds: float, num_tokens: int, *, is_pipelined: bool) -> None:
        self.num_steps += 1
        self.num_pipelined += is_pipelined
        self._steps_s += seconds
        self.total_tokens += num_tokens

    def add_profile(self, order: Order, spans: dict[Stage, Span]) -> None:
        """A step whose stages were timed."""
        waited_s = dict.fromkeys(Lane, 0.0)
        for stage, waits in order.steps:
            ready_s = max((spans[wait].end_s for wait in waits), default=0.0)
            waited_s[stage.lane] += max(0.0, spans[stage].start_s - ready_s)
        for lane, lane_statistics in self.lanes.items():
            lane_statistics.add([spans[step.stage] for step in order.lane(lane)], waited_s[lane])
        self.num_profiled += 1
        self.profiled_s += Timeline(spans).makespan_s

    @property
    def step_ms(self) -> float:
        """Mean of all steps."""
        return self._steps_s / self.num_steps * 1e3 if self.num_steps else 0.0

    @property
    def bubble_share(self) -> float:
        """Of both lanes' time in profiled steps, what neither a stage of one nor of the other filled."""
        if not self.num_profiled:
            return 0.0
        return 1 - statistics.mean(lane.occupancy(self.profiled_s) for lane in self.lanes.values())
