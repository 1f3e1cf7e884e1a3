"""How many tokens: a number, or a range that is drawn from evenly."""

from __future__ import annotations

import random
from typing import NamedTuple


class Lengths(NamedTuple):
    """From `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128` or `64-256`. Raises ValueError."""
        low, dash, high = text.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"{text!r}: expected a number of tokens such as 128, or a range such as 64-256")
        made = cls(int(low), int(high or low))
        if not 1 <= made.low <= made.high:
            raise ValueError(f"{text!r}: expected at least 1 token, and the smaller number first")
        return made

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
