"""Draws the next token of each row of a batch.

A row's token is the one of the largest score, the lowest id among equals. Without temperature the score is the logit;
with it, the logit over the temperature plus Gumbel noise, which draws from the softmax of the former (Maddison,
Tarlow, Minka, "A* sampling", NIPS 2014). The noise is a function of seed, position and token id alone
(`common.engine.philox`), so that a row's token depends on nothing but its own logits and parameters.

Shapes: S rows of the batch, R the rows among them that are drawn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.engine.logprobs import pack_logprobs, unpack_logprobs
from common.engine.penalties import edit_logits
from common.engine.philox import gumbel_noise
from common.engine.sampling_state import BatchPlan, DrawnRows, SamplingState
from common.engine.truncation import truncate
from common.errors import Internal
from common.params import TokenLogprob


class SampledBatch(NamedTuple):
    """One token for each row, and its log-probability where the row asks for it."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class NonFiniteLogits(Internal):
    """Some rows' logits hold NaN or infinity. `rows` names them; the other rows of `sampled` are good."""

    default_reason = "NON_FINITE_LOGITS"

    def __init__(self, rows: tuple[int, ...], sampled: SampledBatch) -> None:
        super().__init__(f"no token can be drawn for rows {list(rows)}: their logits hold NaN or infinity")
        self.rows = rows
        self.sampled = sampled


class PendingBatch(NamedTuple):
    """Tokens that the device has been asked for. `token_ids_S` may be used there at once."""

    token_ids_S: Tensor
    # fp64: token ids [S], their scores [S], then the packed log-probabilities. One tensor, so that reading is one
    # transfer.
    packed: Tensor
    plan: BatchPlan

    def read(self) -> SampledBatch:
        """Waits for the device and brings the tokens to the host. Raises NonFiniteLogits."""
        plan, values = self.plan, self.packed.tolist()
        num_rows = len(plan.slots)
        token_ids, scores = [int(i) for i in values[:num_rows]], values[num_rows : 2 * num_rows]
        logprobs: list[TokenLogprob | None] = [None] * num_rows
        scored = [(row, num) for row, num in enumerate(plan.num_logprobs) if num is not None]
        if scored:
            width = (len(values) - 2 * num_rows) // len(scored)
            for start, (row, num) in zip(range(2 * num_rows, len(values), width), scored, strict=True):
                logprobs[row] = unpack_logprobs(values[start : start + width], num)
        sampled = SampledBatch(token_ids, logprobs)
        faulty = tuple(row for row, score in enumerate(scores) if not math.isfinite(score))
        if faulty:
            raise NonFiniteLogits(faulty, sampled)
        return sampled


class Sampler:
    """Draws tokens and counts them in the state."""

    def sample(
        self, logits_SV: Tensor, state: SamplingState, slots: Sequence[int], positions_S: Tensor | Sequence[int]
    ) -> SampledBatch:
        """`draw` and `read`. Raises NonFiniteLogits; the good rows' tokens are counted all the same."""
        return self.draw(logits_SV, state, slots, positions_S).read()

    def draw(
        self, logits_SV: Tensor, state: SamplingState, slots: Sequence[int], positions_S: Tensor | Sequence[int]
    ) -> PendingBatch:
        """Draws one token for each row of `logits_SV` (fp32, left as it is); row i belongs to `slots[i]`.

        `positions_S` are the absolute positions of the tokens to be drawn: a prompt of n tokens is followed by
        position n. Nothing here waits for the device, except where a row uses top_p; without, and after a first run, a
        CUDA graph can capture it.
        """
        assert logits_SV.dtype == torch.float32
        assert logits_SV.shape == (len(slots), state.vocab_size)
        plan = state.plan(slots)
        scores_SV = logits_SV
        if plan.edits_logits or plan.drawn is not None:
            positions_S = torch.as_tensor(positions_S, dtype=torch.int64, device=state.device)
            scores_SV = edit_logits(logits_SV, state, plan, positions_S)
            if plan.drawn is not None:
                scores_SV = _with_noise(scores_SV, plan.drawn, positions_S)
        best_S, token_ids_S = scores_SV.max(dim=-1)
        state.count(plan, token_ids_S)
        packed = [token_ids_S.double(), best_S.double()]
        if plan.scored is not None:
            num_top = max(num for num in plan.num_logprobs if num is not None)
            rows = plan.scored.index_R
            packed.append(pack_logprobs(logits_SV[rows], token_ids_S[rows], num_top).flatten())
        return PendingBatch(token_ids_S, torch.cat(packed), plan)


def _with_noise(logits_SV: Tensor, rows: DrawnRows, positions_S: Tensor) -> Tensor:
    """Scores: those of drawn rows with temperature, noise and truncation, the others' as they are."""
    every_row = len(rows.index_R) == len(logits_SV)
    logits_RV, positions_R = (
        (logits_SV, positions_S) if every_row else (logits_SV[rows.index_R], positions_S[rows.index_R])
    )
    # Less the largest first: an extreme temperature then gives 0 and -inf, never the difference of two infinities.
    z_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(rows.temperature_R1)
    noise_RV = gumbel_noise(rows.seed_words_R2, positions_R, logits_SV.shape[1])
    scores_RV = truncate(z_RV + noise_RV, z_RV, rows)
    return scores_RV if every_row else logits_SV.index_copy(0, rows.index_R, scores_RV)
