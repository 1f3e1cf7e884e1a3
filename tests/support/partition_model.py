"""A GPU in two partitions, as arithmetic: how long stages and steps take. Shapes and curves resemble an H200's.

What the policy is not told, and has to find out: how much the lanes slow each other, noise, and drift.
"""

import math
import random
from dataclasses import dataclass, field, replace

from decode_service.pipeline.arrangements import Arrangement, Arrangements, Cell
from decode_service.pipeline.calibration import CellCalibration, StageTime, StepTime
from decode_service.pipeline.order import Cut, Lane, Stage, Timeline, order, timeline

NUM_SM = 132
PAIRS = [(16, 116), (32, 100), (48, 84), (64, 68), (80, 52), (96, 36)]
ARRANGEMENTS = Arrangements([Arrangement(cut, *pair) for cut in Cut for pair in [*PAIRS, (NUM_SM, NUM_SM)]], NUM_SM)

# Streaming reads, measured: SMs, bytes a second.
BANDWIDTH = {
    0: 0,
    16: 1.06e12,
    32: 1.98e12,
    48: 2.77e12,
    64: 3.32e12,
    80: 3.62e12,
    96: 3.78e12,
    112: 4.10e12,
    132: 4.21e12,
}
LAUNCH_S = 3e-6
# Dense operations of a layer work on tiles of so many rows; each of so many columns takes an SM so long.
TILE_ROWS, TILE_S = 128, 25e-6


def bandwidth(num_sm: float) -> float:
    below = max(n for n in BANDWIDTH if n <= num_sm)
    above = min(n for n in BANDWIDTH if n >= num_sm)
    share = (num_sm - below) / (above - below) if above > below else 0.0
    return BANDWIDTH[below] + share * (BANDWIDTH[above] - BANDWIDTH[below])


@dataclass
class PartitionModel:
    num_layers: int = 16
    kv_bytes: float = 4096.0
    # A layer's dense part: bytes of weights, tiles along the columns, and what the layer cut gives to attention.
    weight_bytes: float = 386e6
    num_column_tiles: int = 288
    projection_share: float = 0.22
    # In dense stages of a middle layer.
    head_layers: float = 1.5
    # How much slower stages are while the other lane works too.
    contention: float = 1.04
    # What nobody foresees: an arrangement that is slower than its stages say.
    surprises: dict[Arrangement, float] = field(default_factory=dict)
    noise: float = 0.0
    # Share of steps that are held up, and take three times as long.
    hiccups: float = 0.0
    seed: int = 0
    # Multiplies attention; tests turn it while steps run.
    attention_drift: float = 1.0
    clock_drift: float = 1.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._steps: dict[tuple, tuple[float, dict[Lane, float]]] = {}

    def stage_s(self, cut: Cut, lane: Lane, num_sm: int, batch: int, context: int) -> float:
        """A middle layer's stage for so many sequences, alone on so many SMs."""
        attention_s = batch * context * self.kv_bytes / bandwidth(num_sm) * self.attention_drift
        share = {Lane.ATTENTION: self.projection_share, Lane.FFN: 1 - self.projection_share}[lane]
        if cut is Cut.ATTENTION_CORE:
            share = float(lane is Lane.FFN)
        tiles = math.ceil(batch / TILE_ROWS) * self.num_column_tiles * share
        dense_s = max(self.weight_bytes * share / bandwidth(num_sm), math.ceil(tiles / num_sm) * TILE_S)
        return (dense_s + (attention_s if lane is Lane.ATTENTION else 0.0) + LAUNCH_S) * self.clock_drift

    def timeline(self, arrangement: Arrangement, cell: Cell) -> Timeline:
        """Of a step of so many sequences with so much context each, without noise."""
        cut = arrangement.cut
        slower = self.surprises.get(arrangement, 1.0) * (self.contention if arrangement.attention_sm < NUM_SM else 1.0)
        num_sm = {Lane.ATTENTION: arrangement.attention_sm, Lane.FFN: arrangement.ffn_sm}
        seconds = {
            lane: slower * self.stage_s(cut, lane, num_sm[lane], cell.num_seqs // 2, cell.context) for lane in Lane
        }
        steps = order(cut, self.num_layers, 2)
        return timeline(steps, lambda stage: seconds[stage.lane] * self._work(cut, stage))

    def _work(self, cut: Cut, stage: Stage) -> float:
        """In middle stages of the lane."""
        if stage.lane is Lane.ATTENTION:
            return 1.0
        is_last = stage.layer == order(cut, self.num_layers, 2).num_stages(Lane.FFN) - 1
        if cut is Cut.LAYER:
            return 1.0 + self.head_layers * is_last
        if stage.layer == 0:
            return self.projection_share
        return 1.0 + (self.head_layers - self.projection_share) * is_last

    def step_s(self, arrangement: Arrangement | None, cell: Cell) -> float:
        """Without noise; None is sequential."""
        return self._step(arrangement, cell)[0]

    def run(self, arrangement: Arrangement | None, cell: Cell) -> tuple[float, dict[Lane, float]]:
        """A step on this GPU: seconds, and for how long each lane was busy."""
        seconds, busy_s = self._step(arrangement, cell)
        noisy = max(0.5, self._random.gauss(1.0, self.noise)) * (3 if self._random.random() < self.hiccups else 1)
        return seconds * noisy, {lane: busy * noisy for lane, busy in busy_s.items()}

    def _step(self, arrangement: Arrangement | None, cell: Cell) -> tuple[float, dict[Lane, float]]:
        key = (arrangement, cell, self.contention, self.attention_drift, self.clock_drift)
        if key not in self._steps:
            self._steps[key] = self._compute(arrangement, cell)
        return self._steps[key]

    def _compute(self, arrangement: Arrangement | None, cell: Cell) -> tuple[float, dict[Lane, float]]:
        if arrangement is None:
            attention_s, ffn_s = (self.stage_s(Cut.LAYER, lane, NUM_SM, *cell) for lane in Lane)
            return self.num_layers * (attention_s + ffn_s) + self.head_layers * ffn_s, {}
        spans = self.timeline(arrangement, cell)
        busy_s = {lane: spans.busy_s(lane) for lane in Lane}
        # Lanes that share all SMs gain nothing.
        return spans.makespan_s if arrangement.attention_sm < NUM_SM else sum(busy_s.values()), busy_s

    def best(self, cell: Cell) -> Arrangement | None:
        return min([None, *ARRANGEMENTS.all], key=lambda one: self.step_s(one, cell))

    def calibrate(self, cell: Cell, *, tried: tuple[Arrangement, ...] = ()) -> CellCalibration:
        """What one measures of this GPU beforehand: every lane alone, and some whole steps."""
        alone = replace(self, contention=1.0, surprises={})
        stages = []
        for cut in Cut:
            for lane in Lane:
                for num_sm in (16, 48, 84, 116, 132):
                    middle_s = alone.stage_s(cut, lane, num_sm, cell.num_seqs // 2, cell.context)
                    first, last = (
                        alone._work(cut, Stage(lane, layer, 0))
                        for layer in (0, order(cut, self.num_layers, 2).num_stages(lane) - 1)
                    )
                    stages.append(StageTime(cut, lane, num_sm, middle_s, middle_s * first, middle_s * last))
        steps = tuple(StepTime(one, self.run(one, cell)[0]) for one in tried)
        return CellCalibration(cell, self.run(None, cell)[0], tuple(stages), steps)
