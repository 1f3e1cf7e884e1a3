"""Matrix products of a few tokens, in which every program holds its rows of the weight in registers before it waits.

Such a product takes as long as its weight takes to arrive. So a program first asks for all of its part of the weight,
which no kernel writes, then waits for the kernels before it, and only then loads the activations: under programmatic
dependent launch the weight arrives while the kernel before still drains. What surrounds the product is done in the same
kernel: residual addition and RMS norm of its input, in every program anew, and SiLU gating of its output.

Two kernels: `VectorPlan` multiplies in fp32 FMAs (1 to 4 tokens), `ResidentPlan` in tensor cores (up to 16).

Shapes: T tokens, D inputs, E rows of the weight; a gated product has E/2 outputs, its weight all gate rows first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import INTERPRETED, allow_next, supports_pdl, wait_for_inputs
from common.kernels.tiled_linear import dot, silu_times, weight_row
from common.kernels.words import add_products, add_values, load_words, normalised, pack, unpack

_COMPILED = tl.constexpr(not INTERPRETED)
# A lane loads 16 bytes at once, so a warp 128 words of 32 bits.
_WARP_WORDS = 128


class VectorPlan(NamedTuple):
    """A program has `row_warps` groups of `depth_warps` warps; a group computes `rows` rows, its warps sharing D."""

    rows: int
    row_warps: int
    depth_warps: int


class ResidentPlan(NamedTuple):
    """A program computes `rows` rows (8, or a multiple of 16); each of its warps works on chunks of `depth` inputs."""

    rows: int
    warps: int
    depth: int


class Norm(NamedTuple):
    """RMS norm of hidden + residual, before the product."""

    residual_TD: Tensor | None
    weight_D: Tensor
    eps: float


def streamed_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    plan: VectorPlan | ResidentPlan,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_TE, or out_TF of a gated product; residual_TD).

    Without a norm, or with one that adds no residual, residual_TD is `x_TD` itself. All tensors are contiguous and of
    one dtype: bfloat16, for a `VectorPlan` with an even D, or float32, which a GPU has only `VectorPlan` for.
    """
    (num_tokens, num_in), num_rows = x_TD.shape, len(weight_ED)
    assert 1 <= num_tokens <= 16
    assert x_TD.is_contiguous()
    assert weight_ED.is_contiguous()
    assert weight_ED.shape[1] == num_in
    assert weight_ED.numel() < 2**31
    assert x_TD.dtype == weight_ED.dtype
    assert x_TD.dtype in (torch.bfloat16, torch.float32)
    residual_TD = None if norm is None else norm.residual_TD
    assert residual_TD is None or (residual_TD.is_contiguous() and residual_TD.shape == x_TD.shape)
    num_out = num_rows // 2 if gated else num_rows
    out_TE = torch.empty(num_tokens, num_out, dtype=out_dtype or x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    tensors = (x_TD, x_TD if residual_TD is None else residual_TD, x_TD if norm is None else norm.weight_D, weight_ED)
    pdl = supports_pdl(x_TD.device)
    flags = {"NORM": norm is not None, "RESIDUAL": residual_TD is not None, "GATED": gated, "PDL": pdl}
    eps = 0.0 if norm is None else norm.eps
    if isinstance(plan, VectorPlan):
        assert num_in * x_TD.itemsize % 4 == 0
        assert plan.rows % 2 == 0 or not gated
        words = [tensor.view(torch.int32) for tensor in tensors]
        _vector[(triton.cdiv(num_rows, plan.rows * plan.row_warps),)](
            *words,
            out_TE,
            sum_TD.view(torch.int32),
            num_tokens,
            num_rows,
            eps,
            D=num_in,
            WORDS=words[-1].shape[1],
            TOKENS=triton.next_power_of_2(num_tokens),
            ROWS=plan.rows,
            ROW_WARPS=plan.row_warps,
            BLOCK=plan.depth_warps * _WARP_WORDS,
            PACKED=x_TD.dtype == torch.bfloat16,
            **flags,
            num_warps=plan.row_warps * plan.depth_warps,
            launch_pdl=pdl,
        )
    else:
        assert x_TD.dtype == torch.bfloat16 or INTERPRETED
        _resident[(triton.cdiv(num_rows, plan.rows),)](
            *tensors,
            out_TE,
            sum_TD,
            num_tokens,
            num_rows,
            eps,
            D=num_in,
            TOKENS=8 if num_tokens <= 8 else 16,
            ROWS=plan.rows,
            WARPS=plan.warps,
            DEPTH=plan.depth,
            **flags,
            num_warps=plan.warps,
            launch_pdl=pdl,
        )
    return out_TE, sum_TD


@triton.jit(do_not_specialize=["num_tokens"])
def _vector(
    hidden_TD,
    residual_TD,
    norm_weight_D,
    weight_ED,
    out_TE,
    sum_TD,
    num_tokens,
    num_rows,
    eps,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    # Tiles are [ROW_WARPS, rows, words]: this order gives each group of warps its own index of the first axis.
    CHUNKS: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    EVEN: tl.constexpr = WORDS % BLOCK == 0
    group = tl.arange(0, ROW_WARPS)[:, None, None]
    word = tl.arange(0, BLOCK)[None, None, :]
    index = tl.program_id(0) * (ROW_WARPS * ROWS) + group * ROWS + tl.arange(0, ROWS)[None, :, None]
    rows = weight_row(tl.minimum(index, num_rows - 1), num_rows, GATED)
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        weights += (load_words(weight_ED + rows * WORDS, chunk * BLOCK + word, WORDS, EVEN, "evict_first"),)
    # Every group of warps loads the activations for itself: what the groups do not share, they need not wait for.
    own = group * 0
    norm_weights = ()
    if NORM:
        for chunk in tl.static_range(CHUNKS):
            norm_weights += (load_words(norm_weight_D + own, chunk * BLOCK + word, WORDS, EVEN, ""),)
    allow_next(PDL)
    wait_for_inputs(PDL)
    inputs = ()
    if NORM:
        for token in tl.static_range(TOKENS):
            offset = tl.minimum(token, num_tokens - 1) * WORDS + own
            summed = ()
            for chunk in tl.static_range(CHUNKS):
                words = load_words(hidden_TD + offset, chunk * BLOCK + word, WORDS, EVEN, "")
                if RESIDUAL:
                    residual = load_words(residual_TD + offset, chunk * BLOCK + word, WORDS, EVEN, "")
                    words = pack(add_values(unpack(words, PACKED), unpack(residual, PACKED)), PACKED)
                summed += (words,)
            squares = tl.zeros([ROW_WARPS, 1, BLOCK], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                squares = add_products(squares, unpack(summed[chunk], PACKED), unpack(summed[chunk], PACKED))
            scale = tl.rsqrt(tl.sum(squares, 2, keep_dims=True) / D + eps)
            for chunk in tl.static_range(CHUNKS):
                if RESIDUAL:
                    writes = (tl.program_id(0) == 0) & (group == 0) & (token < num_tokens)
                    tl.store(
                        sum_TD + offset + (chunk * BLOCK + word),
                        summed[chunk],
                        mask=writes & (chunk * BLOCK + word < WORDS),
                    )
                inputs += (normalised(summed[chunk], scale, norm_weights[chunk], PACKED),)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros([ROW_WARPS, ROWS, BLOCK], tl.float32),)
    for chunk in tl.static_range(CHUNKS):
        weight = unpack(weights[chunk], PACKED)
        added = ()
        for token in tl.static_range(TOKENS):
            if NORM:
                words = inputs[token * CHUNKS + chunk]
            else:
                offset = tl.minimum(token, num_tokens - 1) * WORDS + own
                words = load_words(hidden_TD + offset, chunk * BLOCK + word, WORDS, EVEN, "")
            added += (add_products(sums[token], weight, unpack(words, PACKED)),)
        sums = added
    for token in tl.static_range(TOKENS):
        out = tl.sum(sums[token], 2)
        column = tl.program_id(0) * (ROW_WARPS * ROWS) + tl.arange(0, ROW_WARPS)[:, None] * ROWS
        num_out = num_rows
        if GATED:
            gate, up = tl.split(tl.reshape(out, (ROW_WARPS, ROWS // 2, 2)))
            out = silu_times(gate, up)
            column = column // 2 + tl.arange(0, ROWS // 2)[None, :]
            num_out = num_rows // 2
        else:
            column = column + tl.arange(0, ROWS)[None, :]
        valid = (column < num_out) & (token < num_tokens)
        tl.store(out_TE + token * num_out + column, out.to(out_TE.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def _resident(
    hidden_TD,
    residual_TD,
    norm_weight_D,
    weight_ED,
    out_TE,
    sum_TD,
    num_tokens,
    num_rows,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    # A batched product of [WARPS, rows, DEPTH]: one warp works on each index of the batch, which are slices of D.
    CHUNKS: tl.constexpr = (D + WARPS * DEPTH - 1) // (WARPS * DEPTH)
    EVEN: tl.constexpr = D % (WARPS * DEPTH) == 0
    depth = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    first = tl.program_id(0) * ROWS
    rows = weight_row(tl.minimum(first + tl.arange(0, ROWS)[None, :, None], num_rows - 1), num_rows, GATED)
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        weights += (load_words(weight_ED + rows * D, chunk * (WARPS * DEPTH) + depth, D, EVEN, "evict_first"),)
    norm_weights = ()
    if NORM:
        for chunk in tl.static_range(CHUNKS):
            norm_weights += (load_words(norm_weight_D, chunk * (WARPS * DEPTH) + depth, D, EVEN, ""),)
    allow_next(PDL)
    wait_for_inputs(PDL)
    token = tl.arange(0, TOKENS)[None, :, None]
    inputs = ()
    squares = tl.zeros([TOKENS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * (WARPS * DEPTH) + depth
        valid = (token < num_tokens) & (column < D)
        x = tl.load(hidden_TD + token * D + column, mask=valid, other=0)
        if RESIDUAL:
            residual = tl.load(residual_TD + token * D + column, mask=valid, other=0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_TD + token * D + column, x, mask=valid & (tl.program_id(0) == 0))
        if NORM:
            squares += tl.sum(tl.sum(x.to(tl.float32) * x.to(tl.float32), 2), 0)
        inputs += (x,)
    if NORM:
        scale = tl.rsqrt(squares / D + eps)[None, :, None]
    # Eight rows of the weight can only be the narrow operand of a tensor core instruction; 16 are the wide one.
    WIDE: tl.constexpr = ROWS >= 16
    if WIDE:
        sums = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
    else:
        sums = tl.zeros([WARPS, TOKENS, ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        x = inputs[chunk]
        if NORM:
            x = (x.to(tl.float32) * scale * norm_weights[chunk].to(tl.float32)).to(x.dtype)
        weight = _not_before_here(weights[chunk])
        if WIDE:
            sums = dot(weight, tl.permute(x, (0, 2, 1)), sums)
        else:
            sums = dot(x, tl.permute(weight, (0, 2, 1)), sums)
    out = tl.sum(sums, 0)
    if WIDE:
        out = tl.trans(out)
    token = tl.arange(0, TOKENS)[:, None]
    num_out = num_rows
    if GATED:
        gate, up = tl.split(tl.reshape(out, (TOKENS, ROWS // 2, 2)))
        out = silu_times(gate, up)
        column = first // 2 + tl.arange(0, ROWS // 2)[None, :]
        num_out = num_rows // 2
    else:
        column = first + tl.arange(0, ROWS)[None, :]
    valid = (token < num_tokens) & (column < num_out)
    tl.store(out_TE + token * num_out + column, out.to(out_TE.dtype.element_ty), mask=valid)


@triton.jit
def _not_before_here(tile):
    """The tile. Keeps the compiler from rearranging it, and so from waiting for it, where it was loaded."""
    if _COMPILED:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    return tile
