"""Bounds the messages that all streams together write, since each costs a system call whatever is in it.

Few streams are never held up. With many, a stream's tokens gather for as long as the others need to have their turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# A message costs this process about 50 µs; so writing takes a fifth of a core at most.
MAX_MESSAGES_PER_S = 4000
# Shorter pauses save nothing.
MIN_PAUSE_S = 0.004


class Pacer:
    """Knows how many streams there are."""

    def __init__(self) -> None:
        self._num_streams = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Around the life of a stream."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    @property
    def pause_s(self) -> float:
        """How long a stream that has just written lets tokens gather."""
        pause_s = self._num_streams / MAX_MESSAGES_PER_S
        return pause_s if pause_s >= MIN_PAUSE_S else 0.0
