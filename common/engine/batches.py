"""Builds the model's input from sequences: flat token lists, cache slots and padded block tables."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from common.engine.chunks import Chunk
from common.model.batch import ForwardBatch
from common.sequence import Sequence


class PrefillNumbers(NamedTuple):
    """A step over prompt chunks as the host has it; what `ForwardBatch.build` takes."""

    token_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    query_lens: list[int]
    kv_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]

    def to(self, device: torch.device) -> ForwardBatch:
        return ForwardBatch.build(**self._asdict(), device=device)


def decode_batch(sequences: Seq[Sequence], *, block_size: int, device: torch.device) -> ForwardBatch:
    """One query token a sequence: its last one, whose KV is not in the cache yet."""
    positions = [sequence.num_computed for sequence in sequences]
    return ForwardBatch.build(
        token_ids=[sequence.token_ids[-1] for sequence in sequences],
        positions=positions,
        slot_mapping=[
            sequence.block_table[position // block_size] * block_size + position % block_size
            for sequence, position in zip(sequences, positions, strict=True)
        ],
        query_lens=[1] * len(positions),
        kv_lens=[position + 1 for position in positions],
        block_tables=[sequence.block_table for sequence in sequences],
        logit_rows=range(len(positions)),
        device=device,
    )


def prefill_numbers(chunks: Seq[Chunk], *, block_size: int) -> PrefillNumbers:
    """All positions of all chunks. Logits are wanted for the last position of a last chunk, and for every position of a
    sequence whose prompt log-probabilities were asked for."""
    positions = [np.arange(start, end) for _, start, end in chunks]
    slots: list[np.ndarray] = []
    logit_rows: list[int] = []
    row = 0
    for (sequence, start, end), position_C in zip(chunks, positions, strict=True):
        block_P = np.array(sequence.block_table)
        slots.append(block_P[position_C // block_size] * block_size + position_C % block_size)
        if sequence.request.num_prompt_logprobs is not None:
            logit_rows += range(row, row + end - start)
        elif end == sequence.num_tokens:
            logit_rows.append(row + end - start - 1)
        row += end - start
    return PrefillNumbers(
        token_ids=np.concatenate([np.array(sequence.token_ids[start:end]) for sequence, start, end in chunks]),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        query_lens=[chunk.end - chunk.start for chunk in chunks],
        kv_lens=[chunk.end for chunk in chunks],
        block_tables=[chunk.sequence.block_table[: -(-chunk.end // block_size)] for chunk in chunks],
        logit_rows=logit_rows,
    )
