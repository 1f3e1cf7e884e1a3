"""In which order a pipelined step runs its stages, and how long that takes. Knows no device: stages are names.

A step's batch is cut into micro-batches. Two lanes work at the same time, each on one stage after the other; a stage
waits for those of the other lane that it reads from. With two micro-batches and cut `LAYER` (A: attention, F: FFN;
layer, micro-batch):

    attention  A0,0  A0,1  A1,0  A1,1  A2,0  …
    ffn              F0,0  F0,1  F1,0  F1,1  …
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

# Of a pipelined step.
NUM_MICRO_BATCHES = 2


class Lane(Enum):
    ATTENTION = "attention"
    FFN = "ffn"


class Cut(Enum):
    """What belongs to which lane."""

    # Attention: norm, QKV, rotation, KV write, attention, output projection. FFN: norm, MLP, at the end the last norm.
    LAYER = "layer"
    # Attention: paged attention alone. FFN: every dense operation around it, so one stage more than there are layers.
    ATTENTION_CORE = "attention-core"


class Stage(NamedTuple):
    """`layer` counts the lane's stages: with `ATTENTION_CORE` the FFN lane's are 0 to num_layers, ends included."""

    lane: Lane
    layer: int
    micro_batch: int


class Step(NamedTuple):
    """A stage, and those of the other lane that must have ended before it starts."""

    stage: Stage
    waits: tuple[Stage, ...]


@dataclass(frozen=True)
class Order:
    """`steps` is the order in which one thread may enqueue: what a stage waits for comes before it."""

    cut: Cut
    num_layers: int
    num_micro_batches: int
    steps: tuple[Step, ...]

    def lane(self, lane: Lane) -> tuple[Step, ...]:
        """The lane's stages in the order in which it runs them."""
        return tuple(step for step in self.steps if step.stage.lane is lane)

    def num_stages(self, lane: Lane) -> int:
        """Of one micro-batch on this lane."""
        return self.num_layers + (self.cut is Cut.ATTENTION_CORE and lane is Lane.FFN)

    def is_read(self, stage: Stage) -> bool:
        """Whether the other lane waits for this stage: all but the last of each micro-batch."""
        return stage != Stage(Lane.FFN, self.num_stages(Lane.FFN) - 1, stage.micro_batch)


@functools.cache
def order(cut: Cut, num_layers: int, num_micro_batches: int) -> Order:
    """The order for a model of this many layers; both counts are at least 1."""
    return Order(cut, num_layers, num_micro_batches, tuple(_steps(cut, num_layers, num_micro_batches)))


def _steps(cut: Cut, num_layers: int, num_micro_batches: int) -> Iterator[Step]:
    first, second = (Lane.ATTENTION, Lane.FFN) if cut is Cut.LAYER else (Lane.FFN, Lane.ATTENTION)
    rounds = [(lane, layer) for layer in range(num_layers) for lane in (first, second)]
    if cut is Cut.ATTENTION_CORE:
        rounds.append((Lane.FFN, num_layers))
    before: tuple[Lane, int] | None = None
    for lane, layer in rounds:
        for micro_batch in range(num_micro_batches):
            yield Step(Stage(lane, layer, micro_batch), () if before is None else (Stage(*before, micro_batch),))
        before = (lane, layer)


class Span(NamedTuple):
    """Seconds from the start of the step."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """When each stage ran, or would run."""

    spans: dict[Stage, Span]

    @property
    def makespan_s(self) -> float:
        return max(span.end_s for span in self.spans.values())

    def busy_s(self, lane: Lane) -> float:
        return sum(span.end_s - span.start_s for stage, span in self.spans.items() if stage.lane is lane)

    def bubble_share(self, lane: Lane) -> float:
        """Of the makespan, how much the lane stands idle; 0 to 1."""
        makespan_s = self.makespan_s
        return 1 - self.busy_s(lane) / makespan_s if makespan_s else 0.0


def timeline(order: Order, seconds: Callable[[Stage], float]) -> Timeline:
    """When each stage runs if it takes so many seconds and starts as soon as its lane and its input are there."""
    spans: dict[Stage, Span] = {}
    free_s = dict.fromkeys(Lane, 0.0)
    for stage, waits in order.steps:
        start_s = max([free_s[stage.lane], *(spans[wait].end_s for wait in waits)])
        free_s[stage.lane] = start_s + seconds(stage)
        spans[stage] = Span(start_s, free_s[stage.lane])
    return Timeline(spans)
