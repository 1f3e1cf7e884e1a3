"""Staging slots: the bounded memory that payloads pass through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Slot:
    """One buffer of uint8."""

    buffer: Tensor
    # The end of device work that still reads it; None: nothing does.
    still_read: torch.cuda.Event | None = None

    def wait_until_read(self) -> None:
        """What comes next may write: whoever writes, a stream of the device or this thread, waits for the reader."""
        if self.still_read is not None:
            if self.buffer.is_cuda:
                self.still_read.wait()
            else:
                self.still_read.synchronize()
            self.still_read = None


class StagingSlots:
    """`num_slots` buffers of `slot_bytes` each, reused. Thread-safe."""

    def __init__(self, num_slots: int, slot_bytes: int, allocate: Callable[[int], Tensor]) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._free = [Slot(allocate(slot_bytes)) for _ in range(num_slots)]

    @property
    def num_bytes(self) -> int:
        """All the memory that there is, used or not."""
        return self.num_slots * self.slot_bytes

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> Slot | None:
        """A slot with arbitrary content; None when all are in use. The one freed last is the first: it is in cache."""
        with self._lock:
            return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        with self._lock:
            self._free.append(slot)
            assert len(self._free) <= self.num_slots
