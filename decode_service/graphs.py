"""CUDA graphs of decode steps: captured once for each batch bucket, replayed ever after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.engine.graphs import capture


class StepGraphs:
    """Graphs by batch size. They share memory: capture the largest first, and never run two at once."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, num_rows: int, step: Callable[[], Tensor]) -> None:
        """Runs `step` once, so that what it compiles or allocates lazily exists, and captures it."""
        step()
        torch.cuda.current_stream().synchronize()
        self._graphs[num_rows] = capture(step, self._pool)

    def replay(self, num_rows: int) -> Tensor | None:
        """Enqueues the step; returns what it computes, until the next replay does. None: not captured."""
        entry = self._graphs.get(num_rows)
        if entry is None:
            return None
        entry[0].replay()
        return entry[1]
