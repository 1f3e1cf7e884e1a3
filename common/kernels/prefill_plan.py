"""Cuts a batch of prompt chunks into tiles of queries, on the device, from where the chunks start.

Tiles nearer to their chunk's end see more positions and take longer, so they come first: all chunks' last tiles, then
the ones before.

Shapes: S sequences, I items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import INTERPRETED, allow_next, supports_pdl, wait_for_inputs

# Queries of one tile.
QUERY_TILE = 16 if INTERPRETED else 128


class PrefillPlan(NamedTuple):
    """What all layers of one step share."""

    # Sequence, and the first of the tile's queries in it.
    items_I2: Tensor
    num_items_1: Tensor


def plan_prefill(query_start_S1: Tensor, num_tokens: int) -> PrefillPlan:
    """Tiles of at most `num_tokens` tokens; sequence i has tokens `query_start_S1[i]` to `query_start_S1[i + 1]`."""
    num_seqs, device = len(query_start_S1) - 1, query_start_S1.device
    plan = PrefillPlan(
        items_I2=torch.empty(num_tokens // QUERY_TILE + num_seqs, 2, dtype=torch.int32, device=device),
        num_items_1=torch.empty(1, dtype=torch.int32, device=device),
    )
    block = max(256, triton.next_power_of_2(num_seqs))
    pdl = supports_pdl(device)
    _plan[(1,)](
        query_start_S1,
        plan.items_I2,
        plan.num_items_1,
        num_seqs,
        QUERIES=QUERY_TILE,
        BLOCK_S=block,
        PDL=pdl,
        num_warps=min(max(block // 256, 1), 8),
        launch_pdl=pdl,
    )
    return plan


@triton.jit(do_not_specialize=["num_seqs"])
def _plan(
    query_start_S1,
    items_I2,
    num_items_1,
    num_seqs,
    QUERIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    allow_next(PDL)
    seqs = tl.arange(0, BLOCK_S)
    in_batch = seqs < num_seqs
    starts = tl.load(query_start_S1 + seqs, mask=in_batch, other=0).to(tl.int32)
    ends = tl.load(query_start_S1 + 1 + seqs, mask=in_batch, other=0).to(tl.int32)
    tiles = tl.cdiv(ends - starts, QUERIES)
    num_items = 0
    for index in range(tl.max(tiles, 0)):
        exists = index < tiles
        ordinal = tl.cumsum(exists.to(tl.int32), 0)
        item = items_I2 + (num_items + ordinal - 1) * 2
        tl.store(item, seqs, mask=exists)
        tl.store(item + 1, (tiles - 1 - index) * QUERIES, mask=exists)
        num_items += tl.max(ordinal, 0)
    tl.store(num_items_1, num_items)
