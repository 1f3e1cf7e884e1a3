"""Matrix products in tiles on the tensor cores, with the weight streamed through shared memory.

The weight is the wide operand: a program multiplies a block of its rows with a block of the tokens. Where a weight has
too few rows for the device, D is split over programs: each writes its partial sums, and the one that arrives last adds
them in a fixed order, so that a result never depends on who was last. Before it waits for the kernels before it, a
program may have the start of its part of the weight brought into L2.

Shapes: T tokens, D inputs, E rows of the weight; a gated product has E/2 outputs, its weight all gate rows first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch import INTERPRETED, allow_next, supports_pdl, wait_for_inputs

_COMPILED = tl.constexpr(not INTERPRETED)


class TiledPlan(NamedTuple):
    """A program computes `rows` outputs of `tokens` tokens in steps of `depth` inputs, `stages` - 1 of them under way.

    `prefetch` is how many bytes of each of its weight rows, a multiple of 16, it asks for before it waits.
    """

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    prefetch: int = 0


def tiled_linear(
    x_TD: Tensor, weight_ED: Tensor, plan: TiledPlan, *, gated: bool = False, out_dtype: torch.dtype | None = None
) -> Tensor:
    """out_TE, or out_TF of a gated product. Tensors are contiguous and of one dtype; sums are in float32."""
    (num_tokens, num_in), num_rows = x_TD.shape, len(weight_ED)
    assert x_TD.is_contiguous()
    assert weight_ED.is_contiguous()
    assert weight_ED.shape[1] == num_in
    assert max(weight_ED.numel(), x_TD.numel()) < 2**31
    assert x_TD.dtype == weight_ED.dtype
    num_out = num_rows // 2 if gated else num_rows
    out_TE = torch.empty(num_tokens, num_out, dtype=out_dtype or x_TD.dtype, device=x_TD.device)
    num_tiles = triton.cdiv(num_rows, plan.rows) * triton.cdiv(num_tokens, plan.tokens)
    if num_tiles == 0:
        return out_TE
    partials, arrivals = out_TE, out_TE
    if plan.splits > 1:
        num_sums = num_tiles * plan.splits * plan.rows * plan.tokens
        partials = torch.empty(num_sums, dtype=torch.float32, device=x_TD.device)
        arrivals = _arrivals(x_TD.device).take(num_tiles)
    pdl = supports_pdl(x_TD.device)
    _tiled[(num_tiles, plan.splits)](
        x_TD,
        weight_ED,
        out_TE,
        partials,
        arrivals,
        num_tokens,
        num_rows,
        num_in,
        plan.prefetch // 16 if num_in * x_TD.itemsize % 16 == 0 else 0,
        ROWS=plan.rows,
        TOKENS=plan.tokens,
        DEPTH=plan.depth,
        SPLITS=plan.splits,
        THREADS=32 * plan.warps,
        EVEN=num_in % plan.depth == 0,
        GATED=gated,
        PDL=pdl,
        num_warps=plan.warps,
        num_stages=plan.stages,
        launch_pdl=pdl,
    )
    return out_TE


class _Arrivals:
    """A device's zeros in which the programs of split products count; the last of a tile puts its zero back.

    Kernels that may run at the same time never share them: a product that is being captured gets its own, as two graphs
    may be replayed at once, and one that is not shares them with its stream alone.
    """

    _CAPACITY = 1 << 22
    _OF_A_STREAM = 1 << 12

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            assert not torch.cuda.is_current_stream_capturing(), "a split product runs once before one is captured"
        self._zeros = torch.zeros(self._CAPACITY, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._num_taken = 0
        self._of_streams: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor:
        assert count <= self._OF_A_STREAM
        on_cuda = self._zeros.is_cuda
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return self._cut(count)
        stream = torch.cuda.current_stream(self._zeros.device).cuda_stream if on_cuda else 0
        if stream not in self._of_streams:
            self._of_streams[stream] = self._cut(self._OF_A_STREAM)
        return self._of_streams[stream]

    def _cut(self, count: int) -> Tensor:
        first, self._num_taken = self._num_taken, self._num_taken + triton.cdiv(count, 4) * 4
        if self._num_taken > self._CAPACITY:
            raise RuntimeError("too many split products in captured graphs")
        return self._zeros[first : first + count]


@functools.cache
def _arrivals(device: torch.device) -> _Arrivals:
    return _Arrivals(device)


@triton.jit(do_not_specialize=["num_tokens", "prefetch"])
def _tiled(
    x_TD,
    weight_ED,
    out_TE,
    partials,
    arrivals,
    num_tokens,
    num_rows,
    num_in,
    prefetch,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    # Blocks of tokens in groups of 8, and in a group block by block for each block of rows: both stay in L2.
    tile, split = tl.program_id(0), tl.program_id(1)
    row_blocks, token_blocks = tl.cdiv(num_rows, ROWS), tl.cdiv(num_tokens, TOKENS)
    group = tile // (8 * row_blocks)
    group_size = tl.minimum(token_blocks - group * 8, 8)
    token_block = group * 8 + tile % (8 * row_blocks) % group_size
    first_row = tile % (8 * row_blocks) // group_size * ROWS
    steps = tl.cdiv(num_in, DEPTH)
    first_step, end_step = split * steps // SPLITS, (split + 1) * steps // SPLITS
    if PDL:
        _prefetch_rows(weight_ED, first_row, num_rows, num_in, first_step * DEPTH, prefetch, ROWS, THREADS, GATED)
    allow_next(PDL)
    wait_for_inputs(PDL)
    token = token_block * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    rows = weight_row(tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1), num_rows, GATED)
    weight_pointers = weight_ED + rows[:, None] * num_in + depth[None, :]
    x_pointers = x_TD + tl.minimum(token, num_tokens - 1)[None, :] * num_in + depth[:, None]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(first_step, end_step):
        if EVEN:
            weight = tl.load(weight_pointers + step * DEPTH)
            x = tl.load(x_pointers + step * DEPTH)
        else:
            left = num_in - step * DEPTH
            weight = tl.load(weight_pointers + step * DEPTH, mask=depth[None, :] < left, other=0)
            x = tl.load(x_pointers + step * DEPTH, mask=depth[:, None] < left, other=0)
        sums = dot(weight, x, sums)
    if SPLITS == 1:
        _store(out_TE, sums, first_row, token, num_tokens, num_rows, ROWS, TOKENS, GATED)
    else:
        within = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tile_partials = partials + tile * (SPLITS * ROWS * TOKENS) + within
        tl.store(tile_partials + split * (ROWS * TOKENS), sums)
        # Every thread has written before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(tile_partials + other * (ROWS * TOKENS), cache_modifier=".cg")
            _store(out_TE, total, first_row, token, num_tokens, num_rows, ROWS, TOKENS, GATED)
            tl.store(arrivals + tile, 0)


@triton.jit
def _store(
    out_TE,
    sums,
    first_row,
    token,
    num_tokens,
    num_rows,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
):
    num_out = num_rows
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (ROWS // 2, 2, TOKENS)), (0, 2, 1)))
        sums = silu_times(gate, up)
        column = first_row // 2 + tl.arange(0, ROWS // 2)[:, None]
        num_out = num_rows // 2
    else:
        column = first_row + tl.arange(0, ROWS)[:, None]
    valid = (column < num_out) & (token[None, :] < num_tokens)
    tl.store(out_TE + token[None, :].to(tl.int64) * num_out + column, sums.to(out_TE.dtype.element_ty), mask=valid)


@triton.jit
def _prefetch_rows(
    weight_ED,
    first_row,
    num_rows,
    num_in,
    first_in,
    prefetch,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Asks for the first 16 * prefetch bytes of each row's part, as far as they lie in the row."""
    # A warp issues its requests one by one, so they are spread over all warps: `LANES` apart, the rest idle.
    LANES: tl.constexpr = THREADS // ROWS if THREADS > ROWS else 1
    lane = tl.arange(0, ROWS * LANES)
    row = weight_row(tl.minimum(first_row + lane // LANES, num_rows - 1), num_rows, GATED)
    size = tl.minimum((num_in - first_in) * weight_ED.dtype.element_ty.primitive_bitwidth // 128, prefetch) * 16
    size = tl.where(lane % LANES == 0, size, 0)
    if _COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0; mov.b32 $0, 0;"
            " @some cp.async.bulk.prefetch.L2.global [$1], $2; }",
            "=r,l,r",
            [(weight_ED + row * num_in + first_in).to(tl.int64), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def weight_row(index, num_rows, GATED: tl.constexpr):
    """The index-th row to compute: of a gated product every gate row is followed by its up row."""
    row = index
    if GATED:
        row = index // 2 + index % 2 * (num_rows // 2)
    return row


@triton.jit
def silu_times(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def dot(left, right, sums):
    # Interpreted, tl.dot multiplies the bits of a bfloat16.
    if not _COMPILED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
