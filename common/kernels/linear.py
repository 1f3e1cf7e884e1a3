"""The matrix products of a step, x @ weight.T, with what surrounds them; which kernel computes each is chosen here.

A product of few tokens takes as long as its weight takes to arrive, and the kernels of `streamed_linear` and
`tiled_linear` come close to that. From some number of tokens on, which depends on the shape, the vendor's library does.
The choice depends on shapes and dtype alone, so that a captured graph repeats it.

Shapes: T tokens, D inputs, E outputs, F FFN width; a gated weight has 2F rows, all gate rows first. Of projected heads:
N for queries, K kv heads, J = N + K, H head_dim, C context, P blocks, B block_size.
"""

from __future__ import annotations

import enum
import functools

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from common.kernels.elementwise import add_norm, silu_mul
from common.kernels.rotate_write import norm_rotate_write
from common.kernels.streamed_linear import Norm, ResidentPlan, VectorPlan, streamed_linear
from common.kernels.tiled_linear import TiledPlan, tiled_linear

Plan = VectorPlan | ResidentPlan | TiledPlan


class Product(enum.Enum):
    PLAIN = "linear"
    NORMED = "add_norm_linear"
    GATED = "add_norm_gated"


# Measured on one H200 by `benchmarks.tune_decode`: (product, rows of the weight, D) to (up to how many tokens, plan).
_MEASURED: dict[tuple[Product, int, int], tuple[tuple[int, Plan | None], ...]] = {
    # 0.6B qkv
    (Product.NORMED, 4096, 1024): (
        (1, VectorPlan(4, 2, 1)),
        (2, VectorPlan(4, 1, 1)),
        (8, ResidentPlan(16, 4, 256)),
        (16, TiledPlan(32, 16, 128, 4, 6, 1, 0)),
        (32, TiledPlan(64, 32, 128, 4, 6, 1, 512)),
        (128, TiledPlan(64, 64, 128, 4, 4, 1, 0)),
    ),
    # 0.6B o
    (Product.PLAIN, 1024, 2048): (
        (1, VectorPlan(4, 1, 4)),
        (4, VectorPlan(2, 2, 2)),
        (8, ResidentPlan(32, 8, 128)),
        (16, TiledPlan(64, 16, 128, 4, 4, 8, 512)),
        (32, TiledPlan(64, 32, 128, 4, 6, 4, 512)),
        (128, TiledPlan(64, 64, 128, 4, 4, 4, 0)),
    ),
    # 0.6B gate_up
    (Product.GATED, 6144, 1024): (
        (1, VectorPlan(4, 1, 1)),
        (2, VectorPlan(4, 4, 1)),
        (8, ResidentPlan(32, 4, 256)),
        (16, TiledPlan(32, 16, 128, 4, 6, 1, 0)),
        (32, TiledPlan(64, 32, 128, 4, 4, 1, 512)),
        (64, TiledPlan(64, 64, 128, 4, 4, 1, 0)),
        (128, TiledPlan(64, 64, 64, 4, 6, 1, 0)),
        (256, TiledPlan(64, 128, 64, 4, 4, 1, 0)),
    ),
    # 0.6B down
    (Product.PLAIN, 1024, 3072): (
        (2, VectorPlan(2, 1, 2)),
        (4, VectorPlan(2, 1, 4)),
        (8, ResidentPlan(32, 8, 128)),
        (16, TiledPlan(64, 16, 128, 4, 4, 8, 768)),
        (32, TiledPlan(32, 32, 128, 4, 6, 8, 0)),
        (128, TiledPlan(64, 64, 128, 4, 4, 4, 0)),
    ),
    # 0.6B head
    (Product.PLAIN, 151936, 1024): (
        (1, VectorPlan(2, 8, 1)),
        (8, TiledPlan(128, 16, 64, 4, 5, 1, 0)),
        (32, TiledPlan(64, 32, 128, 4, 4, 1, 0)),
    ),
    # 8B qkv
    (Product.NORMED, 6144, 4096): (
        (1, VectorPlan(8, 1, 8)),
        (4, None),
        (16, TiledPlan(64, 16, 128, 4, 8, 1, 1024)),
        (32, TiledPlan(64, 32, 128, 4, 6, 1, 512)),
        (64, TiledPlan(64, 64, 64, 4, 8, 1, 1024)),
    ),
    # 8B o
    (Product.PLAIN, 4096, 4096): (
        (1, VectorPlan(4, 1, 8)),
        (2, VectorPlan(2, 1, 4)),
        (4, VectorPlan(4, 1, 4)),
        (8, TiledPlan(64, 16, 128, 4, 4, 4, 0)),
        (16, TiledPlan(64, 16, 128, 4, 4, 4, 1024)),
        (32, TiledPlan(64, 32, 128, 4, 4, 4, 1024)),
    ),
    # 8B gate_up
    (Product.GATED, 24576, 4096): (
        (1, VectorPlan(4, 1, 4)),
        (4, None),
        (8, TiledPlan(128, 16, 128, 4, 3, 1, 0)),
        (16, TiledPlan(128, 16, 64, 4, 5, 1, 0)),
        (32, TiledPlan(128, 32, 64, 4, 4, 1, 0)),
        (64, TiledPlan(128, 64, 64, 4, 4, 1, 0)),
    ),
    # 8B down
    (Product.PLAIN, 4096, 12288): (
        (2, VectorPlan(2, 1, 8)),
        (4, None),
        (8, TiledPlan(64, 16, 128, 4, 4, 4, 0)),
        (16, TiledPlan(64, 16, 128, 4, 4, 4, 1024)),
        (32, TiledPlan(64, 32, 128, 4, 6, 1, 0)),
        (64, TiledPlan(64, 64, 64, 4, 6, 4, 1024)),
    ),
    # 8B head
    (Product.PLAIN, 151936, 4096): (
        (1, VectorPlan(8, 1, 8)),
        (8, TiledPlan(64, 16, 128, 4, 4, 1, 0)),
        (32, TiledPlan(64, 32, 128, 4, 4, 1, 0)),
    ),
}


def linear(x_TD: Tensor, weight_ED: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """out_TE in `out_dtype` (x's, if None), rounded once, from sums in float32. x_TD is contiguous."""
    plan = _plan(Product.PLAIN, x_TD, weight_ED)
    if isinstance(plan, TiledPlan):
        return tiled_linear(x_TD, weight_ED, plan, out_dtype=out_dtype)
    if plan is not None:
        return streamed_linear(x_TD, weight_ED, plan, out_dtype=out_dtype)[0]
    if out_dtype in (None, x_TD.dtype):
        return F.linear(x_TD, weight_ED)
    assert out_dtype == torch.float32
    if x_TD.is_cuda:
        return torch.mm(x_TD, weight_ED.t(), out_dtype=out_dtype)
    return F.linear(x_TD.float(), weight_ED.float())


def add_norm_linear(
    hidden_TD: Tensor, residual_TD: Tensor | None, norm_weight_D: Tensor, eps: float, weight_ED: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the pending half to the residual stream; (product of the sum's RMS norm, residual_TD), as by `add_norm`."""
    plan = _plan(Product.NORMED, hidden_TD, weight_ED)
    if isinstance(plan, VectorPlan | ResidentPlan):
        return streamed_linear(hidden_TD, weight_ED, plan, norm=Norm(residual_TD, norm_weight_D, eps))
    normed_TD, sum_TD = add_norm(hidden_TD, residual_TD, norm_weight_D, eps)
    if plan is None:
        return F.linear(normed_TD, weight_ED), sum_TD
    return tiled_linear(normed_TD, weight_ED, plan), sum_TD


def add_norm_gated(
    hidden_TD: Tensor, residual_TD: Tensor | None, norm_weight_D: Tensor, eps: float, gate_up_weight_2FD: Tensor
) -> tuple[Tensor, Tensor]:
    """Like `add_norm_linear`; of the product silu(gate) * up, out_TF, is returned in its place."""
    plan = _plan(Product.GATED, hidden_TD, gate_up_weight_2FD)
    if isinstance(plan, VectorPlan | ResidentPlan):
        norm = Norm(residual_TD, norm_weight_D, eps)
        return streamed_linear(hidden_TD, gate_up_weight_2FD, plan, norm=norm, gated=True)
    normed_TD, sum_TD = add_norm(hidden_TD, residual_TD, norm_weight_D, eps)
    if plan is None:
        return silu_mul(F.linear(normed_TD, gate_up_weight_2FD)), sum_TD
    return tiled_linear(normed_TD, gate_up_weight_2FD, plan, gated=True), sum_TD


def add_norm_project(
    hidden_TD: Tensor,
    residual_TD: Tensor | None,
    norm_weight_D: Tensor,
    eps: float,
    qkv_weight_ED: Tensor,
    qk_norm_JH: Tensor,
    rope_C2H: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    kv_P2BKH: Tensor,
) -> tuple[Tensor, Tensor]:
    """`add_norm`, the query-key-value product and `norm_rotate_write`, both norms with `eps`: (q_TNH, residual_TD)."""
    num_kv_heads, head_dim = kv_P2BKH.shape[3:]
    num_heads = len(qk_norm_JH) - num_kv_heads
    where = rope_C2H, positions_T, slot_mapping_T, kv_P2BKH, num_heads
    qkv_TE, sum_TD = add_norm_linear(hidden_TD, residual_TD, norm_weight_D, eps, qkv_weight_ED)
    return norm_rotate_write(qkv_TE.view(len(qkv_TE), -1, head_dim), qk_norm_JH, eps, *where), sum_TD


def _plan(product: Product, x_TD: Tensor, weight_ED: Tensor) -> Plan | None:
    # Elsewhere than in tests a weight on a CPU may be stored by columns.
    if not weight_ED.is_contiguous():
        return None
    return choose_plan(product, len(x_TD), *weight_ED.shape, weight_ED.dtype)


@functools.cache
def choose_plan(product: Product, num_tokens: int, num_rows: int, num_in: int, dtype: torch.dtype) -> Plan | None:
    """How to multiply `num_tokens` by a weight [num_rows, num_in]; None: by the library, with separate kernels around.

    A `TiledPlan` has its norm computed by a kernel of its own, as the library has.
    """
    if num_tokens == 0:
        return None
    measured = _MEASURED.get((product, num_rows, num_in))
    if measured is not None and dtype == torch.bfloat16:
        return next((plan for up_to, plan in measured if num_tokens <= up_to), None)
    if num_tokens <= 2 and (dtype == torch.float32 or (dtype == torch.bfloat16 and num_in % 2 == 0)):
        return _vector_plan(product, num_in, dtype)
    if num_tokens <= 16 and dtype == torch.bfloat16 and num_in <= 4096:
        warps = 4 if num_in <= 2048 else 8
        return ResidentPlan(rows=16 if num_in <= 1024 else 8, warps=warps, depth=256 if num_in > 1024 else 128)
    if num_tokens <= 64 and dtype == torch.bfloat16:
        return TiledPlan(64, max(16, triton.next_power_of_2(num_tokens)), 128, warps=4, stages=4)
    return None


def _vector_plan(product: Product, num_in: int, dtype: torch.dtype) -> VectorPlan | None:
    """About 64 registers of weights a lane; None, if a row alone is far more."""
    words = num_in * dtype.itemsize // 4
    depth_warps = 1 if words <= 1536 else 4 if words <= 6144 else 8
    registers_a_row = triton.cdiv(words, 32 * depth_warps)
    fewest = 2 if product is Product.GATED else 1
    if registers_a_row * fewest > 128:
        return None
    rows = max((rows for rows in (1, 2, 4, 8) if rows * registers_a_row <= 64), default=1)
    return VectorPlan(max(rows, fewest), row_warps=4 if depth_warps == 1 else 1, depth_warps=depth_warps)
