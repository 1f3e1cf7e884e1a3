"""Decides which attention calls a batch becomes, and which cache rows each call reads. Computed once for all layers.

A cache kv_P2BKH is also a list of rows [P * 2 * B, K * H]: position p of a sequence has its key in row
`block * 2B + p % B` and its value B rows later. Plans are made of such row numbers.

Shapes: S sequences, L positions of the longest of them, Q query tokens of a chunk, B block_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.model.batch import ForwardBatch

# Keys and values gathered by one decode call. Fewer calls are faster until the copy outgrows the caches by far.
GROUP_BYTES = 1 << 22


class DecodeGroup(NamedTuple):
    """Sequences of one query token each and of similar length: one padded attention call."""

    # Their rows in T; None when the group is the whole batch in order.
    tokens_S: Tensor | None
    kv_rows_2SL: Tensor
    # Added to the scores; None when all are equally long.
    mask_S11L: Tensor | None


class PrefillSpan(NamedTuple):
    """Consecutive query tokens [start, end) of one sequence: one causal attention call."""

    start: int
    end: int
    kv_rows_21L: Tensor
    # Added to the scores; None when nothing comes before the chunk, so that the mask is a plain triangle.
    mask_QL: Tensor | None


class AttentionPlan(NamedTuple):
    decode: list[DecodeGroup]
    prefill: list[PrefillSpan]


def plan_attention(batch: ForwardBatch, block_size: int, row_elements: int, dtype: torch.dtype) -> AttentionPlan:
    """The calls that a batch needs. `row_elements` is K * H, `dtype` that of queries and cache."""
    assert batch.query_starts is not None
    assert batch.kv_lens is not None
    spans = list(zip(batch.query_starts, batch.query_starts[1:], strict=False))
    decoding = [seq for seq, (start, end) in enumerate(spans) if end - start == 1]
    groups = group_by_length(decoding, batch.kv_lens, GROUP_BYTES // (2 * row_elements * dtype.itemsize))
    return AttentionPlan(
        decode=[_decode_group(batch, group, block_size, dtype) for group in groups],
        prefill=[
            _prefill_span(batch, seq, start, end, block_size, dtype)
            for seq, (start, end) in enumerate(spans)
            if end - start > 1
        ],
    )


def group_by_length(sequences: list[int], kv_lens: tuple[int, ...], max_positions: int) -> list[list[int]]:
    """Cuts sequences, longest first, into groups of at most `max_positions`, padding included, or of one sequence."""
    longest_first = sorted(sequences, key=lambda seq: -kv_lens[seq])
    groups: list[list[int]] = []
    start = 0
    while start < len(longest_first):
        end = start + max(1, max_positions // kv_lens[longest_first[start]])
        groups.append(sorted(longest_first[start:end]))
        start = end
    return groups


def written_rows(batch: ForwardBatch, block_size: int) -> Tensor:
    """rows_T2: where each token's key and value go."""
    key_T = batch.slot_mapping_T + batch.slot_mapping_T // block_size * block_size
    return torch.stack((key_T, key_T + block_size), 1)


def _decode_group(batch: ForwardBatch, group: list[int], block_size: int, dtype: torch.dtype) -> DecodeGroup:
    assert batch.query_starts is not None
    assert batch.kv_lens is not None
    kv_len_S, block_table_SP, tokens_S = batch.kv_len_S, batch.block_table_SP, None
    own_rows_S2 = batch.once(written_rows, block_size)
    if len(group) < batch.num_seqs or not batch.decode_only:
        sequences_S = torch.tensor(group, device=kv_len_S.device)
        tokens_S = torch.tensor([batch.query_starts[seq] for seq in group], device=kv_len_S.device)
        kv_len_S, block_table_SP, own_rows_S2 = (
            kv_len_S[sequences_S],
            block_table_SP[sequences_S],
            own_rows_S2[tokens_S],
        )
    lens = [batch.kv_lens[seq] for seq in group]
    kv_rows_2SL, mask_S11L = _cache_rows(block_table_SP, max(lens), block_size), None
    if min(lens) < max(lens):
        padding_SL = torch.arange(max(lens), device=kv_len_S.device) >= kv_len_S.unsqueeze(1)
        # Padding reads the sequence's own newest row: a masked NaN out of somebody else's block would still be a NaN.
        kv_rows_2SL = torch.where(padding_SL, own_rows_S2.t().unsqueeze(2), kv_rows_2SL)
        mask_SL = torch.zeros(len(lens), max(lens), dtype=dtype, device=kv_len_S.device)
        mask_S11L = mask_SL.masked_fill_(padding_SL, -torch.inf)[:, None, None]
    return DecodeGroup(tokens_S, kv_rows_2SL.contiguous(), mask_S11L)


def _prefill_span(
    batch: ForwardBatch, seq: int, start: int, end: int, block_size: int, dtype: torch.dtype
) -> PrefillSpan:
    assert batch.kv_lens is not None
    num_queries, kv_len, device = end - start, batch.kv_lens[seq], batch.kv_len_S.device
    kv_rows_21L = _cache_rows(batch.block_table_SP[seq : seq + 1], kv_len, block_size)
    mask_QL = None
    if num_queries < kv_len:
        mask_QL = torch.full((num_queries, kv_len), -torch.inf, dtype=dtype, device=device)
        mask_QL.triu_(kv_len - num_queries + 1)
    return PrefillSpan(start, end, kv_rows_21L.contiguous(), mask_QL)


def _cache_rows(block_table_SP: Tensor, num_positions: int, block_size: int) -> Tensor:
    """rows_2SL: key rows, then value rows, of the first L positions."""
    num_blocks = -(-num_positions // block_size)
    first_SP1 = (block_table_SP[:, :num_blocks] * (2 * block_size)).unsqueeze(2)
    offset_211B = torch.arange(2 * block_size, device=block_table_SP.device).view(2, 1, 1, block_size)
    return (first_SP1 + offset_211B).flatten(2)[:, :, :num_positions]
