"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the split-halves form that Qwen3 uses.

Shapes: T tokens, C context positions, J query and key heads together, H head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model.batch import ForwardBatch


class RopeRows(NamedTuple):
    """Cosines, and sines whose first half is negated, of a batch's positions; gathered once for all layers."""

    cos_T1H: Tensor
    signed_sin_T1H: Tensor


def rope_table(context_length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """table_C2H: what `RopeRows` holds, for every position. Angles are computed in float32, as Transformers does."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions_C = torch.arange(context_length, dtype=torch.float32, device=device)
    angles = torch.outer(positions_C, 1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)


def rope_rows(batch: ForwardBatch, table_C2H: Tensor) -> RopeRows:
    cos_TH, sin_TH = table_C2H.index_select(0, batch.positions_T).unbind(1)
    return RopeRows(cos_TH.unsqueeze(1), sin_TH.unsqueeze(1))


def norm_and_rotate_(qk_TJH: Tensor, weight_JH: Tensor, eps: float, rope: RopeRows) -> None:
    """RMS-normalises every query and key head, scales it by its weight and turns it, in place."""
    half = qk_TJH.shape[-1] // 2
    normed_TJH = F.rms_norm(qk_TJH, qk_TJH.shape[-1:], eps=eps).mul_(weight_JH)
    swapped_TJH = normed_TJH.roll(half, -1)
    torch.addcmul(normed_TJH.mul_(rope.cos_T1H), swapped_TJH, rope.signed_sin_T1H, out=qk_TJH)
