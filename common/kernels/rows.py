"""Kernels that keep the decode rows on the device: the host's edits, and the step from one token to the next.

Shapes: S rows of a batch, P blocks of a block table, I stop ids of a row, E edits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import supports_pdl, wait_for_inputs

EDITS_A_PROGRAM = 256


def apply_edits(words: Tensor, targets_E: Tensor, values_E: Tensor) -> None:
    """`words[targets_E] = values_E`, all int32; no two targets are equal."""
    num_edits = len(targets_E)
    grid = (triton.cdiv(num_edits, EDITS_A_PROGRAM),)
    _apply_edits[grid](words, targets_E, values_E, num_edits, BLOCK=EDITS_A_PROGRAM)


def advance(
    drawn_S: Tensor,
    token_ids_S: Tensor,
    positions_S: Tensor,
    kv_len_S: Tensor,
    slot_mapping_S: Tensor,
    block_table_SP: Tensor,
    first_stop_position_S: Tensor,
    stop_ids_SI: Tensor,
    *,
    block_size: int,
    scratch_slot: int,
) -> None:
    """Makes the drawn tokens the next step's input, in place.

    A row whose token is one of its stop ids, at `first_stop_position_S` or later, is taken out of use: its length
    becomes 0 and its slot the scratch slot, so that it never writes live KV again. Rows out of use stay so.
    """
    pdl = supports_pdl(token_ids_S.device)
    _advance[(len(token_ids_S),)](
        drawn_S,
        token_ids_S,
        positions_S,
        kv_len_S,
        slot_mapping_S,
        block_table_SP,
        first_stop_position_S,
        stop_ids_SI,
        block_table_SP.shape[1],
        block_table_SP.stride(0),
        scratch_slot,
        NUM_STOPS=stop_ids_SI.shape[1],
        BLOCK_SIZE=block_size,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )


# Neither their number nor where they lie in the copy may compile the kernel anew in the middle of serving.
@triton.jit(do_not_specialize=["num_edits"], do_not_specialize_on_alignment=["targets_E", "values_E"])
def _apply_edits(words, targets_E, values_E, num_edits, BLOCK: tl.constexpr):
    edits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = edits < num_edits
    targets = tl.load(targets_E + edits, mask=valid, other=0).to(tl.int64)
    tl.store(words + targets, tl.load(values_E + edits, mask=valid, other=0), mask=valid)


@triton.jit
def _advance(
    drawn_S,
    token_ids_S,
    positions_S,
    kv_len_S,
    slot_mapping_S,
    block_table_SP,
    first_stop_position_S,
    stop_ids_SI,
    table_width,
    table_stride,
    scratch_slot,
    NUM_STOPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    token = tl.load(drawn_S + row).to(tl.int32)
    position = tl.load(positions_S + row) + 1
    stop_ids = tl.load(stop_ids_SI + row * NUM_STOPS + tl.arange(0, NUM_STOPS))
    is_stop = (tl.sum((stop_ids == token).to(tl.int32), 0) > 0) & (position >= tl.load(first_stop_position_S + row))
    # The host has not grown the table of a row that has reached its last position: it never steps again.
    in_use = (tl.load(kv_len_S + row) > 0) & (is_stop == 0) & (position // BLOCK_SIZE < table_width)
    block = tl.load(block_table_SP + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=in_use, other=0)
    tl.store(token_ids_S + row, token)
    tl.store(positions_S + row, tl.where(in_use, position, 0))
    tl.store(kv_len_S + row, tl.where(in_use, position + 1, 0))
    tl.store(slot_mapping_S + row, tl.where(in_use, block * BLOCK_SIZE + position % BLOCK_SIZE, scratch_slot))
