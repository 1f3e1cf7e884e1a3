"""What is done to the logits before the temperature: penalties, bias, and stop tokens that may not come yet.

Shapes: S rows of a batch, R the rows among them that use a feature, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.engine.sampling_state import FP32, BatchPlan, Rows, SamplingState


def edit_logits(logits_SV: Tensor, state: SamplingState, plan: BatchPlan, positions_S: Tensor) -> Tensor:
    """Edited fp32 logits for the draw; `logits_SV` itself when no row asks for an edit, and never changed in place.

    In this order: repetition, presence and frequency penalties; bias; -inf for the stop tokens of rows that have not
    put out `min_tokens` yet. `positions_S` are the absolute positions of the tokens to be drawn.
    """
    if not plan.edits_logits:
        return logits_SV
    logits_SV = logits_SV.clone()
    if plan.penalised is not None:
        rows = plan.penalised.index_R
        logits_SV[rows] = _penalise(logits_SV[rows], state, plan.penalised)
    if plan.biased is not None:
        logits_SV[plan.biased.index_R] += state.bias_NV[plan.biased.slots_R]
    if plan.held_open is not None:
        rows, slots = plan.held_open
        too_early_R1 = (positions_S[rows] < state.first_stop_position_N[slots])[:, None]
        logits_SV[rows] = logits_SV[rows].masked_fill(state.stops_NV[slots] & too_early_R1, -math.inf)
    return logits_SV


def _penalise(logits_RV: Tensor, state: SamplingState, rows: Rows) -> Tensor:
    counts_RV = state.output_counts_NV[rows.slots_R]
    put_out_RV = counts_RV > 0
    repetition_R1 = state.repetition_penalty_N[rows.slots_R, None]
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    # An extreme penalty must not make an infinity of a finite logit: two of them have no order.
    repeated_RV.clamp_(FP32.min, FP32.max)
    logits_RV = torch.where(state.in_prompt_NV[rows.slots_R] | put_out_RV, repeated_RV, logits_RV)
    logits_RV -= state.presence_penalty_N[rows.slots_R, None] * put_out_RV
    return logits_RV.sub_(state.frequency_penalty_N[rows.slots_R, None] * counts_RV)
