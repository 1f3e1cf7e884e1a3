"""Matrix products in which a row's result has the same bits whatever the batch: any number of tokens, any position.

The order of summation depends on how a product is cut into tiles. Here the cut depends on the weight alone: tiles of
one size for any number of tokens, D never split, absent tokens computed and dropped.

Shapes: T tokens, D inputs, E outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.tiled_linear import TiledPlan, tiled_linear


def invariant_linear(x_TD: Tensor, weight_ED: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x_TD @ weight_ED.T as out_TE in `out_dtype` (x's, if None), rounded once, from sums in float32.

    Both are of one dtype, x_TD is contiguous. Row i has the same bits as the product of row i alone.
    """
    # Copies only what tests compute on a CPU, where weights may be stored by columns.
    weight_ED = weight_ED.contiguous()
    num_rows, num_in = weight_ED.shape
    return tiled_linear(x_TD, weight_ED, invariant_plan(num_rows, num_in, weight_ED.dtype), out_dtype=out_dtype)


def invariant_plan(num_rows: int, num_in: int, dtype: torch.dtype) -> TiledPlan:
    """The tiles of a weight [num_rows, num_in], for any number of tokens.

    Small weights get small tiles, so that a product of one token still spreads over the device.
    """
    if dtype == torch.float32:
        return TiledPlan(rows=32, tokens=32, depth=32, warps=4, stages=3)
    if num_rows <= 2048:
        return TiledPlan(rows=64, tokens=64, depth=128, warps=4, stages=4)
    return TiledPlan(rows=128, tokens=128, depth=64, warps=8, stages=4)
