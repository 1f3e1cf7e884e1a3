"""Attention of one query token a sequence over the paged cache: one program for each item of a plan and kv head.

The program that finishes a sequence's last missing piece folds all pieces, in the order of their positions, so that
results do not depend on who is last. `decode_plan` says what the items are.

Shapes: S sequences, P blocks (of the cache, of a block table), B block_size, N query heads, K kv heads, G = N / K, H
head_dim, I items.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.decode_plan import DecodePlan
from common.kernels.launch import INTERPRETED, allow_next, supports_pdl, wait_for_inputs
from common.kernels.paging import multiply_add, tile_blocks, tile_rows

# Tensor cores take 16 rows at a time; a kv head's queries are padded to them.
QUERY_ROWS = tl.constexpr(16)
LOG2_E = 1.4426950408889634
IS_INTERPRETED = tl.constexpr(INTERPRETED)


def decode_attention(
    q_SNH: Tensor, kv_P2BKH: Tensor, block_table_SP: Tensor, plan: DecodePlan, scale: float, *, settled: bool = False
) -> Tensor:
    """out_SNH: each query over its sequence's cached positions; zeros where there are none.

    Query head n reads kv head n // G. q_SNH may be strided, its last dimension contiguous. `settled` promises that the
    kernel before this one neither wrote the plan nor the block table, and lets others start only after its own wait, as
    `norm_rotate_write` does: then whatever wrote them has ended, and they are read while that kernel runs.
    """
    num_query_heads, head_dim = q_SNH.shape[1:]
    block_size, num_kv_heads = kv_P2BKH.shape[2:4]
    group, group_rows = num_query_heads // num_kv_heads, plan.partial_IKGH.shape[2]
    assert group_rows <= QUERY_ROWS.value
    assert kv_P2BKH.is_contiguous()
    assert q_SNH.stride(2) == block_table_SP.stride(1) == 1
    tiling = plan.tiling
    # Pieces that are fetched at once to be folded: what fits into 32 registers of each thread.
    fold = 1 if plan.fixed_pieces else max(1, min(16, 32 * 32 * tiling.num_warps // (group_rows * head_dim)))
    out_SNH = torch.empty(q_SNH.shape, dtype=q_SNH.dtype, device=q_SNH.device)
    pdl = supports_pdl(q_SNH.device)
    _attend[(num_kv_heads, plan.grid_items)](
        q_SNH,
        kv_P2BKH,
        block_table_SP,
        plan.items_I8,
        plan.num_items_1,
        plan.partial_IKGH,
        plan.max_sum_IK2G,
        plan.arrived_SK,
        out_SNH,
        q_SNH.stride(0),
        q_SNH.stride(1),
        block_table_SP.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=group_rows,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tiling.tile,
        FOLD=fold,
        FIXED_PIECES=plan.fixed_pieces,
        SETTLED=settled,
        PDL=pdl,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        launch_pdl=pdl,
    )
    return out_SNH


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_SNH,
    kv_P2BKH,
    block_table_SP,
    items_I8,
    num_items_1,
    partial_IKGH,
    max_sum_IK2G,
    arrived_SK,
    out_SNH,
    q_stride_s,
    q_stride_n,
    table_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FOLD: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    SETTLED: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    item = tl.program_id(1)
    kv = kv_P2BKH + head * HEAD_DIM
    if not SETTLED:
        wait_for_inputs(PDL)
    num_items = tl.load(num_items_1)
    seq, start, end, first_item, num_pieces, piece_length = _item(items_I8, item)
    if SETTLED:
        if item < num_items:
            table = block_table_SP + seq.to(tl.int64) * table_stride
            _prefetch_tile(kv, table, start // TILE, end, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
        wait_for_inputs(PDL)
    allow_next(PDL)
    rows = tl.arange(0, QUERY_ROWS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    while item < num_items:
        table = block_table_SP + seq.to(tl.int64) * table_stride
        # Asked for before the queries are waited for.
        blocks = tile_blocks(table, start // TILE, end, BLOCK_SIZE, TILE)
        queries = q_SNH + seq.to(tl.int64) * q_stride_s + (head * GROUP + rows) * q_stride_n + dims
        q = tl.load(queries, mask=rows < GROUP, other=0.0)
        if FIXED_PIECES:
            running_max = tl.full((QUERY_ROWS,), -float("inf"), tl.float32)
            running_sum = tl.zeros((QUERY_ROWS,), tl.float32)
            out = tl.zeros((QUERY_ROWS, HEAD_DIM), tl.float32)
            for piece_start in range(start, end, piece_length):
                piece_end = tl.minimum(piece_start + piece_length, end)
                blocks = tile_blocks(table, piece_start // TILE, piece_end, BLOCK_SIZE, TILE)
                piece, piece_max, piece_sum = _attend_piece(
                    q, kv, table, blocks, piece_start, piece_end, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE
                )
                # As `_fold` does it, to the bit.
                new_max = tl.maximum(running_max, piece_max)
                shrink, weight = tl.exp2(running_max - new_max), tl.exp2(piece_max - new_max)
                running_sum = tl.fma(running_sum, shrink, piece_sum * weight)
                out = tl.fma(out, tl.broadcast_to(shrink[:, None], out.shape), piece * weight[:, None])
                running_max = new_max
        else:
            out, running_max, running_sum = _attend_piece(
                q, kv, table, blocks, start, end, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE
            )
        out_GH = out_SNH + (seq.to(tl.int64) * NUM_KV_HEADS + head) * GROUP * HEAD_DIM
        if num_pieces == 1:
            out = out / tl.where(running_sum > 0, running_sum, 1.0)[:, None]
            tl.store(out_GH + rows * HEAD_DIM + dims, out.to(out_SNH.dtype.element_ty), mask=rows < GROUP)
        else:
            slot = item.to(tl.int64) * NUM_KV_HEADS + head
            partial = partial_IKGH + slot * GROUP_ROWS * HEAD_DIM
            max_sum = max_sum_IK2G + slot * 2 * GROUP_ROWS + tl.arange(0, QUERY_ROWS)
            tl.store(partial + rows * HEAD_DIM + dims, out, mask=rows < GROUP_ROWS)
            tl.store(max_sum, running_max, mask=tl.arange(0, QUERY_ROWS) < GROUP_ROWS)
            tl.store(max_sum + GROUP_ROWS, running_sum, mask=tl.arange(0, QUERY_ROWS) < GROUP_ROWS)
            # One thread announces what all have stored.
            tl.debug_barrier()
            arrived = arrived_SK + seq * NUM_KV_HEADS + head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == num_pieces - 1:
                tl.store(arrived, 0)
                first_slot = first_item.to(tl.int64) * NUM_KV_HEADS + head
                _fold(
                    partial_IKGH + first_slot * GROUP_ROWS * HEAD_DIM,
                    max_sum_IK2G + first_slot * 2 * GROUP_ROWS,
                    num_pieces,
                    out_GH,
                    NUM_KV_HEADS,
                    GROUP,
                    GROUP_ROWS,
                    HEAD_DIM,
                    FOLD,
                )
        item += tl.num_programs(1)
        if item < num_items:
            seq, start, end, first_item, num_pieces, piece_length = _item(items_I8, item)


@triton.jit
def _item(items_I8, item):
    fields = items_I8 + item.to(tl.int64) * 8
    return (
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
    )


@triton.jit
def _attend_piece(
    q,
    kv_P2BKH,
    block_table_P,
    blocks,
    start,
    end,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """(out, max, sum) over [start, end): scores in powers of two, weights relative to the maximum, not normalised."""
    ROW: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    running_max = tl.full((QUERY_ROWS,), -float("inf"), tl.float32)
    sums = tl.zeros((QUERY_ROWS, TILE), tl.float32)
    out = tl.zeros((QUERY_ROWS, HEAD_DIM), tl.float32)
    for tile in range(start // TILE, tl.cdiv(end, TILE)):
        valid = tile * TILE + tl.arange(0, TILE) < end
        keys = kv_P2BKH + tile_rows(blocks, tile, ROW, BLOCK_SIZE, TILE)[:, None] + dims[None, :]
        # Other sequences' NaN may lie past the end, and NaN times a weight of zero is NaN.
        k = tl.load(keys, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        v = tl.load(keys + BLOCK_SIZE * ROW, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        # One tile ahead: block numbers must not be waited for where keys and values are asked for.
        blocks = tile_blocks(block_table_P, tile + 1, end, BLOCK_SIZE, TILE)
        scores = multiply_add(q, tl.trans(k), tl.zeros((QUERY_ROWS, TILE), tl.float32))
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(running_max - new_max)
        # Added up across the tile only once, at the end.
        sums = sums * shrink[:, None] + weights
        out = multiply_add(weights.to(v.dtype), v, out * shrink[:, None])
        running_max = new_max
    return out, running_max, tl.sum(sums, 1)


@triton.jit
def _prefetch_tile(
    kv_P2BKH,
    block_table_P,
    tile,
    end,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Brings a tile's keys and values into the L2 cache, where another kernel's later writes reach them."""
    if not IS_INTERPRETED:
        ROW: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
        LINE: tl.constexpr = 1024 // kv_P2BKH.dtype.element_ty.primitive_bitwidth
        blocks = tile_blocks(block_table_P, tile, end, BLOCK_SIZE, TILE)
        keys = kv_P2BKH + tile_rows(blocks, tile, ROW, BLOCK_SIZE, TILE)[:, None]
        lines = keys + tl.arange(0, (HEAD_DIM + LINE - 1) // LINE)[None, :] * LINE
        for key_or_value in tl.static_range(2):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [lines + key_or_value * (BLOCK_SIZE * ROW)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def _fold(
    partial_IKGH,
    max_sum_IK2G,
    num_pieces,
    out_GH,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FOLD: tl.constexpr,
):
    rows = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, HEAD_DIM)
    cells = rows[:, None] * HEAD_DIM + dims[None, :]
    running_max = tl.full((GROUP_ROWS,), -float("inf"), tl.float32)
    running_sum = tl.zeros((GROUP_ROWS,), tl.float32)
    out = tl.zeros((GROUP_ROWS, HEAD_DIM), tl.float32)
    for first_piece in range(0, num_pieces, FOLD):
        pieces = first_piece + tl.arange(0, FOLD)
        exists = (pieces < num_pieces)[:, None]
        # Past the first-level cache, which does not see what other SMs write.
        max_sum = max_sum_IK2G + pieces[:, None] * (NUM_KV_HEADS * 2 * GROUP_ROWS) + rows[None, :]
        maxima = tl.load(max_sum, mask=exists, other=-float("inf"), cache_modifier=".cg")
        sums = tl.load(max_sum + GROUP_ROWS, mask=exists, other=0.0, cache_modifier=".cg")
        partial = partial_IKGH + pieces[:, None, None] * (NUM_KV_HEADS * GROUP_ROWS * HEAD_DIM) + cells[None, :, :]
        outs = tl.load(partial, mask=exists[:, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(running_max, tl.max(maxima, 0))
        weights = tl.exp2(maxima - new_max[None, :])
        shrink = tl.exp2(running_max - new_max)
        running_sum = tl.fma(running_sum, shrink, tl.sum(sums * weights, 0))
        out = tl.fma(out, tl.broadcast_to(shrink[:, None], out.shape), tl.sum(outs * weights[:, :, None], 0))
        running_max = new_max
    out = out / running_sum[:, None]
    tl.store(out_GH + cells, out.to(out_GH.dtype.element_ty), mask=rows[:, None] < GROUP)
