"""CUDA graphs of decode steps: captured once, replayed ever after."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from common.engine.graphs import capture

Key = TypeVar("Key", bound=Hashable)


class StepGraphs(Generic[Key]):
    """Graphs share memory: capture the largest first, and never run two at once."""

    def __init__(self) -> None:
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def capture(self, key: Key, step: Callable[[], tuple[Tensor, ...]], *, warm_up: bool = True) -> None:
        """Captures `step`; before that, runs it once, so that what it compiles or allocates lazily exists."""
        if warm_up:
            step()
            torch.cuda.current_stream().synchronize()
        self._graphs[key] = capture(step, self._pool)

    def replay(self, key: Key) -> tuple[Tensor, ...] | None:
        """Enqueues the step; returns what it computes, until the next replay does. None: not captured."""
        entry = self._graphs.get(key)
        if entry is None:
            return None
        entry[0].replay()
        return entry[1]
