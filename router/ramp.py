"""How many sequences may be on their way to a decode worker at once, after its steps were slow. A policy, no I/O.

A batch that has shrunk until its steps are quick again has many free places, and filling them all makes the next steps
slow: what a prompt costs shows only when its KV is there. So one goes first, and twice as many each time that all have
joined the batch and its steps are still quick.
"""

from __future__ import annotations

from common.load import Load, PressureReason


class Ramp:
    """`most` is None when there is no limit."""

    def __init__(self) -> None:
        self.most: int | None = None

    def hear(self, load: Load, *, num_coming: int, max_num_seqs: int) -> None:
        """A message of the load stream; so many sequences are on their way, or wait there."""
        if PressureReason.SLOW_STEPS in load.pressure:
            self.most = 1
        elif self.most is not None and not num_coming:
            self.most = 2 * self.most if 2 * self.most < max_num_seqs else None
