"""Cuts prompts into chunks under a token budget. Knows token counts, never tensors. Common to both roles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from common.sequence import Sequence

# Tokens of one step whose log-probabilities are asked for: each needs a row of logits, as wide as the vocabulary.
MOST_SCORED_TOKENS = 512


class Chunk(NamedTuple):
    """Positions [start, end) of a sequence, to be computed in one forward pass."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """The sequence's first new token can be drawn from this chunk's last position."""
        return self.end == self.sequence.num_tokens


def plan_chunks(sequences: Iterable[Sequence], *, max_batch_tokens: int, block_size: int) -> list[Chunk]:
    """The next chunk of each sequence, in order, until the budget is spent.

    A chunk that does not finish its sequence ends on a block boundary, so that a shipped block is always complete.
    """
    chunks: list[Chunk] = []
    budget, scored_budget = max_batch_tokens, max(MOST_SCORED_TOKENS, block_size)
    for sequence in sequences:
        start = sequence.num_computed
        end = min(sequence.num_tokens, start + budget)
        if sequence.request.num_prompt_logprobs is not None:
            end = min(end, start + scored_budget)
            scored_budget -= end - start
        if end < sequence.num_tokens:
            end -= end % block_size
        if end <= start:
            break
        chunks.append(Chunk(sequence, start, end))
        budget -= end - start
    return chunks
