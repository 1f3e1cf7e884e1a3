"""The steps between matrix products that touch each activation once: residual addition with RMS norm, and SiLU gating.

Everything is computed in fp32 and rounded once to the model's dtype. Shapes: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import allow_next, supports_pdl, wait_for_inputs

MAX_HIDDEN_SIZE = 16384


def add_norm(hidden_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds the pending half to the residual stream and normalises the sum: (normed_TD, residual_TD).

    The sum is rounded to the model's dtype before it is normalised. Without a residual it is `hidden_TD` itself.
    All tensors are contiguous.
    """
    num_tokens, hidden_size = hidden_TD.shape
    assert hidden_size <= MAX_HIDDEN_SIZE
    assert hidden_TD.is_contiguous()
    assert weight_D.is_contiguous()
    assert residual_TD is None or residual_TD.is_contiguous()
    pdl = supports_pdl(hidden_TD.device)
    normed_TD = torch.empty_like(hidden_TD)
    sum_TD = hidden_TD if residual_TD is None else torch.empty_like(hidden_TD)
    rows, num_warps = add_norm_tile(hidden_size)
    _add_norm[(triton.cdiv(num_tokens, rows),)](
        hidden_TD,
        hidden_TD if residual_TD is None else residual_TD,
        weight_D,
        normed_TD,
        sum_TD,
        num_tokens,
        hidden_size,
        eps,
        HAS_RESIDUAL=residual_TD is not None,
        ROWS=rows,
        BLOCK_D=triton.next_power_of_2(hidden_size),
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return normed_TD, sum_TD


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """out_TF: silu(gate) * up, of rows that hold all gates, then all ups. Contiguous."""
    assert gate_up_T2F.is_contiguous()
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    pdl = supports_pdl(gate_up_T2F.device)
    out_TF = torch.empty(num_tokens, width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    block, num_warps = silu_mul_tile(num_tokens)
    grid = (num_tokens * triton.cdiv(width, block),)
    _silu_mul[grid](gate_up_T2F, out_TF, width, BLOCK=block, PDL=pdl, num_warps=num_warps, launch_pdl=pdl)
    return out_TF


def add_norm_tile(hidden_size: int) -> tuple[int, int]:
    """(rows a program, warps). Not by the number of tokens: a row's sum is added up in one order in any batch."""
    return 1, min(max(triton.next_power_of_2(hidden_size) // 512, 1), 16)


def silu_mul_tile(num_tokens: int) -> tuple[int, int]:
    """(columns a program, warps)."""
    return (512, 2) if num_tokens <= 32 else (1024, 4)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_norm(
    hidden_TD,
    residual_TD,
    weight_D,
    normed_TD,
    sum_TD,
    num_tokens,
    hidden_size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    valid = (rows < num_tokens) & (columns < hidden_size)
    offsets = rows.to(tl.int64) * hidden_size + columns
    weight = tl.load(weight_D + columns, mask=columns < hidden_size, other=0).to(tl.float32)
    wait_for_inputs(PDL)
    allow_next(PDL)
    x = tl.load(hidden_TD + offsets, mask=valid, other=0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_TD + offsets, mask=valid, other=0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_TD + offsets, x, mask=valid)
    x = x.to(tl.float32)
    mean_square = tl.sum(x * x, 1)[:, None] / hidden_size
    normed = x * tl.rsqrt(mean_square + eps) * weight
    tl.store(normed_TD + offsets, normed.to(normed_TD.dtype.element_ty), mask=valid)


@triton.jit
def _silu_mul(gate_up_T2F, out_TF, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    num_blocks = tl.cdiv(width, BLOCK)
    columns = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    valid = columns < width
    wait_for_inputs(PDL)
    allow_next(PDL)
    gate = tl.load(gate_up_T2F + token * 2 * width + columns, mask=valid, other=0).to(tl.float32)
    up = tl.load(gate_up_T2F + token * 2 * width + width + columns, mask=valid, other=0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_TF + token * width + columns, out.to(out_TF.dtype.element_ty), mask=valid)
