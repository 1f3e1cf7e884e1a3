"""When the stages of one step began and ended: by the host's clock, or by events in the streams that run them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import torch

from decode_service.pipeline.order import Span, Stage


class StageClock(Protocol):
    def around(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        """Entered while the stage is computed, or enqueued."""

    def spans(self) -> dict[Stage, Span]:
        """Of the last step; once it has ended."""


class HostClock:
    """Where a stage is done when its call returns."""

    def __init__(self) -> None:
        self._spans: dict[Stage, Span] = {}

    @contextlib.contextmanager
    def around(self, stage: Stage) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self._spans[stage] = Span(start_s, time.perf_counter())

    def spans(self) -> dict[Stage, Span]:
        return _from_first(self._spans)


class DeviceClock:
    """Events that a CUDA graph records anew with every replay, if the step is captured."""

    def __init__(self) -> None:
        self._events: dict[Stage, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextlib.contextmanager
    def around(self, stage: Stage) -> Iterator[None]:
        # Inside a capture, events that are not external are edges of the graph and have no time.
        external = torch.cuda.is_current_stream_capturing()
        start, end = (torch.cuda.Event(enable_timing=True, external=external) for _ in range(2))
        self._events[stage] = start, end
        start.record()
        yield
        end.record()

    def spans(self) -> dict[Stage, Span]:
        zero = next(iter(self._events.values()))[0]
        return _from_first(
            {
                stage: Span(*(zero.elapsed_time(event) * 1e-3 for event in events))
                for stage, events in self._events.items()
            }
        )


def stage_clock(device: torch.device) -> StageClock:
    return DeviceClock() if device.type == "cuda" else HostClock()


def _from_first(spans: dict[Stage, Span]) -> dict[Stage, Span]:
    first_s = min(span.start_s for span in spans.values())
    return {stage: Span(start_s - first_s, end_s - first_s) for stage, (start_s, end_s) in spans.items()}
