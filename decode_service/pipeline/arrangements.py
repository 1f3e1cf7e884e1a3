"""The ways in which a decode step can run, and the cells for which one of them is chosen. Names and counts alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from decode_service.pipeline.order import Cut

# Tokens; contexts up to here are one range.
SHORTEST_CONTEXT = 256


class Arrangement(NamedTuple):
    """A pipelined step: the cut, and the SMs granted to each lane. Both have all where the GPU is not partitioned."""

    cut: Cut
    attention_sm: int
    ffn_sm: int

    def __str__(self) -> str:
        return f"{self.cut.value} {self.attention_sm}:{self.ffn_sm}"


class Arrangements:
    """The fixed set to choose from. In each cut the pairs are ordered by the SMs that attention has."""

    def __init__(self, arrangements: Collection[Arrangement], num_sm: int) -> None:
        self.num_sm = num_sm
        self.all = tuple(sorted(set(arrangements), key=lambda one: (one.cut.value, one.attention_sm, one.ffn_sm)))

    def is_partitioned(self, arrangement: Arrangement) -> bool:
        return (arrangement.attention_sm, arrangement.ffn_sm) != (self.num_sm, self.num_sm)

    def kind(self, arrangement: Arrangement) -> tuple[Cut, bool]:
        """Its cut, and whether it is partitioned."""
        return arrangement.cut, self.is_partitioned(arrangement)

    def pairs(self, cut: Cut) -> list[Arrangement]:
        return [one for one in self.all if self.kind(one) == (cut, True)]

    def neighbours(self, arrangement: Arrangement) -> list[Arrangement]:
        """The pairs before and after in the same cut; none without a partition."""
        if not self.is_partitioned(arrangement):
            return []
        pairs = self.pairs(arrangement.cut)
        here = pairs.index(arrangement)
        return pairs[max(here - 1, 0) : here] + pairs[here + 1 : here + 2]

    def others(self, arrangement: Arrangement) -> list[Arrangement]:
        """Those of another kind."""
        return [one for one in self.all if self.kind(one) != self.kind(arrangement)]


class Cell(NamedTuple):
    """Steps that are alike: at most so many sequences, with at most so many tokens of context on average."""

    num_seqs: int
    context: int

    def distance(self, other: Cell) -> float:
        """In doublings."""
        return abs(math.log2(self.num_seqs / other.num_seqs)) + abs(math.log2(self.context / other.context))


def cell_of(num_seqs: int, mean_context: float, batch_buckets: Sequence[int]) -> Cell:
    """The cell of a batch. `batch_buckets`: ascending; a batch above the last belongs to the last."""
    bucket = next((size for size in batch_buckets if size >= num_seqs), batch_buckets[-1])
    doublings = max(0, math.ceil(math.log2(max(mean_context, 1) / SHORTEST_CONTEXT)))
    return Cell(bucket, SHORTEST_CONTEXT << doublings)
