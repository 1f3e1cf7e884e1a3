"""Drives a model through its paged cache the way a scheduler would, and keeps every logit it gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from common.engine.kv_cache import KvCache
from common.model.batch import ForwardBatch
from common.model.qwen3 import Qwen3ForCausalLM


@dataclass(eq=False)
class Running:
    """A sequence: `num_computed` positions are in the cache, `logits[p]` is what position p predicts."""

    token_ids: list[int]
    num_prompt_tokens: int
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class PagedRunner:
    """Blocks are handed out in shuffled order; nothing is ever freed."""

    def __init__(self, model: Qwen3ForCausalLM, *, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        self.cache = KvCache(model.config, num_blocks, block_size, model.dtype, model.device)
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    def admit(self, prompt: Sequence[int], *, prefix_of: Running | None = None) -> Running:
        """A new sequence; with `prefix_of`, on the computed whole blocks that begin alike."""
        sequence = Running(list(prompt), len(prompt))
        if prefix_of is not None:
            alike = 0
            while alike < min(len(prompt) - 1, prefix_of.num_computed) and prompt[alike] == prefix_of.token_ids[alike]:
                alike += 1
            num_shared = alike // self.block_size
            sequence.block_table = prefix_of.block_table[:num_shared]
            sequence.num_computed = num_shared * self.block_size
        return sequence

    def batch(self, chunks: Sequence[tuple[Running, int]], logit_rows: Sequence[int] | None = None) -> ForwardBatch:
        """The next `length` tokens of each sequence, with blocks allocated for them; logits of all rows by default."""
        size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, length in chunks:
            start, end = sequence.num_computed, sequence.num_computed + length
            while len(sequence.block_table) * size < end:
                sequence.block_table.append(self.free.pop())
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [sequence.block_table[position // size] * size + position % size for position in range(start, end)]
        return ForwardBatch.build(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_lens=[length for _, length in chunks],
            kv_lens=[sequence.num_computed + length for sequence, length in chunks],
            block_tables=[sequence.block_table for sequence, _ in chunks],
            logit_rows=range(len(token_ids)) if logit_rows is None else logit_rows,
            device=self.model.device,
        )

    def step(self, chunks: Sequence[tuple[Running, int]]) -> None:
        """One forward pass; a sequence whose last token is computed gets its greedy next one."""
        logits_TV = self.model.forward(self.batch(chunks), self.cache)
        row = 0
        for sequence, length in chunks:
            for position in range(sequence.num_computed, sequence.num_computed + length):
                sequence.logits[position] = logits_TV[row]
                row += 1
            sequence.num_computed += length
            if sequence.num_computed == len(sequence.token_ids):
                sequence.token_ids.append(int(logits_TV[row - 1].argmax()))

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, seed: int = 0) -> list[Running]:
        """Greedy continuations with up to ten sequences at once, joining in turn, in chunks of odd sizes.

        Each sequence reuses the longest computed prefix that an earlier one has in common with it.
        """
        rng = random.Random(seed)
        sequences: list[Running] = []
        active: list[Running] = []
        while active or len(sequences) < len(prompts):
            while len(active) < 10 and len(sequences) < len(prompts) and rng.random() < 0.7:
                prompt = prompts[len(sequences)]
                sequence = max(
                    [self.admit(prompt), *(self.admit(prompt, prefix_of=earlier) for earlier in sequences)],
                    key=lambda admitted: admitted.num_computed,
                )
                active.append(sequence)
                sequences.append(sequence)
            if active:
                chunk_sizes = [rng.choice((3, 7, 13, 61)) for _ in active]
                self.step(
                    [
                        (sequence, min(size, len(sequence.token_ids) - sequence.num_computed))
                        for sequence, size in zip(active, chunk_sizes, strict=True)
                    ]
                )
            active = [sequence for sequence in active if len(sequence.output_ids) < num_tokens]
        return sequences
