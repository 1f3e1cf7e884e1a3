"""Between the query-key-value projection and attention: norm and rotation of every head, and the write into the cache.

Shapes: T tokens, E = N + 2K heads of the projection (queries, keys, values), J = N + K heads that are normalised and
rotated, N query heads, K kv heads, H head_dim, C context positions, P blocks, B block_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import allow_next, supports_pdl, wait_for_inputs


def norm_rotate_write(
    qkv_TEH: Tensor,
    qk_norm_JH: Tensor,
    eps: float,
    rope_C2H: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    kv_P2BKH: Tensor,
    num_heads: int,
) -> Tensor:
    """Writes each token's keys and values into its slot of the cache and returns its queries, q_TNH, contiguous.

    Queries and keys are RMS-normalised over H, scaled by their row of `qk_norm_JH` and turned by the token's position:
    `rope_C2H[p, 0]` holds the cosines, `rope_C2H[p, 1]` the sines with the first half negated. Values are copied.
    fp32 inside, one rounding. Slots are `block * B + offset`, none negative; all tensors are contiguous. Positions and
    slots are read while the kernel before this one may still run, so it has to be another kernel that wrote them.
    """
    num_tokens, num_all_heads, head_dim = qkv_TEH.shape
    block_size, num_kv_heads = kv_P2BKH.shape[2:4]
    assert num_all_heads == num_heads + 2 * num_kv_heads
    assert qk_norm_JH.shape == (num_heads + num_kv_heads, head_dim)
    assert all(x.is_contiguous() for x in (qkv_TEH, qk_norm_JH, rope_C2H, kv_P2BKH))
    assert positions_T.stride(0) == slot_mapping_T.stride(0) == 1
    pdl = supports_pdl(qkv_TEH.device)
    q_TNH = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv_TEH.dtype, device=qkv_TEH.device)
    heads, num_warps = rotate_write_tile(num_all_heads, head_dim)
    _norm_rotate_write[(num_tokens * triton.cdiv(num_all_heads, heads),)](
        qkv_TEH,
        qk_norm_JH,
        eps,
        rope_C2H,
        positions_T,
        slot_mapping_T,
        kv_P2BKH,
        q_TNH,
        block_size,
        num_heads,
        num_kv_heads,
        HEADS=heads,
        HALF=head_dim // 2,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return q_TNH


def rotate_write_tile(num_all_heads: int, head_dim: int) -> tuple[int, int]:
    """(heads a program, warps). Not by the number of tokens: a head's sum is added up in one order in any batch."""
    return min(triton.next_power_of_2(num_all_heads), max(2048 // head_dim, 1)), 4


@triton.jit
def _norm_rotate_write(
    qkv_TEH,
    qk_norm_JH,
    eps,
    rope_C2H,
    positions_T,
    slot_mapping_T,
    kv_P2BKH,
    q_TNH,
    block_size,
    num_heads,
    num_kv_heads,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    num_rotated = num_heads + num_kv_heads
    num_all = num_rotated + num_kv_heads
    num_groups = tl.cdiv(num_all, HEADS)
    token = (tl.program_id(0) // num_groups).to(tl.int64)
    heads = tl.program_id(0) % num_groups * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    is_value = heads >= num_rotated
    weight_offsets = heads * (2 * HALF) + columns
    weight_1 = tl.load(qk_norm_JH + weight_offsets, mask=is_value == 0, other=0).to(tl.float32)
    weight_2 = tl.load(qk_norm_JH + weight_offsets + HALF, mask=is_value == 0, other=0).to(tl.float32)
    position = tl.load(positions_T + token).to(tl.int64)
    slot = tl.load(slot_mapping_T + token).to(tl.int64)
    turn = rope_C2H + position * (4 * HALF) + columns
    cos_1, cos_2 = tl.load(turn).to(tl.float32), tl.load(turn + HALF).to(tl.float32)
    sin_1, sin_2 = tl.load(turn + 2 * HALF).to(tl.float32), tl.load(turn + 3 * HALF).to(tl.float32)
    wait_for_inputs(PDL)
    # Not before the wait: attention relies on it, see `decode_attention`.
    allow_next(PDL)
    source = qkv_TEH + (token * num_all + heads) * (2 * HALF) + columns
    x_1 = tl.load(source, mask=heads < num_all, other=0)
    x_2 = tl.load(source + HALF, mask=heads < num_all, other=0)
    y_1, y_2 = normed_and_turned(x_1, x_2, weight_1, weight_2, eps, cos_1, cos_2, sin_1, sin_2, HALF)
    out_1, out_2 = tl.where(is_value, x_1, y_1), tl.where(is_value, x_2, y_2)

    q_row = q_TNH + (token * num_heads + heads) * (2 * HALF) + columns
    tl.store(q_row, out_1, mask=heads < num_heads)
    tl.store(q_row + HALF, out_2, mask=heads < num_heads)
    kv_head = heads - tl.where(is_value, num_rotated, num_heads)
    kv_row = cache_row(slot, is_value, kv_head, block_size, num_kv_heads) * (2 * HALF) + columns
    in_cache = (heads >= num_heads) & (heads < num_all)
    tl.store(kv_P2BKH + kv_row, out_1, mask=in_cache)
    tl.store(kv_P2BKH + kv_row + HALF, out_2, mask=in_cache)


@triton.jit
def normed_and_turned(x_1, x_2, weight_1, weight_2, eps, cos_1, cos_2, sin_1, sin_2, HALF: tl.constexpr):
    """Heads, each a row of two halves, RMS-normalised and turned in float32, then rounded once to their dtype."""
    y_1, y_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    mean_square = (tl.sum(y_1 * y_1, 1) + tl.sum(y_2 * y_2, 1))[:, None] / (2 * HALF)
    scale = tl.rsqrt(mean_square + eps)
    y_1, y_2 = y_1 * scale * weight_1, y_2 * scale * weight_2
    return (y_1 * cos_1 + y_2 * sin_1).to(x_1.dtype), (y_2 * cos_2 + y_1 * sin_2).to(x_2.dtype)


@triton.jit
def cache_row(slot, is_value, kv_head, block_size, num_kv_heads):
    """Which row of kv_P2BKH, of H elements each, holds a kv head of a slot, which is an int64: a cache is large."""
    # Of a block, the keys lie before the values; of both, the kv heads of one position after another.
    part = slot // block_size * 2 + is_value.to(tl.int64)
    return (part * block_size + slot % block_size) * num_kv_heads + kv_head
