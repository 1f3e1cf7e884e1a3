"""The decode engine alone, in this thread: local prefill, continuous batching, and a clock on every step."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence as Seq

from benchmarks.shapes import Shape
from common.config import DecodeConfig
from common.engine.loop import on_device
from common.engine.setup import build
from common.errors import PdserveError
from common.metrics import DecodeMetrics
from common.params import SamplingParams, StoppingParams
from common.sequence import Request, Sequence
from decode_service.assembly import make_engine, prepare
from decode_service.engine import Completed, Lost, Token


class OfflineEngine:
    """`run` takes requests to their ends; `ready_s` says after how many seconds everything was ready."""

    def __init__(self, shape: Shape, **settings: object) -> None:
        """`settings` are a decode worker's; `model` and `load_format` make it another model than a dummy of `shape`."""
        started = time.monotonic()
        self.shape = shape
        defaults = {
            "model": shape.folder,
            "load_format": "dummy",
            "prefix_cache": False,
            "stream_interval_ms": 0.0,
            "listen": "127.0.0.1:0",
            "metrics_listen": "",
        }
        config = DecodeConfig(**{**defaults, **settings})  # type: ignore[arg-type]
        self.parts = build(config)
        self.engine = make_engine(
            config,
            self.parts,
            metrics=DecodeMetrics(),
            on_events=self._on_events,
            on_load=lambda load: None,
            on_crash=self._crashed,
        )
        prepare(config, self.parts, self.engine)
        # As the engine's own thread does.
        gc.collect()
        gc.freeze()
        self.ready_s = time.monotonic() - started
        self._num_open = 0
        # When each turn's tokens came, and how many.
        self.arrivals: list[tuple[float, int]] = []
        self.first_tokens_s: list[float] = []
        # Of every request, in their order.
        self.outputs: list[list[int]] = []
        self._seen: set[Sequence] = set()

    def holds(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether so many sequences grow to so many tokens without one losing its KV to another."""
        cache = self.parts.cache
        return num_seqs * (-(-num_tokens // cache.block_size) + 2) <= cache.num_blocks

    def run(self, requests: Seq[tuple[Seq[int], int]]) -> float:
        """Prompts with their number of output tokens, all at once and greedy; seconds until the last token."""
        self.arrivals, self.first_tokens_s, self._seen = [], [], set()
        self._num_open = len(requests)
        sequences = [make_sequence(prompt, num_tokens) for prompt, num_tokens in requests]
        with on_device(self.parts.device):
            started = time.perf_counter()
            for sequence in sequences:
                self.engine.open(sequence, local=True)
            while self._num_open:
                self.turn()
            elapsed = time.perf_counter() - started
        self.first_tokens_s = [moment - started for moment in self.first_tokens_s]
        for sequence in sequences:
            self.engine.close(sequence)
        self.engine.turn()
        self.engine.check()
        self.outputs = [list(sequence.output_ids) for sequence in sequences]
        return elapsed

    def turn(self) -> None:
        """One turn of the engine's loop, or a rest."""
        if not self.engine.turn():
            self.engine.rest()

    def _on_events(self, events: list[tuple[Sequence, object]]) -> None:
        now = time.perf_counter()
        num_tokens = 0
        for sequence, event in events:
            if isinstance(event, Token):
                num_tokens += 1
                if sequence not in self._seen:
                    self._seen.add(sequence)
                    self.first_tokens_s.append(now)
            elif isinstance(event, Completed):
                self._num_open -= 1
            elif isinstance(event, PdserveError):
                raise event
            elif isinstance(event, Lost):
                raise RuntimeError(f"the KV cache is too small for this batch: {event.detail}")
        if num_tokens:
            self.arrivals.append((now, num_tokens))

    def _crashed(self, error: BaseException) -> None:
        raise error


def make_sequence(prompt: Seq[int], num_tokens: int) -> Sequence:
    request = Request(
        request_id="bench",
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=num_tokens, ignore_eos=True),
    )
    return Sequence(request, frozenset())


def random_prompt(generator: random.Random, length: int, vocab_size: int) -> list[int]:
    return [generator.randrange(vocab_size) for _ in range(length)]
