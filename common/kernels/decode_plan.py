"""Cuts one step's decode attention into items of work, on the device, from the sequences' lengths alone.

An item is a sequence or a piece of one; a program does one item of one kv head. Pieces are cut so that no item is much
longer than the others, whatever the mix of lengths, and so that few sequences still occupy every SM.

Shapes: S sequences, I items, N query heads, K kv heads, G = N / K rounded up to a power of two, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import allow_next, supports_pdl, wait_for_inputs

# A sequence too long for so many pieces of the fixed length has longer ones.
MAX_FIXED_PIECES = 16
# With fixed pieces and more sequences than these, each program does a whole sequence, piece by piece.
MAX_CUT_SEQUENCES = 1024
# On an H200's 132 SMs four stages are as fast as three; on 80 and fewer three read 5 to 20 % more in the same time.
PART_OF_SMS = 100
# Sequences that each is compared with at a time.
COMPARED = tl.constexpr(16)


class Tiling(NamedTuple):
    """How a program reads its piece: `tile` positions at a time, `num_stages - 1` tiles on their way."""

    tile: int
    num_warps: int
    num_stages: int


class DecodePlan(NamedTuple):
    """What all layers of one step share."""

    # Sequence, first position, end position, the sequence's first item, its number of items, length of a piece.
    items_I8: Tensor
    num_items_1: Tensor
    # Of items that are pieces: unnormalised outputs; running maxima and sums.
    partial_IKGH: Tensor
    max_sum_IK2G: Tensor
    # Pieces that have been stored; zero between layers.
    arrived_SK: Tensor
    # Items that have programs of their own; any further items are done by the same programs.
    grid_items: int
    tiling: Tiling
    fixed_pieces: bool


def plan_decode(
    kv_len_S: Tensor,
    *,
    num_kv_heads: int,
    num_query_heads: int,
    head_dim: int,
    num_programs: int,
    chunk: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tiling: Tiling | None = None,
    programs_per_sm: int | None = None,
) -> DecodePlan:
    """Cuts sequences of kv_len_S positions (0: the row is not in use) for `num_programs` SMs, in one small kernel.

    Many alike sequences stay whole. Few or unequal ones are cut into pieces of at most total / (S / 2), or of what
    fills the SMs. With `chunk` a sequence's results depend, to the bit, on its own length and never on the batch.
    """
    num_seqs, device = len(kv_len_S), kv_len_S.device
    tiling = tiling or default_tiling(num_seqs, num_programs, head_dim, dtype, fixed_pieces=chunk is not None)
    programs_per_sm = programs_per_sm or default_programs(num_seqs)
    cut = chunk is None or num_seqs <= MAX_CUT_SEQUENCES
    extra_items = max(triton.cdiv(programs_per_sm * num_programs, num_kv_heads), num_seqs // 2)
    grid_items = num_seqs + (extra_items if cut else 0)
    max_items = grid_items if chunk is None or not cut else num_seqs * MAX_FIXED_PIECES
    group = triton.next_power_of_2(num_query_heads // num_kv_heads)
    partial_shape = (max_items if cut else 0, num_kv_heads, group, head_dim)
    plan = DecodePlan(
        items_I8=torch.empty(max_items, 8, dtype=torch.int32, device=device),
        num_items_1=torch.empty(1, dtype=torch.int32, device=device),
        partial_IKGH=torch.empty(partial_shape, dtype=torch.float32, device=device),
        max_sum_IK2G=torch.empty(*partial_shape[:2], 2, group, dtype=torch.float32, device=device),
        arrived_SK=torch.empty(num_seqs, num_kv_heads, dtype=torch.int32, device=device),
        grid_items=min(grid_items, max_items),
        tiling=tiling,
        fixed_pieces=chunk is not None,
    )
    block = max(256, triton.next_power_of_2(num_seqs))
    pdl = supports_pdl(device)
    _plan[(1,)](
        kv_len_S,
        plan.items_I8,
        plan.num_items_1,
        plan.arrived_SK,
        num_seqs,
        extra_items,
        chunk or 0,
        NUM_KV_HEADS=num_kv_heads,
        MAX_PIECES=MAX_FIXED_PIECES,
        TILE=tiling.tile,
        FIXED_PIECES=plan.fixed_pieces,
        CUT=cut,
        BLOCK_S=block,
        PDL=pdl,
        num_warps=min(max(block // 64, 4), 32),
        launch_pdl=pdl,
    )
    return plan


def fixed_piece_bytes(num_seqs: int, *, num_kv_heads: int, num_query_heads: int, head_dim: int) -> int:
    """The largest partial results of a plan with fixed pieces for at most `num_seqs` sequences."""
    num_pieces = min(num_seqs, MAX_CUT_SEQUENCES) * MAX_FIXED_PIECES
    return num_pieces * num_kv_heads * triton.next_power_of_2(num_query_heads // num_kv_heads) * (head_dim + 2) * 4


def default_tiling(num_seqs: int, num_programs: int, head_dim: int, dtype: torch.dtype, fixed_pieces: bool) -> Tiling:
    """The same for every batch where pieces are fixed: it is part of the order of summation."""
    if fixed_pieces:
        return Tiling(tile=32, num_warps=2 if head_dim == 128 else 4, num_stages=3)
    if dtype.itemsize * head_dim > 256:
        return Tiling(tile=32, num_warps=4, num_stages=2)
    if num_seqs <= 4:
        return Tiling(tile=64, num_warps=4, num_stages=2)
    # On a part of the SMs, more programs at once keep more bytes on their way than more stages of each.
    return Tiling(tile=32, num_warps=2, num_stages=3 if num_seqs <= 128 or num_programs <= PART_OF_SMS else 4)


def default_programs(num_seqs: int) -> int:
    """Items of few sequences, over all kv heads, for each SM: as many as it has room for at once."""
    return 3 if 4 < num_seqs <= 128 else 6


@triton.jit(do_not_specialize=["num_seqs", "extra_items", "fixed_length"])
def _plan(
    kv_len_S,
    items_I8,
    num_items_1,
    arrived_SK,
    num_seqs,
    extra_items,
    fixed_length,
    NUM_KV_HEADS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    TILE: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    allow_next(PDL)
    seqs = tl.arange(0, BLOCK_S)
    in_batch = seqs < num_seqs
    lens = tl.load(kv_len_S + seqs, mask=in_batch, other=0).to(tl.int32)
    # The items are at most total / length + S, which is extra_items + S.
    length = tl.cdiv(tl.cdiv(tl.sum(lens, 0), tl.maximum(extra_items, 1)), TILE) * TILE
    num_items, lengths = _pieces(lens, length, fixed_length, MAX_PIECES, TILE, FIXED_PIECES, CUT)
    ends = lengths if CUT else lens
    num_items = tl.where(in_batch, num_items, 0)
    # The longest items come first, so that the last programs to start are short ones.
    first_items = tl.zeros((BLOCK_S,), tl.int32)
    size = tl.minimum(ends, lens)[:, None]
    for first in range(0, num_seqs, COMPARED):
        others = first + tl.arange(0, COMPARED)
        other_lens = tl.load(kv_len_S + others, mask=others < num_seqs, other=0).to(tl.int32)
        other_items, other_lengths = _pieces(other_lens, length, fixed_length, MAX_PIECES, TILE, FIXED_PIECES, CUT)
        other_size = tl.minimum(other_lengths if CUT else other_lens, other_lens)[None, :]
        is_before = (other_size > size) | ((other_size == size) & (others[None, :] < seqs[:, None]))
        is_before = is_before & (others < num_seqs)[None, :]
        first_items += tl.sum(tl.where(is_before, other_items[None, :], 0), 1)
    tl.store(num_items_1, tl.sum(num_items, 0))
    for head in tl.static_range(NUM_KV_HEADS):
        tl.store(arrived_SK + seqs * NUM_KV_HEADS + head, 0, mask=in_batch)
    for index in range(tl.max(num_items, 0)):
        item = items_I8 + (first_items + index) * 8
        exists = index < num_items
        tl.store(item, seqs, mask=exists)
        tl.store(item + 1, index * lengths, mask=exists)
        tl.store(item + 2, tl.minimum(index * lengths + ends, lens), mask=exists)
        tl.store(item + 3, first_items, mask=exists)
        tl.store(item + 4, num_items, mask=exists)
        tl.store(item + 5, lengths, mask=exists)


@triton.jit
def _pieces(
    lens,
    length,
    fixed_length,
    MAX_PIECES: tl.constexpr,
    TILE: tl.constexpr,
    FIXED_PIECES: tl.constexpr,
    CUT: tl.constexpr,
):
    """(items, positions of a piece) of each sequence. Pieces are whole tiles and equally long, save for the last."""
    if FIXED_PIECES:
        num_pieces = tl.minimum(tl.cdiv(lens, fixed_length), MAX_PIECES)
    else:
        num_pieces = tl.cdiv(lens, tl.maximum(length, TILE))
    lengths = tl.maximum(tl.cdiv(tl.cdiv(lens, tl.maximum(num_pieces, 1)), TILE), 1) * TILE
    num_items = tl.maximum(tl.cdiv(lens, lengths), 1) if CUT else tl.full(lens.shape, 1, tl.int32)
    return num_items, lengths
