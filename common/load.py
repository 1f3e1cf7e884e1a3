"""What a worker tells about its load, and the moving average behind its step time. Knows no tensors."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from common.clock import Clock

# Weight of the newest step in the moving average.
NEWEST = 0.1


class PressureReason(Enum):
    """Why a decode worker is to get no new prompts for now; the values name it in metrics."""

    # One that only newer workers know.
    UNSPECIFIED = "unspecified"
    WAITING_RESERVATIONS = "waiting_reservations"
    FEW_FREE_BLOCKS = "few_free_blocks"
    SLOW_STEPS = "slow_steps"


class Load(NamedTuple):
    """One snapshot; the counts mean what WatchLoadResponse says."""

    step_counter: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_reserved: int = 0
    num_waiting_tokens: int = 0
    step_ms: float = 0.0
    token_ms: float = 0.0
    pressure: tuple[PressureReason, ...] = ()

    def differs_much_from(self, other: Load) -> bool:
        """Worth telling at once, rather than with the next heartbeat."""
        return (
            self.num_running != other.num_running
            or self.num_waiting != other.num_waiting
            or self.num_reserved != other.num_reserved
            or self.pressure != other.pressure
            or abs(self.num_free_blocks - other.num_free_blocks) * 20 > max(other.num_free_blocks, 1)
        )


class TokenPace:
    """What one prompt token takes, in milliseconds: over recent steps, each weighing as much as it has tokens."""

    def __init__(self) -> None:
        self._mean_ms = 0.0
        self._mean_tokens = 0.0

    def record(self, ms: float, num_tokens: int) -> None:
        """A step of so many tokens took this long."""
        self._mean_ms += NEWEST * (ms - self._mean_ms)
        self._mean_tokens += NEWEST * (num_tokens - self._mean_tokens)

    @property
    def token_ms(self) -> float:
        """0 before the first step."""
        return self._mean_ms / self._mean_tokens if self._mean_tokens else 0.0


class StepTimer:
    """Total and exponentially weighted mean of the duration of steps. As a context manager it times one itself."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s = 0.0
        self.mean_ms = 0.0
        self.last_ms = 0.0
        self.total_ms = 0.0
        self.num_steps = 0

    def record(self, seconds: float) -> None:
        """A step took this long."""
        self.last_ms = seconds * 1e3
        self.mean_ms = self.last_ms if not self.num_steps else self.mean_ms + NEWEST * (self.last_ms - self.mean_ms)
        self.total_ms += self.last_ms
        self.num_steps += 1

    def __enter__(self) -> StepTimer:
        self._started_s = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.record(self._clock() - self._started_s)
