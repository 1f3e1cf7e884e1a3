"""The decode engine alone, in this thread: local prefill, continuous batching, and a clock on every step."""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Sequence as Seq

from benchmarks.shapes import Shape
from benchmarks.streams import Stream
from common.config import DecodeConfig
from common.engine.loop import on_device
from common.engine.setup import build
from common.errors import PdserveError
from common.metrics import DecodeMetrics
from common.params import SamplingParams, StoppingParams
from common.sequence import Request, Sequence
from decode_service.assembly import make_engine, prepare
from decode_service.events import Completed, Event, Lost, Token


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
            "decode_pipeline": "disabled",
            "stream_interval_ms": 0.0,
            "stream_messages_per_s": 1e9,
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
        # Still to come; and of those that came: when they were opened, had their first token, and ended.
        self._waiting: deque[Sequence] = deque()
        self._opened_s: dict[Sequence, float] = {}
        self._first_token_s: dict[Sequence, float] = {}
        self._ended_s: dict[Sequence, float] = {}
        # When each turn's tokens came, and how many.
        self.arrivals: list[tuple[float, int]] = []
        self.first_tokens_s: list[float] = []
        # Of every request, in their order.
        self.outputs: list[list[int]] = []
        self.streams: list[Stream] = []

    def holds(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether so many sequences grow to so many tokens without one losing its KV to another."""
        cache = self.parts.cache
        return num_seqs * (-(-num_tokens // cache.block_size) + 2) <= cache.num_blocks

    def run(self, requests: Seq[tuple[Seq[int], int]], *, concurrency: int | None = None) -> float:
        """Prompts with their number of output tokens, greedy; seconds until the last token.

        All are opened at once, or as many as `concurrency` says and another whenever one ends.
        """
        sequences = [make_sequence(prompt, num_tokens) for prompt, num_tokens in requests]
        self.arrivals, self._waiting = [], deque(sequences)
        self._opened_s, self._first_token_s, self._ended_s = {}, {}, {}
        with on_device(self.parts.device):
            started = time.monotonic()
            for _ in range(concurrency or len(sequences)):
                self._open_next()
            while True:
                has_more = self.engine.turn()
                if len(self._ended_s) == len(sequences):
                    break
                if not has_more:
                    self.engine.rest()
            elapsed = time.monotonic() - started
        for sequence in sequences:
            self.engine.close(sequence)
        self.engine.turn()
        self.engine.check()
        self.outputs = [list(sequence.output_ids) for sequence in sequences]
        self.first_tokens_s = [moment - started for moment in self._first_token_s.values()]
        self.streams = [
            Stream(self._opened_s[one], self._first_token_s[one], self._ended_s[one], one.num_output_tokens)
            for one in sequences
        ]
        return elapsed

    def turn(self) -> None:
        """One turn of the engine's loop, or a rest."""
        if not self.engine.turn():
            self.engine.rest()

    def _open_next(self) -> None:
        if self._waiting:
            sequence = self._waiting.popleft()
            self._opened_s[sequence] = time.monotonic()
            self.engine.open(sequence, local=True)

    def _on_events(self, events: dict[Sequence, list[Event]]) -> None:
        now = time.monotonic()
        num_tokens = 0
        for sequence, event in one_by_one(events):
            if isinstance(event, int | Token):
                num_tokens += 1
                self._first_token_s.setdefault(sequence, now)
            elif isinstance(event, Completed):
                self._ended_s[sequence] = now
                self._open_next()
            elif isinstance(event, PdserveError):
                raise event
            elif isinstance(event, Lost):
                raise RuntimeError(f"the KV cache is too small for this batch: {event.detail}")
        if num_tokens:
            self.arrivals.append((now, num_tokens))

    def _crashed(self, error: BaseException) -> None:
        raise error


def one_by_one(events: dict[Sequence, list[Event]]) -> list[tuple[Sequence, Event]]:
    """Each with the sequence that it happened to."""
    return [(sequence, event) for sequence, of_sequence in events.items() for event in of_sequence]


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
