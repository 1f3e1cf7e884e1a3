"""The decode engine turned by hand, without transport, and without a thread of its own."""

from __future__ import annotations

import math

import torch

from common.clock import FakeClock
from common.config import DecodeConfig
from common.engine.setup import build
from common.metrics import DecodeMetrics
from decode_service.assembly import make_pipeline, make_runner, prepare
from decode_service.engine import DecodeEngine
from decode_service.events import Completed, Lost, Token
from decode_service.scheduler import DecodeScheduler
from decode_service.sm.green_manager import GreenManager
from tests.support.device import WORKER_SETTINGS
from tests.support.models import dummy_model_folder


class HandTurnedEngine(DecodeEngine):
    """A decode engine whose events are kept by sequence."""

    def __init__(
        self, *, num_blocks=64, max_num_seqs=16, choose=None, captured=False, partitions=None, **settings
    ) -> None:
        model = {"model": dummy_model_folder(), "load_format": "dummy", "num_blocks": num_blocks}
        config = DecodeConfig(**{**model, **WORKER_SETTINGS, "max_num_seqs": max_num_seqs, **settings})
        self.parts = parts = build(config, choose=choose)
        self.clock = FakeClock()
        self.happened: dict = {}
        self.gone: list = []
        pipeline = make_pipeline(config, parts, partitions or GreenManager.of(parts.device))
        scheduler = DecodeScheduler(
            parts.pool,
            parts.prefix,
            max_num_seqs,
            config.max_batch_tokens,
            64,
            30.0,
            parts.identity.context_length,
            clock=self.clock,
        )
        super().__init__(
            scheduler,
            parts.prefiller,
            pipeline,
            make_runner(config, parts, pipeline),
            parts.cache,
            config=parts.model.config,
            stream_interval_s=0.0,
            stream_messages_per_s=math.inf,
            clock=self.clock,
            metrics=DecodeMetrics(),
            on_events=self.record,
            on_load=lambda load: None,
            on_crash=lambda error: None,
        )
        self.on_gone = lambda pair_id, key: self.gone.append((pair_id, key))
        if captured:
            prepare(config, parts, self)

    def turn(self):
        # As in the engine's own thread; on the stream of whoever turns.
        with torch.inference_mode():
            return super().turn()

    def settle(self):
        """Takes in the tokens of all steps in flight, and launches none."""
        while self.num_in_flight:
            self.rest()
            while self._inbox:
                self._inbox.popleft()()

    def record(self, events):
        for sequence, of_sequence in events.items():
            told = [Token(event) if isinstance(event, int) else event for event in of_sequence]
            self.happened.setdefault(sequence, []).extend(told)

    def events(self, sequence, kind):
        return [event for event in self.happened.get(sequence, []) if isinstance(event, kind)]

    def tokens(self, sequence) -> list[int]:
        return [event.token_id for event in self.events(sequence, Token)]

    def run_all(self, sequences, *, local=True):
        """Decodes to the end, answering every preemption with a retry."""
        for sequence in sequences:
            self.open(sequence, local=local)
        answered = dict.fromkeys(sequences, 0)
        for _ in range(2000):
            if not self.turn():
                self.rest()
            for sequence in sequences:
                lost = self.events(sequence, Lost)
                if len(lost) > answered[sequence]:
                    answered[sequence] = len(lost)
                    self.retry(sequence, lost[-1].attempt, local=local)
            if all(self.events(sequence, Completed) for sequence in sequences):
                self.check()
                return [self.tokens(sequence) for sequence in sequences]
        raise AssertionError("the engine never finished")
