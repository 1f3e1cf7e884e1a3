"""What the pipeline's policy is asked and what it answers. Plain values."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from decode_service.pipeline.arrangements import Arrangement, Cell


class Mode(Enum):
    """What was asked for."""

    AUTO = "auto"
    STATIC = "static"
    DISABLED = "disabled"


class Purpose(Enum):
    CHOICE = "choice"
    # One step in another way than the chosen one, to compare.
    PROBE = "probe"
    # Whoever runs it also measures how long each lane is busy; its step time does not count.
    SAMPLE = "sample"


class Run(NamedTuple):
    """How one step shall run. Goes back to the policy with what was measured."""

    cell: Cell
    # None: sequential.
    arrangement: Arrangement | None
    purpose: Purpose


class Reason(Enum):
    """Why steps are sequential, or why the choice changed."""

    NOT_CALIBRATED = "no stage of this or of a similar batch was measured"
    SINGLE_SEQUENCE = "one sequence is not two micro-batches"
    MEASURING = "no pipelined step was measured yet"
    SEQUENTIAL_IS_FASTER = "no arrangement is expected to be faster"
    LOSS_AGAINST_SEQUENTIAL = "pipelined steps turned out slower than sequential ones"
    NO_GAIN = "the change did not bring what was predicted"
    PREDICTED_GAIN = "a gain was predicted for several windows"


class Change(NamedTuple):
    """A cell's choice changed."""

    cell: Cell
    before: Arrangement | None
    after: Arrangement | None
    reason: Reason

    @property
    def is_rebalance(self) -> bool:
        """SMs moved between the lanes."""
        return not self.is_switch and self.before != self.after

    @property
    def is_switch(self) -> bool:
        """From or to sequential."""
        return (self.before is None) != (self.after is None)
