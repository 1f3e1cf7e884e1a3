"""Runs prompt chunks: forward pass, prefix publication, prompt log-probabilities, first token. Common to both roles."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from common.engine.batches import prefill_batch
from common.engine.chunks import Chunk
from common.engine.kv_cache import KvCache
from common.engine.logprobs import prompt_logprobs
from common.engine.prefix import PrefixCache
from common.engine.sampler import NonFiniteLogits, Sampler
from common.engine.sampling_state import SamplingState
from common.errors import Internal
from common.model.qwen3 import Qwen3ForCausalLM
from common.params import TokenLogprob
from common.sequence import Sequence


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
        self._device = device
        self._sampler = Sampler()
        self._state = SamplingState(max_num_seqs, model.config.vocab_size, device)
        self._free_slots = list(range(max_num_seqs))
        self._prompt_logprobs: dict[Sequence, list[TokenLogprob]] = {}

    def run(
        self, chunks: Seq[Chunk], after_layer: Callable[[int], None] | None = None
    ) -> dict[Sequence, FirstToken | Internal]:
        """One forward pass over `chunks`; advances `num_computed` and publishes whole blocks.

        `after_layer(layer)` is called once that layer's KV of all chunks is final. Returns the finished sequences; an
        error where a sequence's logits cannot be used.
        """
        batch = prefill_batch(chunks, block_size=self._cache.block_size, device=self._device)
        logits_RV = self._model.forward(batch, self._cache, after_layer)
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

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that will not be finished."""
        self._prompt_logprobs.pop(sequence, None)

    def _first_tokens(
        self, finished: list[tuple[Sequence, int]], logits_RV: torch.Tensor
    ) -> dict[Sequence, FirstToken | Internal]:
        sequences = [sequence for sequence, _ in finished]
        slots = [self._free_slots.pop() for _ in sequences]
        for slot, sequence in zip(slots, sequences, strict=True):
            add_to_state(self._state, slot, sequence)
        rows = torch.tensor([row for _, row in finished], device=self._device)
        positions_S = torch.tensor([sequence.num_tokens for sequence in sequences], device=self._device)
        faulty: tuple[int, ...] = ()
        try:
            sampled = self._sampler.sample(logits_RV[rows], self._state, slots, positions_S)
        except NonFiniteLogits as error:
            sampled, faulty = error.sampled, error.rows
        for slot in slots:
            self._state.remove(slot)
            self._free_slots.append(slot)
        first_tokens: dict[Sequence, FirstToken | Internal] = {
            sequence: FirstToken(token_id, logprob, tuple(self._prompt_logprobs.pop(sequence, ())))
            for sequence, token_id, logprob in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True)
        }
        for row in faulty:
            reason = "NON_FINITE_LOGITS"
            first_tokens[sequences[row]] = Internal("the model's logits hold NaN or infinity", reason=reason)
        return first_tokens

    def _collect_prompt_logprobs(self, sequence: Sequence, start: int, logits_TV: torch.Tensor) -> None:
        """Position p's logits speak about prompt token p + 1."""
        following = sequence.token_ids[start + 1 : min(start + 1 + len(logits_TV), sequence.request.num_prompt_tokens)]
        collected = self._prompt_logprobs.setdefault(sequence, [])
        if following:
            next_ids_T = torch.tensor(following, device=self._device)
            num = sequence.request.num_prompt_logprobs
            assert num is not None
            collected += prompt_logprobs(logits_TV[: len(following)], next_ids_T, num)


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
