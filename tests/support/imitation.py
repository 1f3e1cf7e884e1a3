"""A decode engine whose model only remembers: what it computes at a position is checked against whose position it is.

KV memory is a list of (position, token). A step reads every position that its rows may see, as attention would, and a
sequence's next token is a function of its seed and position alone, so that what it must be is known beforehand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import deque

import torch

from common.blocks import BlockPool
from common.clock import FakeClock
from common.engine.kv_cache import KvCache
from common.engine.prefill_step import FirstToken
from common.engine.prefix import PrefixCache
from common.metrics import DecodeMetrics
from common.model.config import ModelConfig
from decode_service import device_runner
from decode_service.engine import DecodeEngine
from decode_service.events import Token
from decode_service.scheduler import DecodeScheduler
from tests.support.device import TEST_DEVICE
from tests.support.models import dummy_model_folder

NUM_TOKENS = 30_011


def token_at(seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed},{position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % NUM_TOKENS


class Memory:
    """What lies in each slot of the cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        # The scratch block is the last.
        self.first_scratch_slot = num_blocks * block_size
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks + 1) * block_size

    def write(self, slot: int, position: int, token: int) -> None:
        self._slots[slot] = (position, token)

    def check(self, table: list[int], sequence, num_positions: int) -> None:
        """The first positions of a block table hold this sequence and nobody else."""
        prompt, seed = sequence.request.token_ids, sequence.request.sampling.seed
        for position in range(num_positions):
            token = prompt[position] if position < len(prompt) else token_at(seed, position)
            slot = table[position // self.block_size] * self.block_size + position % self.block_size
            assert self._slots[slot] == (position, token), f"position {position} of {num_positions}"


class RememberedStep:
    """Chunks whose KV is in the memory already, as everything that is computed after them finds it."""

    def __init__(self, chunks, first_tokens) -> None:
        self.chunks = chunks
        self.first_tokens = first_tokens

    def wait(self):
        pass

    def read(self):
        return self.first_tokens


class RememberingPrefiller:
    device = torch.device(TEST_DEVICE)

    def __init__(self, memory: Memory, prefix: PrefixCache) -> None:
        self._memory = memory
        self._prefix = prefix

    def run(self, chunks, after_layer=None):
        first_tokens = {}
        size = self._memory.block_size
        for sequence, start, end in chunks:
            for position in range(start, end):
                slot = sequence.block_table[position // size] * size + position % size
                self._memory.write(slot, position, sequence.token_ids[position])
            sequence.num_computed = end
            self._prefix.publish(sequence, start)
            self._memory.check(sequence.block_table, sequence, end)
            if sequence.prefilled:
                token = token_at(sequence.request.sampling.seed, sequence.num_tokens)
                first_tokens[sequence] = FirstToken(token, None, ())
        return RememberedStep(chunks, first_tokens)

    def forget(self, sequence):
        pass


class RememberingPipeline:
    runner: device_runner.DeviceRunner
    # So that rows are exchanged as well.
    is_pipelined = True

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def decode_token(self, batch, finish, **_):
        rows = zip(
            *(t.tolist() for t in (batch.token_ids_T, batch.positions_T, batch.slot_mapping_T, batch.kv_len_S)),
            batch.block_table_SP.tolist(),
            strict=True,
        )
        order = self.runner._order
        for row, (token, position, slot, kv_len, table) in enumerate(rows):
            assert row < len(order) or (kv_len == 0 and slot >= self._memory.first_scratch_slot)
            self._memory.write(slot, position, token)
            if kv_len:
                self._memory.check(table, order[row].sequence, kv_len)
        logits = torch.zeros(batch.num_seqs, 8)
        finish(logits)
        return logits

    def record_step(self, seconds, num_tokens):
        pass

    def idle(self, seconds):
        pass


class KeptSteps:
    """In place of the thread that waits for tokens: they come when `land` is called."""

    def __init__(self) -> None:
        # Steps of each kind as they were launched, with what to call when their tokens have come.
        self.decodes: deque = deque()
        self.prefills: deque = deque()

    def watch(self, step, on_ready):
        (self.prefills if isinstance(step, RememberedStep) else self.decodes).append((step, on_ready))

    def stop(self):
        pass


def seed_of(words: list[int]) -> int:
    return (words[1] & 0xFFFFFFFF) << 32 | words[0] & 0xFFFFFFFF


def draw(logits, sampling, positions, out_tokens, out_scores):
    for row, (words, position) in enumerate(zip(sampling.seed_words_S2.tolist(), positions.tolist(), strict=True)):
        out_tokens[row], out_scores[row] = token_at(seed_of(words), position), 0.0


class SpecialRows:
    """Draws its rows again, from the same seeds."""

    def __init__(self, state, rows, slots):
        assert len(set(slots)) == len(slots)
        self._rows = rows

    def draw(self, logits, sampling, positions, out_tokens, out_scores):
        for row in self._rows:
            out_tokens[row] = token_at(seed_of(sampling.seed_words_S2[row].tolist()), int(positions[row]))


class ImitatedEngine(DecodeEngine):
    """Turned by hand; `monkeypatch` puts the draws above in place of the device's."""

    def __init__(self, monkeypatch, *, num_blocks, block_size, max_num_seqs, max_batch_tokens, context_length):
        monkeypatch.setattr(device_runner, "sample", draw)
        monkeypatch.setattr(device_runner, "SpecialRows", SpecialRows)
        monkeypatch.setattr(device_runner, "BALANCE_EVERY", 3)
        config = ModelConfig.from_folder(dummy_model_folder())
        cache = KvCache(config, num_blocks, block_size, torch.float32, TEST_DEVICE)
        pool, memory = BlockPool(num_blocks, block_size), Memory(num_blocks, block_size)
        prefix, pipeline, clock = PrefixCache(pool, "model"), RememberingPipeline(memory), FakeClock()
        context_length = min(context_length, (num_blocks - 1) * block_size)
        runner = pipeline.runner = device_runner.DeviceRunner(
            pipeline, cache, max_num_seqs=max_num_seqs, vocab_size=NUM_TOKENS, context_length=context_length
        )
        scheduler = DecodeScheduler(pool, prefix, max_num_seqs, max_batch_tokens, 64, 1e9, context_length, clock=clock)
        self.happened: dict = {}
        super().__init__(
            scheduler,
            RememberingPrefiller(memory, prefix),
            pipeline,
            runner,
            cache,
            config=dataclasses.replace(config, vocab_size=NUM_TOKENS),
            stream_interval_s=0.0,
            stream_messages_per_s=math.inf,
            clock=clock,
            metrics=DecodeMetrics(),
            on_events=self.record,
            on_load=lambda load: None,
            on_crash=lambda error: None,
        )
        self._reader.stop()
        self._reader = self.kept = KeptSteps()

    def record(self, events):
        for sequence, of_sequence in events.items():
            told = [Token(event) if isinstance(event, int) else event for event in of_sequence]
            self.happened.setdefault(sequence, []).extend(told)

    def land(self, steps):
        """The tokens of the oldest step of a kind come; the engine's next turn looks at them."""
        if steps:
            step, on_ready = steps.popleft()
            on_ready()
            return step
        return None
