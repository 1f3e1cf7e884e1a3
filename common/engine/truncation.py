"""Top-k, top-p and min-p: which of a row's tokens may win its draw.

All three are decided by exact arithmetic, so that a row gives the same tokens in any batch and by any algorithm.
Probabilities are whole multiples of 2**-34 of the most probable token's, held in fp64, whose sums are exact in any
order.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.engine.ranking import rank_keys
from common.engine.sampling_state import DrawnRows

WEIGHT_OF_BEST = 2.0**34
# Sums of this many weights stay below 2**53.
MAX_VOCAB_SIZE = 2**19


def truncate(scores_RV: Tensor, z_RV: Tensor, rows: DrawnRows) -> Tensor:
    """Scores in which the largest of a row belongs to a token that all of its truncations keep.

    That token is the one of the largest score among all kept tokens. `z_RV` are the logits over the temperature, less
    the largest, so that the most probable token has 0.

    top-k keeps the k most probable tokens. top-p keeps the most probable tokens, of these, up to and with the one
    that brings their share to p. min-p keeps tokens at least min_p times as probable as the most probable one.
    Between equally probable tokens the lower id goes first.
    """
    assert z_RV.shape[1] <= MAX_VOCAB_SIZE
    if rows.log_min_p_R1 is not None:
        scores_RV = scores_RV.masked_fill(z_RV < rows.log_min_p_R1, -math.inf)
    if rows.top_k_R1 is None and rows.top_p_R1 is None:
        return scores_RV
    keys_RV = rank_keys(z_RV)
    beyond_top_k_RV = None
    if rows.top_k_R1 is not None:
        beyond_top_k_RV = _beyond_top_k(keys_RV, rows.top_k_R1, rows.max_top_k)
        scores_RV = scores_RV.masked_fill(beyond_top_k_RV, -math.inf)
    if rows.top_p_R1 is not None:
        weights_RV = z_RV.exp().mul_(WEIGHT_OF_BEST).round_().double()
        if beyond_top_k_RV is not None:
            weights_RV.masked_fill_(beyond_top_k_RV, 0)
        scores_RV = _reject_beyond_top_p(scores_RV, keys_RV, weights_RV, rows.top_p_R1)
    return scores_RV


def _beyond_top_k(keys_RV: Tensor, top_k_R1: Tensor, max_top_k: int) -> Tensor:
    best = keys_RV.topk(max_top_k, largest=False).values
    kth_R1 = best.gather(1, (top_k_R1 - 1).clamp_(min=0))
    return (keys_RV > kth_R1) & (top_k_R1 > 0)


def _reject_beyond_top_p(scores_RV: Tensor, keys_RV: Tensor, weights_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Rejects winners until each row's lies within its top-p.

    A token is kept if and only if the more probable ones do not reach the share without it, which takes one pass to
    test for one token; finding the whole set would take a sort. A rejected winner takes all less probable tokens with
    it, so that a round leaves a random part of the rest and rounds are few: about ln V in the worst case, where one
    token is kept of a flat distribution, and one or two as a rule. Every round waits for the device.
    """
    share_R1 = torch.where(top_p_R1 < 1, top_p_R1 * weights_RV.sum(dim=-1, keepdim=True), math.inf)
    # Weights are whole numbers, so this changes nothing but the promise that the most probable token is never rejected:
    # the loop ends for rows of NaN and infinity too.
    share_R1.clamp_(min=1)
    while True:
        winner_R1 = scores_RV.max(dim=-1, keepdim=True).indices
        above_RV = keys_RV < keys_RV.gather(1, winner_R1)
        rejected_R1 = torch.where(above_RV, weights_RV, 0).sum(dim=-1, keepdim=True) >= share_R1
        if not rejected_R1.any():
            return scores_RV
        scores_RV = scores_RV.masked_fill(rejected_R1 & ~above_RV, -math.inf)
