"""Copies sequences' keys and values out of cache blocks, laid end to end: what libraries without paging read.

Shapes: S sequences, L positions of all of them, P blocks (of the cache, of a block table), B block_size, K kv heads, H
head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common.model.batch import ForwardBatch

# Elements that a program moves at a time.
CHUNK = tl.constexpr(4096)


class Ragged(NamedTuple):
    """Where each sequence's queries and positions start when they are laid end to end, then their number; int32."""

    query_start_S1: Tensor
    kv_start_S1: Tensor
    max_queries: int
    max_positions: int
    num_positions: int


def ragged(batch: ForwardBatch) -> Ragged:
    """From a batch with its host's numbers; nothing waits for the device. For `batch.once`."""
    assert batch.query_starts is not None
    assert batch.query_start_S1 is not None
    assert batch.kv_lens is not None
    return Ragged(
        query_start_S1=batch.query_start_S1.to(torch.int32),
        kv_start_S1=F.pad(batch.kv_len_S.cumsum(0, dtype=torch.int32), (1, 0)),
        max_queries=max(end - start for start, end in zip(batch.query_starts, batch.query_starts[1:], strict=False)),
        max_positions=max(batch.kv_lens),
        num_positions=sum(batch.kv_lens),
    )


def gather_kv(kv_P2BKH: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """(k_LKH, v_LKH) of every position that the batch's sequences have in the cache."""
    assert kv_P2BKH.is_contiguous()
    assert batch.block_table_SP.stride(1) == 1
    block_size, num_kv_heads, head_dim = kv_P2BKH.shape[2:]
    plan = batch.once(ragged)
    shape = (2, plan.num_positions, num_kv_heads, head_dim)
    kv_2LKH = torch.empty(shape, dtype=kv_P2BKH.dtype, device=kv_P2BKH.device)
    _gather[(triton.cdiv(plan.max_positions, block_size), batch.num_seqs, 2)](
        kv_P2BKH,
        kv_2LKH,
        plan.kv_start_S1,
        batch.block_table_SP,
        batch.block_table_SP.stride(0),
        plan.num_positions,
        BLOCK_SIZE=block_size,
        ROW=num_kv_heads * head_dim,
    )
    return kv_2LKH[0], kv_2LKH[1]


@triton.jit(do_not_specialize=["table_stride", "num_positions"])
def _gather(
    kv_P2BKH,
    kv_2LKH,
    kv_start_S1,
    block_table_SP,
    table_stride,
    num_positions,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,
):
    """One program for the keys or values of one block of one sequence."""
    index, seq, value = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(kv_start_S1 + seq) + index * BLOCK_SIZE
    num_rows = tl.minimum(tl.load(kv_start_S1 + seq + 1) - first, BLOCK_SIZE)
    if num_rows > 0:
        block = tl.load(block_table_SP + seq.to(tl.int64) * table_stride + index).to(tl.int64)
        source = kv_P2BKH + (block * 2 + value) * BLOCK_SIZE * ROW
        destination = kv_2LKH + (value.to(tl.int64) * num_positions + first) * ROW
        for start in range(0, BLOCK_SIZE * ROW, CHUNK):
            offsets = start + tl.arange(0, CHUNK)
            wanted = offsets < num_rows * ROW
            tl.store(destination + offsets, tl.load(source + offsets, mask=wanted), mask=wanted)
