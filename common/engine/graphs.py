"""Captures work on the current stream as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Called with (captured, to be captured).
Progress = Callable[[int, int], None]


def capture(step: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of what `step` enqueues, and its result, which every replay computes anew in the same place.

    `step` has run before, so that nothing is compiled or loaded while it is captured. Graphs of one `pool` share
    memory: never replay two of them at once.
    """
    graph = torch.cuda.CUDAGraph()
    # Without `torch.cuda.graph`, which collects garbage every time. Other threads may use the device meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = step()
    except BaseException:
        # What broke the capture says more than that it cannot be ended.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, result
