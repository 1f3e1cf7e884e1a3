"""How long a pipelined step takes by the times of its stages. Knows one cut in one cell, and nothing of whole steps."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence

from decode_service.pipeline.average import Average
from decode_service.pipeline.calibration import StageTime
from decode_service.pipeline.order import NUM_MICRO_BATCHES, Cut, Lane, Timeline, order, timeline

NUM_SAMPLES = 3


class StageTimes:
    """Stage times alone on the GPU, and how much more they are in pipelined steps. Any unit of time, one for all."""

    def __init__(self, cut: Cut, num_layers: int, times: Sequence[StageTime], *, head: float = 0.0) -> None:
        """`times`: at least one of each lane. `head`: what follows the stages of all micro-batches."""
        self._head = head
        self._order = order(cut, num_layers, NUM_MICRO_BATCHES)
        self._times = {lane: sorted((one for one in times if one.lane is lane), key=_num_sm) for lane in Lane}
        self._scales = {lane: Average(1.0, num_values=0) for lane in Lane}
        self._makespans: dict[tuple[int, int], float] = {}
        # The last ones of each lane, over what was measured alone. Their median counts: any one may be held up.
        self._samples: dict[Lane, list[float]] = {lane: [] for lane in Lane}

    def lend(self) -> StageTimes:
        """The same times for another cell, whose first sample replaces the scale."""
        lent = copy.copy(self)
        lent._makespans = {}
        lent._samples = {lane: [] for lane in Lane}
        lent._scales = {lane: scale.guess() for lane, scale in self._scales.items()}
        return lent

    @property
    def is_sampled(self) -> bool:
        """Often enough to count."""
        return len(self._samples[Lane.FFN]) == NUM_SAMPLES

    def makespan(self, attention_sm: int, ffn_sm: int, *, overlaps: bool) -> float:
        """Of a step; without overlap every stage waits for the one before."""
        key = (attention_sm, ffn_sm)
        if key not in self._makespans:
            spans = self._timeline(*key, {lane: scale.value for lane, scale in self._scales.items()})
            total = sum(spans.busy_s(lane) for lane in Lane)
            self._makespans[key] = (spans.makespan_s if overlaps else total) + self._head
        return self._makespans[key]

    def busy(self, attention_sm: int, ffn_sm: int) -> dict[Lane, float]:
        """How long each lane would be busy in a step, by what was measured alone."""
        alone = self._timeline(attention_sm, ffn_sm, dict.fromkeys(Lane, 1.0))
        return {lane: alone.busy_s(lane) for lane in Lane}

    def add_busy(self, attention_sm: int, ffn_sm: int, busy: Mapping[Lane, float]) -> None:
        """A step was measured in which the lanes were busy for so long."""
        alone = self.busy(attention_sm, ffn_sm)
        for lane, samples in self._samples.items():
            samples[:] = [*samples[1 - NUM_SAMPLES :], busy[lane] / alone[lane]]
        if self.is_sampled:
            for lane, samples in self._samples.items():
                self._scales[lane].add(statistics.median(samples))
            self._makespans.clear()

    def _timeline(self, attention_sm: int, ffn_sm: int, scales: Mapping[Lane, float]) -> Timeline:
        num_sm = {Lane.ATTENTION: attention_sm, Lane.FFN: ffn_sm}
        seconds: dict[tuple[Lane, int], float] = {}
        for lane in Lane:
            first, middle, last = (scales[lane] * one for one in _at(self._times[lane], num_sm[lane]))
            num_stages = self._order.num_stages(lane)
            seconds |= {(lane, layer): middle for layer in range(num_stages)}
            seconds[lane, 0] = first
            seconds[lane, num_stages - 1] = last
        return timeline(self._order, lambda stage: seconds[stage.lane, stage.layer])


def _num_sm(time: StageTime) -> int:
    return time.num_sm


def _at(times: Sequence[StageTime], num_sm: int) -> tuple[float, float, float]:
    """First, middle and last stage with so many SMs: linear in 1/SMs between what was measured.

    With fewer SMs than were measured, time grows as they shrink; with more it stays.
    """
    lower = next((time for time in reversed(times) if time.num_sm <= num_sm), times[0])
    upper = next((time for time in times if time.num_sm >= num_sm), times[-1])
    if lower.num_sm > num_sm:
        share, grown = 0.0, lower.num_sm / num_sm
    elif lower is upper:
        share, grown = 0.0, 1.0
    else:
        share, grown = (1 / lower.num_sm - 1 / num_sm) / (1 / lower.num_sm - 1 / upper.num_sm), 1.0
    first, middle, last = (
        grown * (low + share * (high - low)) for low, high in zip(lower.ends, upper.ends, strict=True)
    )
    return first, middle, last
