"""What the device knows about each running sequence's sampling, by slot, and which rows of a batch need what.

Parameters lie on the device from `add` to `remove`, so that a step copies nothing there; the tables of vocabulary
width exist only once a sequence needs them.

Shapes: N slots, V vocabulary, S rows of a batch, R the rows among them that use one feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from common.model.transfer import to_device
from common.params import SamplingParams

FP32 = torch.finfo(torch.float32)


class Rows(NamedTuple):
    """Some rows of a batch: where they are in it, and their slots. int64, on the device."""

    index_R: Tensor
    slots_R: Tensor


class DrawnRows(NamedTuple):
    """The rows whose token is drawn with noise. A truncation that none of them uses is None."""

    index_R: Tensor
    seed_words_R2: Tensor
    temperature_R1: Tensor
    top_k_R1: Tensor | None
    max_top_k: int
    top_p_R1: Tensor | None
    log_min_p_R1: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Which rows of a batch need what; None where no row does."""

    slots: tuple[int, ...]
    penalised: Rows | None
    biased: Rows | None
    # Their stop tokens may not be drawn before some position.
    held_open: Rows | None
    drawn: DrawnRows | None
    scored: Rows | None
    # Per row, the alternatives to report with the token's log-probability; None for no log-probability.
    num_logprobs: tuple[int | None, ...]

    @property
    def edits_logits(self) -> bool:
        return self.penalised is not None or self.biased is not None or self.held_open is not None


class _Entry(NamedTuple):
    params: SamplingParams
    min_tokens: int
    num_logprobs: int | None


def table_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """All tables of vocabulary width of one state: two of bool, one of int32, one of float32."""
    return max_num_seqs * vocab_size * (1 + 1 + 4 + 4)


class SamplingState:
    """Sampling parameters and token history of at most `max_num_seqs` sequences."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._shape_NV = (max_num_seqs, vocab_size)
        self._entries: dict[int, _Entry] = {}
        self._plan: BatchPlan | None = None
        self.temperature_N = self._column(torch.float32)
        self.top_k_N = self._column(torch.int64)
        self.top_p_N = self._column(torch.float64)
        self.log_min_p_N = self._column(torch.float32)
        self.seed_words_N2 = torch.zeros(max_num_seqs, 2, dtype=torch.int64, device=self.device)
        self.repetition_penalty_N = self._column(torch.float32)
        self.presence_penalty_N = self._column(torch.float32)
        self.frequency_penalty_N = self._column(torch.float32)
        self.first_stop_position_N = self._column(torch.int64)

    @cached_property
    def in_prompt_NV(self) -> Tensor:
        return torch.zeros(self._shape_NV, dtype=torch.bool, device=self.device)

    @cached_property
    def output_counts_NV(self) -> Tensor:
        return torch.zeros(self._shape_NV, dtype=torch.int32, device=self.device)

    @cached_property
    def bias_NV(self) -> Tensor:
        return torch.zeros(self._shape_NV, dtype=torch.float32, device=self.device)

    @cached_property
    def stops_NV(self) -> Tensor:
        return torch.zeros(self._shape_NV, dtype=torch.bool, device=self.device)

    def add(
        self,
        slot: int,
        params: SamplingParams,
        stopping_token_ids: Sequence[int],
        min_tokens: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        num_logprobs: int | None,
    ) -> None:
        """Puts a sequence into a free slot.

        None of `stopping_token_ids` is drawn while fewer than `min_tokens` tokens have been put out. `output_ids` is
        what has been put out before, here or elsewhere. `num_logprobs` alternatives are reported with each token;
        None: no log-probabilities at all.
        """
        assert slot not in self._entries, f"slot {slot} is taken"
        self._entries[slot] = _Entry(params, min_tokens, num_logprobs)
        self._plan = None
        # A temperature or penalty outside fp32's range acts as the nearest number within it.
        self.temperature_N[slot] = min(max(params.temperature, FP32.tiny), FP32.max)
        self.top_k_N[slot] = min(params.top_k, self.vocab_size)
        self.top_p_N[slot] = params.top_p
        self.log_min_p_N[slot] = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self.seed_words_N2[slot, 0] = params.seed & 0xFFFFFFFF
        self.seed_words_N2[slot, 1] = params.seed >> 32
        if params.has_penalties:
            self.repetition_penalty_N[slot] = min(max(params.repetition_penalty, FP32.tiny), FP32.max)
            self.presence_penalty_N[slot] = params.presence_penalty
            self.frequency_penalty_N[slot] = params.frequency_penalty
            self.in_prompt_NV[slot].zero_().index_fill_(0, self._ids(prompt_ids), True)
            counted = torch.ones(len(output_ids), dtype=torch.int32, device=self.device)
            self.output_counts_NV[slot].zero_().index_add_(0, self._ids(output_ids), counted)
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            ids = self._ids(list(params.logit_bias))
            self.bias_NV[slot].zero_().index_copy_(0, ids, to_device(values, self.device))
        if min_tokens:
            self.first_stop_position_N[slot] = len(prompt_ids) + min_tokens
            self.stops_NV[slot].zero_().index_fill_(0, self._ids(stopping_token_ids), True)

    def remove(self, slot: int) -> None:
        """Frees a slot."""
        del self._entries[slot]
        self._plan = None

    def plan(self, slots: Sequence[int]) -> BatchPlan:
        """What the rows of a batch, one slot each, need. Kept until the batch changes: a steady step copies nothing."""
        if self._plan is None or self._plan.slots != tuple(slots):
            self._plan = self._make_plan(tuple(slots))
        return self._plan

    def count(self, plan: BatchPlan, token_ids_S: Tensor) -> None:
        """Adds each row's new token to the output that its penalties look at."""
        if plan.penalised is not None:
            # A slot has one row, so that no two of these additions meet.
            self.output_counts_NV[plan.penalised.slots_R, token_ids_S[plan.penalised.index_R]] += 1

    def _make_plan(self, slots: tuple[int, ...]) -> BatchPlan:
        assert len(set(slots)) == len(slots), f"two rows of one slot: {slots}"
        entries = [self._entries[slot] for slot in slots]

        def rows_where(uses: Callable[[_Entry], object]) -> Rows | None:
            index = [row for row, entry in enumerate(entries) if uses(entry)]
            return Rows(self._ids(index), self._ids([slots[row] for row in index])) if index else None

        drawn = rows_where(lambda entry: not entry.params.greedy)
        return BatchPlan(
            slots=slots,
            penalised=rows_where(lambda entry: entry.params.has_penalties),
            biased=rows_where(lambda entry: entry.params.logit_bias),
            held_open=rows_where(lambda entry: entry.min_tokens),
            drawn=drawn and self._drawn_rows(drawn, [entry.params for entry in entries if not entry.params.greedy]),
            scored=rows_where(lambda entry: entry.num_logprobs is not None),
            num_logprobs=tuple(entry.num_logprobs for entry in entries),
        )

    def _drawn_rows(self, rows: Rows, params: list[SamplingParams]) -> DrawnRows:
        def column(values_N: Tensor) -> Tensor:
            return values_N[rows.slots_R, None]

        max_top_k = min(max(p.top_k for p in params), self.vocab_size)
        return DrawnRows(
            index_R=rows.index_R,
            seed_words_R2=self.seed_words_N2[rows.slots_R],
            temperature_R1=column(self.temperature_N),
            top_k_R1=column(self.top_k_N) if max_top_k else None,
            max_top_k=max_top_k,
            top_p_R1=column(self.top_p_N) if any(p.top_p < 1 for p in params) else None,
            log_min_p_R1=column(self.log_min_p_N) if any(p.min_p > 0 for p in params) else None,
        )

    def _column(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._shape_NV[0], dtype=dtype, device=self.device)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)
