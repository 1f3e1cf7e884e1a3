"""Causal attention of prompt chunks over the paged cache: a program takes a tile of one sequence's queries in one head.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): a program walks over the keys and values that its queries may see, first
those that all of them see, then those on the diagonal. `prefill_plan` says what the tiles are.

Shapes: T tokens, S sequences, I items, P blocks (of the cache, of a block table), B block_size, N query heads, K kv
heads, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import allow_next, supports_pdl, wait_for_inputs
from common.kernels.paging import multiply_add, tile_blocks, tile_rows
from common.kernels.prefill_plan import QUERY_TILE, PrefillPlan

LOG2_E = 1.4426950408889634


class PrefillTiling(NamedTuple):
    """How many positions a program reads at a time, and how."""

    tile: int
    num_warps: int
    num_stages: int


def prefill_tiling(head_dim: int, dtype: torch.dtype) -> PrefillTiling:
    """What fits into shared memory and registers."""
    row_bytes = head_dim * dtype.itemsize
    if row_bytes > 512:
        return PrefillTiling(16, 8, 2)
    if row_bytes > 256:
        return PrefillTiling(32, 8, 2)
    return PrefillTiling(128, 8, 3)


def prefill_attention(
    q_TNH: Tensor,
    kv_P2BKH: Tensor,
    query_start_S1: Tensor,
    kv_len_S: Tensor,
    block_table_SP: Tensor,
    plan: PrefillPlan,
    scale: float,
    *,
    tiling: PrefillTiling | None = None,
) -> Tensor:
    """out_TNH: each token over its sequence's cached positions up to its own, which are the last of `kv_len_S`.

    Query head n reads kv head n // (N / K). q_TNH may be strided, its last dimension contiguous. Tokens past the last
    sequence's get no output.
    """
    num_query_heads, head_dim = q_TNH.shape[1:]
    block_size, num_kv_heads = kv_P2BKH.shape[2:4]
    assert kv_P2BKH.is_contiguous()
    assert q_TNH.stride(2) == block_table_SP.stride(1) == query_start_S1.stride(0) == kv_len_S.stride(0) == 1
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    tiling = tiling or prefill_tiling(head_dim, q_TNH.dtype)
    pdl = supports_pdl(q_TNH.device)
    _prefill[(num_query_heads, len(plan.items_I2))](
        q_TNH,
        kv_P2BKH,
        query_start_S1,
        kv_len_S,
        block_table_SP,
        plan.items_I2,
        plan.num_items_1,
        out_TNH,
        q_TNH.stride(0),
        q_TNH.stride(1),
        block_table_SP.stride(0),
        scale * LOG2_E,
        NUM_QUERY_HEADS=num_query_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERIES=QUERY_TILE,
        TILE=tiling.tile,
        PDL=pdl,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        launch_pdl=pdl,
    )
    return out_TNH


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q_TNH,
    kv_P2BKH,
    query_start_S1,
    kv_len_S,
    block_table_SP,
    items_I2,
    num_items_1,
    out_TNH,
    q_stride_t,
    q_stride_n,
    table_stride,
    scale,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    ROW: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    wait_for_inputs(PDL)
    allow_next(PDL)
    item = tl.program_id(1)
    if item >= tl.load(num_items_1):
        return
    seq = tl.load(items_I2 + item * 2)
    first_query = tl.load(items_I2 + item * 2 + 1)
    query_start = tl.load(query_start_S1 + seq).to(tl.int32)
    num_queries = tl.load(query_start_S1 + seq + 1).to(tl.int32) - query_start
    kv_len = tl.load(kv_len_S + seq).to(tl.int32)
    head = tl.program_id(0)
    kv = kv_P2BKH + head // (NUM_QUERY_HEADS // NUM_KV_HEADS) * HEAD_DIM
    table = block_table_SP + seq.to(tl.int64) * table_stride
    query = first_query + tl.arange(0, QUERIES)
    dims = tl.arange(0, HEAD_DIM)
    exists = (query < num_queries)[:, None]
    token = (query_start + query).to(tl.int64)[:, None]
    q = tl.load(q_TNH + token * q_stride_t + head * q_stride_n + dims[None, :], mask=exists, other=0.0)
    position = kv_len - num_queries + query
    running_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    running_sum = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    # Whole tiles that the first query, and so every query, may see; then up to the last one's own position.
    num_common = (kv_len - num_queries + first_query + 1) // TILE
    num_visible = tl.cdiv(tl.minimum(kv_len - num_queries + first_query + QUERIES, kv_len), TILE)
    blocks = tile_blocks(table, 0, kv_len, BLOCK_SIZE, TILE)
    for tile in range(num_common):
        keys = kv + tile_rows(blocks, tile, ROW, BLOCK_SIZE, TILE)[:, None] + dims[None, :]
        k = tl.load(keys)
        v = tl.load(keys + BLOCK_SIZE * ROW)
        # One tile ahead: block numbers must not be waited for where keys and values are asked for.
        blocks = tile_blocks(table, tile + 1, kv_len, BLOCK_SIZE, TILE)
        scores = multiply_add(q, tl.trans(k), tl.zeros((QUERIES, TILE), tl.float32))
        out, running_max, running_sum = _add_tile(scores, v, scale, out, running_max, running_sum)
    for tile in range(num_common, num_visible):
        positions = tile * TILE + tl.arange(0, TILE)
        # Other sequences' NaN may lie past the end, and NaN times a weight of zero is NaN.
        valid = (positions < kv_len)[:, None]
        keys = kv + tile_rows(blocks, tile, ROW, BLOCK_SIZE, TILE)[:, None] + dims[None, :]
        k = tl.load(keys, mask=valid, other=0.0)
        v = tl.load(keys + BLOCK_SIZE * ROW, mask=valid, other=0.0)
        blocks = tile_blocks(table, tile + 1, kv_len, BLOCK_SIZE, TILE)
        scores = multiply_add(q, tl.trans(k), tl.zeros((QUERIES, TILE), tl.float32))
        scores = tl.where(positions[None, :] <= position[:, None], scores, -float("inf"))
        out, running_max, running_sum = _add_tile(scores, v, scale, out, running_max, running_sum)
    out = out / running_sum[:, None]
    out_rows = out_TNH + (token * NUM_QUERY_HEADS + head) * HEAD_DIM + dims[None, :]
    tl.store(out_rows, out.to(out_TNH.dtype.element_ty), mask=exists)


@triton.jit
def _add_tile(scores, v, scale, out, running_max, running_sum):
    """Online softmax: scores in powers of two, weights relative to the maximum, not normalised."""
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_max[:, None])
    shrink = tl.exp2(running_max - new_max)
    running_sum = running_sum * shrink + tl.sum(weights, 1)
    out = multiply_add(weights.to(v.dtype), v, out * shrink[:, None])
    return out, new_max, running_sum
