"""The query-key-value product of a few tokens, its heads normalised, turned and put where attention reads them.

A tile of the product is one head of a block of tokens, and so holds all that the head's norm and rotation ask for. It
is computed as its two halves, between which the rotation goes element by element. D is split over programs as in
`tiled_linear`, and the last of a tile finishes it: what follows the product costs no kernel of its own.

Shapes: T tokens, D inputs, E rows of the weight = (N + 2K) heads of H: queries, keys, values; J = N + K heads that are
normalised and turned, C context positions, P blocks, B block_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import allow_next, supports_pdl, wait_for_inputs
from common.kernels.rotate_write import cache_row, normed_and_turned
from common.kernels.tiled_linear import (
    TiledPlan,
    arrives_last,
    blocks_of_tile,
    prefetch_rows,
    prefetch_units,
    products,
    split_room,
    steps_of_split,
    sum_of_splits,
)


def project_heads(
    normed_TD: Tensor,
    weight_ED: Tensor,
    qk_norm_JH: Tensor,
    eps: float,
    rope_C2H: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    kv_P2BKH: Tensor,
    num_heads: int,
    plan: TiledPlan,
) -> Tensor:
    """Writes each token's keys and values into its slot of the cache and returns its queries, q_TNH, contiguous.

    They are what `norm_rotate_write` makes of the product: it is rounded to the model's dtype before it is normalised.
    A plan's rows are H. Of `rope_C2H` the first half of the cosines is read, and the second half of the sines.
    """
    (num_tokens, num_in), num_rows = normed_TD.shape, len(weight_ED)
    block_size, num_kv_heads, head_dim = kv_P2BKH.shape[2:]
    num_all_heads = num_heads + 2 * num_kv_heads
    assert plan.rows == head_dim
    assert weight_ED.shape == (num_all_heads * head_dim, num_in)
    assert qk_norm_JH.shape == (num_heads + num_kv_heads, head_dim)
    assert all(x.is_contiguous() for x in (normed_TD, weight_ED, qk_norm_JH, rope_C2H, kv_P2BKH))
    assert normed_TD.dtype == weight_ED.dtype == kv_P2BKH.dtype
    assert positions_T.stride(0) == slot_mapping_T.stride(0) == 1
    assert max(weight_ED.numel(), num_tokens * max(num_in, num_rows)) < 2**31
    q_TNH = torch.empty(num_tokens, num_heads, head_dim, dtype=normed_TD.dtype, device=normed_TD.device)
    num_tiles = num_all_heads * triton.cdiv(num_tokens, plan.tokens)
    if num_tiles == 0:
        return q_TNH
    partials, arrivals = split_room(plan, num_tiles, normed_TD.device) or (q_TNH, q_TNH)
    pdl = supports_pdl(normed_TD.device)
    _project[(num_tiles, plan.splits)](
        normed_TD,
        weight_ED,
        qk_norm_JH,
        eps,
        rope_C2H,
        positions_T,
        slot_mapping_T,
        kv_P2BKH,
        q_TNH,
        partials,
        arrivals,
        num_tokens,
        num_in,
        num_heads,
        num_kv_heads,
        prefetch_units(plan, weight_ED),
        HALF=head_dim // 2,
        BLOCK_SIZE=block_size,
        TOKENS=plan.tokens,
        DEPTH=plan.depth,
        SPLITS=plan.splits,
        THREADS=32 * plan.warps,
        EVEN=num_in % plan.depth == 0,
        PDL=pdl,
        num_warps=plan.warps,
        num_stages=plan.stages,
        launch_pdl=pdl,
    )
    return q_TNH


@triton.jit(do_not_specialize=["num_tokens", "prefetch"])
def _project(
    normed_TD,
    weight_ED,
    qk_norm_JH,
    eps,
    rope_C2H,
    positions_T,
    slot_mapping_T,
    kv_P2BKH,
    q_TNH,
    partials,
    arrivals,
    num_tokens,
    num_in,
    num_heads,
    num_kv_heads,
    prefetch,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    num_rotated = num_heads + num_kv_heads
    head, token_block = blocks_of_tile(tile, num_rotated + num_kv_heads, tl.cdiv(num_tokens, TOKENS))
    first_step, end_step = steps_of_split(split, num_in, DEPTH, SPLITS)
    first_row = head * (2 * HALF)
    if PDL:
        num_rows = (num_rotated + num_kv_heads) * (2 * HALF)
        prefetch_rows(weight_ED, first_row, num_rows, num_in, first_step * DEPTH, prefetch, 2 * HALF, THREADS, False)
    columns = tl.arange(0, HALF)[None, :]
    # Values have no norm, and any will do.
    norm_weight = qk_norm_JH + tl.minimum(head, num_rotated - 1) * (2 * HALF) + columns
    weight_1, weight_2 = tl.load(norm_weight).to(tl.float32), tl.load(norm_weight + HALF).to(tl.float32)
    allow_next(PDL)
    wait_for_inputs(PDL)
    token = token_block * TOKENS + tl.arange(0, TOKENS)
    # Asked for before the product, so that nothing waits for them after it.
    position = tl.load(positions_T + tl.minimum(token, num_tokens - 1)).to(tl.int64)
    slot = tl.load(slot_mapping_T + tl.minimum(token, num_tokens - 1)).to(tl.int64)
    rows = first_row + tl.arange(0, HALF)
    sums_1, sums_2 = products(
        normed_TD,
        weight_ED,
        (rows, rows + HALF),
        token,
        num_tokens,
        num_in,
        first_step,
        end_step,
        TOKENS,
        DEPTH,
        EVEN,
    )
    turn = rope_C2H + position[:, None] * (4 * HALF) + columns
    cos, sin = tl.load(turn).to(tl.float32), tl.load(turn + 3 * HALF).to(tl.float32)
    # From here on a token is a row, as in memory.
    sums_1, sums_2 = tl.trans(sums_1), tl.trans(sums_2)
    if SPLITS == 1:
        _finish(
            sums_1,
            sums_2,
            weight_1,
            weight_2,
            cos,
            sin,
            eps,
            head,
            token,
            slot,
            q_TNH,
            kv_P2BKH,
            num_tokens,
            num_heads,
            num_kv_heads,
            HALF,
            BLOCK_SIZE,
        )
    else:
        SIZE: tl.constexpr = TOKENS * 2 * HALF
        tile_partials = partials + tile * (SPLITS * SIZE) + tl.arange(0, TOKENS)[:, None] * (2 * HALF) + columns
        tl.store(tile_partials + split * SIZE, sums_1)
        tl.store(tile_partials + split * SIZE + HALF, sums_2)
        if arrives_last(arrivals + tile, SPLITS):
            _finish(
                sum_of_splits(tile_partials, SIZE, SPLITS),
                sum_of_splits(tile_partials + HALF, SIZE, SPLITS),
                weight_1,
                weight_2,
                cos,
                sin,
                eps,
                head,
                token,
                slot,
                q_TNH,
                kv_P2BKH,
                num_tokens,
                num_heads,
                num_kv_heads,
                HALF,
                BLOCK_SIZE,
            )


@triton.jit
def _finish(
    sums_1,
    sums_2,
    weight_1,
    weight_2,
    cos,
    sin,
    eps,
    head,
    token,
    slot,
    q_TNH,
    kv_P2BKH,
    num_tokens,
    num_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A head of the product, [TOKENS, HALF] twice, to where it belongs."""
    x_1, x_2 = sums_1.to(q_TNH.dtype.element_ty), sums_2.to(q_TNH.dtype.element_ty)
    is_value = head >= num_heads + num_kv_heads
    if not is_value:
        x_1, x_2 = normed_and_turned(x_1, x_2, weight_1, weight_2, eps, cos, cos, -sin, sin, HALF)
    columns = tl.arange(0, HALF)[None, :]
    valid = token[:, None] < num_tokens
    if head < num_heads:
        q_row = q_TNH + (token[:, None] * num_heads + head) * (2 * HALF) + columns
        tl.store(q_row, x_1, mask=valid)
        tl.store(q_row + HALF, x_2, mask=valid)
    else:
        kv_head = head - tl.where(is_value, num_heads + num_kv_heads, num_heads)
        row = cache_row(slot[:, None], is_value, kv_head, BLOCK_SIZE, num_kv_heads)
        kv_row = kv_P2BKH + row * (2 * HALF) + columns
        tl.store(kv_row, x_1, mask=valid)
        tl.store(kv_row + HALF, x_2, mask=valid)
