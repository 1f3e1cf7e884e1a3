"""Rows that ask for more than the fused draw gives: penalties, bias, minimum lengths, log-probabilities.

The fused kernel has drawn a token for every row already; these rows' tokens are drawn again from edited logits by the
same kernel. Nothing here waits for the device.

Shapes: S rows of the batch, R special rows of it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from common.engine.logprobs import pack_logprobs, unpack_logprobs
from common.engine.penalties import edit_logits
from common.engine.sampling_state import BatchPlan, SamplingState
from common.kernels.sampling import DeviceSampling, sample
from common.model.transfer import to_device
from common.params import TokenLogprob


class PackedLogprobs(NamedTuple):
    """Log-probabilities on the device, for `rows` of the batch."""

    values: Tensor
    rows: tuple[tuple[int, int], ...]

    def unpack(self, values: list[float]) -> dict[int, TokenLogprob]:
        """By row, from the tensor's numbers on the host."""
        width = len(values) // len(self.rows)
        starts = range(0, len(values), width)
        return {
            row: unpack_logprobs(values[start : start + width], num)
            for start, (row, num) in zip(starts, self.rows, strict=True)
        }


class SpecialRows:
    """What a set of special rows needs on the device; made anew when the rows change."""

    def __init__(self, state: SamplingState, rows: Seq[int], slots: Seq[int]) -> None:
        self._state = state
        self._rows = tuple(rows)
        self._plan: BatchPlan = state.plan(slots)
        self._index_R = to_device(torch.tensor(rows), state.device)

    def draw(
        self,
        logits_SV: Tensor,
        sampling: DeviceSampling,
        positions_S: Tensor,
        token_ids_S: Tensor,
        scores_S: Tensor,
    ) -> PackedLogprobs | None:
        """Replaces these rows' tokens and scores, counts them, and gives the log-probabilities that are wanted.

        `positions_S` are those of the tokens to be drawn.
        """
        plan, index_R = self._plan, self._index_R
        logits_RV, positions_R = logits_SV.index_select(0, index_R), positions_S.index_select(0, index_R)
        if plan.edits_logits:
            edited_RV = edit_logits(logits_RV, self._state, plan, positions_R)
            tokens_R = torch.empty(len(index_R), dtype=token_ids_S.dtype, device=token_ids_S.device)
            scores_R = torch.empty(len(index_R), dtype=scores_S.dtype, device=scores_S.device)
            chosen = DeviceSampling(*(column.index_select(0, index_R) for column in sampling))
            sample(edited_RV, chosen, positions_R, tokens_R, scores_R)
            token_ids_S.index_copy_(0, index_R, tokens_R)
            scores_S.index_copy_(0, index_R, scores_R)
        tokens_R = token_ids_S.index_select(0, index_R).long()
        self._state.count(plan, tokens_R)
        if plan.scored is None:
            return None
        wanted = [(row, num) for row, num in zip(self._rows, plan.num_logprobs, strict=True) if num is not None]
        scored = plan.scored.index_R
        packed = pack_logprobs(logits_RV[scored], tokens_R[scored], max(num for _, num in wanted))
        return PackedLogprobs(packed.flatten(), tuple(wanted))
