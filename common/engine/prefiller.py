"""Runs prompt chunks: forward pass, prefix publication, prompt log-probabilities, first token. Common to both roles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from common.engine.batches import PrefillNumbers, prefill_numbers
from common.engine.chunks import Chunk
from common.engine.graphs import Progress
from common.engine.kv_cache import KvCache
from common.engine.logprobs import prompt_logprobs
from common.engine.prefill_graphs import PrefillGraphs
from common.engine.prefix import PrefixCache
from common.engine.sampler import NonFiniteLogits, SampledBatch, Sampler
from common.engine.sampling_state import SamplingState
from common.errors import Internal
from common.model.qwen3 import Qwen3ForCausalLM
from common.model.transfer import to_device
from common.params import SamplingParams, StoppingParams, TokenLogprob, is_special
from common.sequence import Request, Sequence


class FirstToken(NamedTuple):
    """What a finished prompt yields."""

    token_id: int
    logprob: TokenLogprob | None
    # One for each prompt token but the first, when asked for.
    prompt_logprobs: tuple[TokenLogprob, ...]


class Prefiller:
    """Computes chunks and draws the first token of each sequence that a chunk finishes."""

    def __init__(
        self, model: Qwen3ForCausalLM, cache: KvCache, prefix: PrefixCache, *, max_num_seqs: int, device: torch.device
    ) -> None:
        self._model = model
        self._cache = cache
        self._prefix = prefix
        self.device = device
        self._sampler = Sampler()
        self._state = SamplingState(max_num_seqs, model.config.vocab_size, device)
        self._free_slots = list(range(max_num_seqs))
        self._prompt_logprobs: dict[Sequence, list[TokenLogprob]] = {}
        self._graphs: PrefillGraphs | None = None

    def run(
        self, chunks: Seq[Chunk], after_layer: Callable[[int], None] | None = None
    ) -> dict[Sequence, FirstToken | Internal]:
        """One forward pass over `chunks`; advances `num_computed` and publishes whole blocks.

        `after_layer(layer)` is called once that layer's KV of all chunks is final. Returns the finished sequences; an
        error where a sequence's logits cannot be used.
        """
        numbers = prefill_numbers(chunks, block_size=self._cache.block_size)
        logits_RV = None if self._graphs is None else self._graphs.run(numbers, after_layer)
        if logits_RV is None:
            logits_RV = self._model.forward(numbers.to(self.device), self._cache, after_layer)
        finished: list[tuple[Sequence, int]] = []
        row = 0
        for sequence, start, end in chunks:
            sequence.num_computed = end
            self._prefix.publish(sequence, start)
            if sequence.request.num_prompt_logprobs is not None:
                self._collect_prompt_logprobs(sequence, start, logits_RV[row : row + end - start])
                row += end - start
            elif sequence.prefilled:
                row += 1
            if sequence.prefilled:
                finished.append((sequence, row - 1))
        return self._first_tokens(finished, logits_RV) if finished else {}

    def warm_up(self, max_tokens: int) -> None:
        """Runs prompts that leave no trace, so that what is compiled or allocated lazily exists."""
        scratch, size = self._cache.scratch_block, self._cache.block_size
        for length in sorted({min(length, max_tokens) for length in (1, 16, 64, 256, max_tokens)}):
            # A step may have more tokens than a sequence.
            positions = np.arange(length) % self._model.config.context_length
            numbers = PrefillNumbers(
                token_ids=np.zeros(length, dtype=np.int64),
                positions=positions,
                slot_mapping=scratch * size + positions % size,
                query_lens=[length],
                kv_lens=[length],
                block_tables=[[scratch] * -(-length // size)],
                logit_rows=[length - 1],
            )
            logits_RV = self._model.forward(numbers.to(self.device), self._cache)
            with contextlib.suppress(NonFiniteLogits):
                self._draw([_any_sequence()], logits_RV)

    def capture(self, max_tokens: int, context_length: int, progress: Progress) -> None:
        """Captures CUDA graphs for steps of few tokens."""
        self._graphs = PrefillGraphs(
            self._model,
            self._cache,
            max_tokens=max_tokens,
            table_width=-(-context_length // self._cache.block_size),
        )
        self._graphs.capture(progress)

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that will not be finished."""
        self._prompt_logprobs.pop(sequence, None)

    def _first_tokens(
        self, finished: list[tuple[Sequence, int]], logits_RV: torch.Tensor
    ) -> dict[Sequence, FirstToken | Internal]:
        sequences = [sequence for sequence, _ in finished]
        rows = [row for _, row in finished]
        if rows != list(range(len(logits_RV))):
            logits_RV = logits_RV.index_select(0, to_device(torch.tensor(rows), self.device))
        faulty: tuple[int, ...] = ()
        try:
            sampled = self._draw(sequences, logits_RV)
        except NonFiniteLogits as error:
            sampled, faulty = error.sampled, error.rows
        first_tokens: dict[Sequence, FirstToken | Internal] = {
            sequence: FirstToken(token_id, logprob, tuple(self._prompt_logprobs.pop(sequence, ())))
            for sequence, token_id, logprob in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True)
        }
        for row in faulty:
            reason = "NON_FINITE_LOGITS"
            first_tokens[sequences[row]] = Internal("the model's logits hold NaN or infinity", reason=reason)
        return first_tokens

    def _draw(self, sequences: list[Sequence], logits_SV: torch.Tensor) -> SampledBatch:
        if self._model.operations.replayable and not any(
            is_special(sequence.request.sampling, sequence.request.stopping.min_tokens, sequence.request.num_logprobs)
            for sequence in sequences
        ):
            from common.engine.fused_draw import fused_draw

            return fused_draw(sequences, logits_SV)
        slots = [self._free_slots.pop() for _ in sequences]
        for slot, sequence in zip(slots, sequences, strict=True):
            add_to_state(self._state, slot, sequence)
        try:
            return self._sampler.sample(logits_SV, self._state, slots, [sequence.num_tokens for sequence in sequences])
        finally:
            for slot in slots:
                self._state.remove(slot)
                self._free_slots.append(slot)

    def _collect_prompt_logprobs(self, sequence: Sequence, start: int, logits_TV: torch.Tensor) -> None:
        """Position p's logits speak about prompt token p + 1."""
        following = sequence.token_ids[start + 1 : min(start + 1 + len(logits_TV), sequence.request.num_prompt_tokens)]
        collected = self._prompt_logprobs.setdefault(sequence, [])
        if following:
            next_ids_T = to_device(torch.tensor(following), self.device)
            num = sequence.request.num_prompt_logprobs
            assert num is not None
            collected += prompt_logprobs(logits_TV[: len(following)], next_ids_T, num)


def _any_sequence() -> Sequence:
    request = Request(
        request_id="",
        token_ids=(0,),
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        stopping=StoppingParams(),
    )
    return Sequence(request, frozenset())


def add_to_state(state: SamplingState, slot: int, sequence: Sequence) -> None:
    """Puts a sequence's sampling parameters and history into a slot."""
    request = sequence.request
    state.add(
        slot,
        request.sampling,
        sorted(sequence.stop_token_ids),
        request.stopping.min_tokens,
        sequence.prompt_ids,
        sequence.output_ids,
        request.num_logprobs,
    )
