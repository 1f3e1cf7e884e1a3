"""Captures a CUDA graph a slice at a time, so that a thread that serves can do so between two steps.

What the thread enqueues on other streams meanwhile is not captured, and runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


class SlicedCapture(Generic[Result]):
    """`stages` enqueues what is captured, and pauses where another slice may begin.

    Captures of one `pool` share the memory of each stream, so `stream` is best the same for all of them.
    """

    def __init__(self, stages: Generator[None, None, Result], pool: Any, stream: torch.cuda.Stream) -> None:
        self._stages = stages
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Relaxed: what this thread does between slices is nothing that a capture could break.
            self._graph.capture_begin(pool=pool, capture_error_mode="relaxed")

    def advance(self, seconds: float) -> tuple[torch.cuda.CUDAGraph, Result] | None:
        """Goes on for about so long. Graph and result once all is captured; whatever a stage raises ends it."""
        until_s = time.monotonic() + seconds
        with torch.cuda.stream(self._stream):
            try:
                while time.monotonic() < until_s:
                    next(self._stages)
            except StopIteration as end:
                self._graph.capture_end()
                return self._graph, end.value
            except BaseException:
                self.abandon()
                raise
        return None

    def abandon(self) -> None:
        """Ends the capture without a graph."""
        self._stages.close()
        # A capture that broke says so once more.
        with torch.cuda.stream(self._stream), contextlib.suppress(RuntimeError):
            self._graph.capture_end()
