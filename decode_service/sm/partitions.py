"""What splitting a device's SMs in two means, whoever does it: the states that it can be in, and the seam to a driver.

A *partition* is a set of SMs with a stream whose kernels run on those alone. Knows no CUDA and no PyTorch.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple, Protocol


class State(Enum):
    """Where the partitions stand, or why there are none."""

    UNUSED = "UNUSED"
    READY = "READY"
    CLOSED = "CLOSED"
    NO_GPU = "NO_GPU"
    NO_CUDA_PYTHON = "NO_CUDA_PYTHON"
    DRIVER_TOO_OLD = "DRIVER_TOO_OLD"
    DEVICE_TOO_OLD = "DEVICE_TOO_OLD"
    TOO_FEW_SMS = "TOO_FEW_SMS"
    SPLIT_FAILED = "SPLIT_FAILED"
    STREAM_FAILED = "STREAM_FAILED"
    VERIFICATION_FAILED = "VERIFICATION_FAILED"

    @property
    def remedy(self) -> str:
        """What to do about it; empty when nothing is wrong."""
        return _REMEDIES.get(self, "")


_SEQUENTIAL = "--decode-pipeline disabled does without partitions"
_REMEDIES = {
    State.NO_GPU: "compute on a GPU: --device cuda",
    State.NO_CUDA_PYTHON: "with a GPU: .venv/bin/pip install -e '.[gpu]'",
    State.DRIVER_TOO_OLD: "install driver 555 or later",
    State.DEVICE_TOO_OLD: "use a GPU of compute capability 8.0 or later",
    State.TOO_FEW_SMS: "ask for fewer SMs; all of them for both sides are two plain streams",
    State.SPLIT_FAILED: f"look up the driver call that is named; MIG and MPS limit what can be split; {_SEQUENTIAL}",
    State.STREAM_FAILED: f"see what else uses the device's memory; {_SEQUENTIAL}",
    State.VERIFICATION_FAILED: f"update the driver; {_SEQUENTIAL}",
}


class NoPartitions(Exception):
    """This machine cannot split a device. `state` names why."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(f"{state.name}: {reason}")
        self.state = state
        self.reason = reason


class DriverError(RuntimeError):
    """A driver call failed. The message names the call and its status."""

    def __init__(self, call: str, status: str) -> None:
        super().__init__(f"{call}: {status}")
        self.call = call
        self.status = status


class SmGroup(NamedTuple):
    """SMs that the driver has set aside. `num_sms` is the grant; `context` belongs to the driver."""

    num_sms: int
    context: Any


class PartitionDriver(Protocol):
    """One device. Every method raises DriverError where the driver refuses."""

    @property
    def num_sms(self) -> int:
        """Of the whole device."""

    @property
    def version(self) -> str:
        """The newest CUDA that it supports."""

    def split(self, attention_sm: int, ffn_sm: int) -> tuple[SmGroup, SmGroup]:
        """Disjoint groups of at least so many SMs, or neither; the FFN's is all that is left, if that is fewer.

        Numbers that leave SMs idle are multiples of what the driver grants.
        """

    def make_stream(self, group: SmGroup, priority: int) -> int:
        """The handle of a stream on the group's SMs that never waits for the default stream. Lower is more urgent."""

    def destroy_stream(self, stream: int) -> None:
        """Once it has drained."""

    def destroy(self, group: SmGroup) -> None:
        """Once its streams are destroyed."""
