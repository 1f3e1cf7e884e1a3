"""One batch in an engine, decoded in several ways in turns: sequential or by the pipeline's modes, profiled or not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.offline import OfflineEngine, make_sequence, random_prompt
from common.sequence import Sequence
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.decisions import Mode
from decode_service.pipeline.scheduler import PipelineStats

# Steps: after a change of the way, those that were launched before; then those that are measured. One in so many is a
# probe, or profiled.
SKIPPED, WINDOW = 4, 32
# Blocks that a sequence's table may have beyond its tokens, by which the policy goes.
SPARE_BLOCKS = 2


class Way(NamedTuple):
    """How steps run while they are measured."""

    mode: Mode
    profiling: bool = False


SEQUENTIAL, AUTO = Way(Mode.DISABLED), Way(Mode.AUTO)


class Batch:
    """Sequences of one cell, half as long as its context at first; at its end new ones take their place."""

    def __init__(self, engine: OfflineEngine, cell: Cell, static: Mapping[str, Any]) -> None:
        """`static`: cut and SMs of that mode."""
        self._engine = engine
        self._pipeline = engine.engine.pipeline
        self._cell = cell
        self._static = static
        self._sequences: list[Sequence] = []
        self._pipeline.configure(mode=Mode.DISABLED, profiling=False)

    def run(self, way: Way, num_steps: int) -> float:
        """Seconds a step, on average, after those that are skipped.

        Raises:
            SystemExit: something went wrong with a pipelined step.
        """
        num_left = self._longest - self._sequences[0].num_tokens if self._sequences else 0
        if num_left < SKIPPED + num_steps:
            self._switch(SEQUENTIAL)
            self._refill()
        self._switch(way)
        self._advance(SKIPPED)
        started_s = time.monotonic()
        num_run = self._advance(num_steps)
        seconds = (time.monotonic() - started_s) / num_run
        stats = self.stats()
        if stats.fallback_reason == "INEXACT" or stats.fallback_reason.endswith("_FAILED"):
            raise SystemExit(f"{self._cell}, {way}: {stats.fallback_reason}, {stats.fallback_detail}")
        return seconds

    def run_until(self, way: Way, is_done: Callable[[PipelineStats], bool], most_steps: int) -> int | None:
        """Steps that it took, in windows; None if so many were not enough."""
        for num_windows in range(1, most_steps // WINDOW + 1):
            self.run(way, WINDOW - SKIPPED)
            if is_done(self.stats()):
                return num_windows * WINDOW
        return None

    def stats(self) -> PipelineStats:
        return self._pipeline.stats()

    def close(self) -> None:
        self._switch(SEQUENTIAL)
        for sequence in self._sequences:
            self._engine.engine.close(sequence)
        self._engine.turn()
        while self._engine.engine.num_in_flight:
            self._engine.turn()
        self._engine.engine.check()
        self._sequences = []

    @property
    def _longest(self) -> int:
        return self._cell.context - SPARE_BLOCKS * self._engine.parts.cache.block_size

    def _switch(self, way: Way) -> None:
        static = self._static if way.mode is Mode.STATIC else {}
        self._pipeline.configure(mode=way.mode, profiling=way.profiling, **static)

    def _refill(self) -> None:
        self.close()
        generator, vocab_size = random.Random(self._cell.num_seqs), self._engine.shape.vocab_size
        length = self._cell.context // 2
        prompts = [random_prompt(generator, length, vocab_size) for _ in range(self._cell.num_seqs)]
        self._sequences = [make_sequence(prompt, self._cell.context - length) for prompt in prompts]
        for sequence in self._sequences:
            self._engine.engine.open(sequence, local=True)
        while not all(sequence.num_output_tokens for sequence in self._sequences):
            self._engine.turn()

    def _advance(self, num_steps: int) -> int:
        """Steps that landed, so many at least."""
        first = self._sequences[0].num_output_tokens
        while self._sequences[0].num_output_tokens < first + num_steps:
            self._engine.turn()
        return self._sequences[0].num_output_tokens - first
