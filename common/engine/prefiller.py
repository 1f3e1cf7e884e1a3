"""Runs prompt chunks: forward pass, prefix publication, prompt log-probabilities, first token. Common to both roles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch

from common.engine.batches import PrefillNumbers, prefill_numbers
from common.engine.chunks import Chunk
from common.engine.graphs import Progress
from common.engine.kv_cache import KvCache
from common.engine.logprobs import pack_prompt_logprobs
from common.engine.prefill_graphs import PrefillGraphs
from common.engine.prefill_step import Drawn, Finished, PrefillStep
from common.engine.prefix import PrefixCache
from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.model.qwen3 import Qwen3ForCausalLM
from common.model.transfer import to_device, to_host
from common.params import SamplingParams, StoppingParams, is_special
from common.sequence import Request, Sequence


class Prefiller:
    """Computes chunks and draws the first token of each sequence that a chunk finishes.

    On a GPU that has our kernels nothing here waits for what is computed; only reading a step does.
    """

    def __init__(
        self, model: Qwen3ForCausalLM, cache: KvCache, prefix: PrefixCache, *, max_num_seqs: int, device: torch.device
    ) -> None:
        self._model = model
        self._cache = cache
        self._prefix = prefix
        self.device = device
        self._sampler = Sampler()
        self._state = SamplingState(max_num_seqs, model.config.vocab_size, device)
        # Packed, on their way to the host.
        self._prompt_logprobs: dict[Sequence, list[torch.Tensor]] = {}
        self._graphs: PrefillGraphs | None = None

    def run(self, chunks: Seq[Chunk], after_layer: Callable[[int], None] | None = None) -> PrefillStep:
        """One forward pass over `chunks`; advances `num_computed` and publishes whole blocks.

        What is computed or copied afterwards, on the same stream, finds their KV written. `after_layer(layer)` is
        called once that layer's KV of all chunks is final.
        """
        numbers = prefill_numbers(chunks, block_size=self._cache.block_size)
        logits_RV = None if self._graphs is None else self._graphs.run(numbers, after_layer)
        if logits_RV is None:
            logits_RV = self._model.forward(numbers.to(self.device), self._cache, after_layer)
        finished: dict[Sequence, int] = {}
        row = 0
        for sequence, start, end in chunks:
            sequence.num_computed = end
            self._prefix.publish(sequence, start)
            if sequence.request.num_prompt_logprobs is not None:
                self._score_prompt(sequence, start, logits_RV[row : row + end - start])
                row += end - start
            elif sequence.prefilled:
                row += 1
            if sequence.prefilled:
                finished[sequence] = row - 1
        return self._finish(finished, logits_RV)

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

    def _finish(self, finished: dict[Sequence, int], logits_RV: torch.Tensor) -> PrefillStep:
        """Draws the tokens of these sequences from these rows."""
        drawn = None
        if finished:
            rows = list(finished.values())
            if rows != list(range(len(logits_RV))):
                logits_RV = logits_RV.index_select(0, to_device(torch.tensor(rows), self.device))
            drawn = self._draw(list(finished), logits_RV)
        scored = [Finished(sequence, self._prompt_logprobs.pop(sequence, ())) for sequence in finished]
        return PrefillStep(scored, drawn, self.device)

    def _draw(self, sequences: list[Sequence], logits_SV: torch.Tensor) -> Drawn:
        if not self._model.operations.replayable:
            with self._in_state(sequences) as slots:
                positions = [sequence.num_tokens for sequence in sequences]
                return self._sampler.draw(logits_SV, self._state, slots, positions)
        from common.engine.fused_draw import fused_draw

        special = [
            row
            for row, request in enumerate(sequence.request for sequence in sequences)
            if is_special(request.sampling, request.stopping.min_tokens, request.num_logprobs)
        ]
        with self._in_state([sequences[row] for row in special]) as slots:
            return fused_draw(sequences, logits_SV, self._state, dict(zip(special, slots, strict=True)))

    @contextlib.contextmanager
    def _in_state(self, sequences: list[Sequence]) -> Iterator[list[int]]:
        """Their slots, for one draw: once it is enqueued, whatever takes the slots next is written after it."""
        slots = list(range(len(sequences)))
        for slot, sequence in enumerate(sequences):
            add_to_state(self._state, slot, sequence)
        try:
            yield slots
        finally:
            for slot in slots:
                self._state.remove(slot)

    def _score_prompt(self, sequence: Sequence, start: int, logits_TV: torch.Tensor) -> None:
        """Position p's logits speak about prompt token p + 1."""
        following = sequence.token_ids[start + 1 : min(start + 1 + len(logits_TV), sequence.request.num_prompt_tokens)]
        if following:
            next_ids_T = to_device(torch.tensor(following), self.device)
            num = sequence.request.num_prompt_logprobs
            assert num is not None
            packed = to_host(pack_prompt_logprobs(logits_TV[: len(following)], next_ids_T, num))
            self._prompt_logprobs.setdefault(sequence, []).append(packed)


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
