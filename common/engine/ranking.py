"""The order of a row's tokens by probability, with one rule for ties: the lower token id goes first."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_keys(x_RV: Tensor) -> Tensor:
    """int64 [R, V] keys, all different within a row: the smaller the key, the more probable the token.

    `x_RV` is fp32 and holds no positive number: log-probabilities, or logits less the row's largest. Keys are exact,
    so that selecting by them gives the same tokens whatever the algorithm; NaN ranks last.
    """
    token_ids_V = torch.arange(x_RV.shape[1], device=x_RV.device)
    # Without the sign, which also tells 0.0 from -0.0, the bits of an fp32 number order as the number does.
    return (x_RV.abs().view(torch.int32).long() << 32).add_(token_ids_V)
