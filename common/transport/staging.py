"""Staging slots: the bounded memory that payloads pass through."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class StagingSlots:
    """`num_slots` buffers of `slot_bytes` uint8 each, reused. Thread-safe."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._free = [torch.empty(slot_bytes, dtype=torch.uint8) for _ in range(num_slots)]

    @property
    def num_bytes(self) -> int:
        """All the memory that there is, used or not."""
        return self.num_slots * self.slot_bytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> Tensor | None:
        """A slot with arbitrary content; None when all are in use. The one freed last is the first: it is in cache."""
        with self._lock:
            return self._free.pop() if self._free else None

    def release(self, slot: Tensor) -> None:
        with self._lock:
            self._free.append(slot)
            assert len(self._free) <= self.num_slots
