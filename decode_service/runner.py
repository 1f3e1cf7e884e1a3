"""Runs decode steps: from reservations to tokens on their way to the host.

`HostRunner` makes each step's input from the host's books and reads its tokens before the next. With
`decode_service.device_runner.DeviceRunner` the batch lives on the device, where a steady step is one replay of a CUDA
graph; steps are launched before the tokens of the last are known here, and a `StepReader` waits for them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from common.engine.batches import decode_batch
from common.engine.kv_cache import KvCache
from common.engine.prefiller import add_to_state
from common.engine.sampler import SampledBatch, Sampler
from common.engine.sampling_state import SamplingState
from decode_service.pipeline.scheduler import PipelineScheduler
from decode_service.reservations import Reservation


class Launched(Protocol):
    """A step on its way: of decoding, or of prompt chunks."""

    def wait(self) -> None:
        """Blocks until its tokens are on the host; any thread may."""


class Step(Launched, Protocol):
    """One launched decode step."""

    # Row by row; an attempt that is over by the time the tokens come has no use for them.
    rows: list[tuple[Reservation, int]]

    def read(self) -> SampledBatch:
        """The tokens, row by row. Raises NonFiniteLogits."""


class DecodeRunner(Protocol):
    """Belongs to the engine's thread."""

    # Steps of one kind, decoding or prompt chunks, that may be launched before the oldest of them has been read.
    max_in_flight: int

    def launch(self, decoding: list[Reservation]) -> Step:
        """Enqueues one token for each of these running reservations."""

    def leave(self, reservation: Reservation) -> None:
        """It runs no more; its blocks may be given away. Steps in flight still hold it."""


class _HostStep:
    def __init__(self, rows: list[tuple[Reservation, int]], read: Callable[[], SampledBatch]) -> None:
        self.rows = rows
        self.read = read

    def wait(self) -> None:
        """Nothing is pending."""


class HostRunner:
    """See DecodeRunner. Reads every step before the next."""

    max_in_flight = 1

    def __init__(self, pipeline: PipelineScheduler, cache: KvCache, *, max_num_seqs: int, vocab_size: int) -> None:
        self._pipeline = pipeline
        self._block_size = cache.block_size
        self._device = cache.device
        self._sampler = Sampler()
        self._state = SamplingState(max_num_seqs, vocab_size, cache.device)
        self._slots: set[int] = set()

    def launch(self, decoding: list[Reservation]) -> Step:
        for reservation in decoding:
            if reservation.slot not in self._slots:
                self._slots.add(reservation.slot)
                add_to_state(self._state, reservation.slot, reservation.sequence)
        sequences = [reservation.sequence for reservation in decoding]
        batch = decode_batch(sequences, block_size=self._block_size, device=self._device)
        mean_context = sum(sequence.num_tokens for sequence in sequences) / len(sequences)
        logits_SV = self._pipeline.decode_token(batch, num_seqs=len(sequences), mean_context=mean_context)
        slots = [reservation.slot for reservation in decoding]
        drawn = self._sampler.draw(logits_SV, self._state, slots, batch.positions_T + 1)
        return _HostStep([(reservation, reservation.attempt) for reservation in decoding], drawn.read)

    def leave(self, reservation: Reservation) -> None:
        if reservation.slot in self._slots:
            self._slots.remove(reservation.slot)
            self._state.remove(reservation.slot)


class StepReader(threading.Thread):
    """Waits for steps in their order, off the engine's thread, and tells when each can be read."""

    def __init__(self) -> None:
        super().__init__(name="step-reader", daemon=True)
        self._steps: queue.SimpleQueue[tuple[Launched, Callable[[], None]] | None] = queue.SimpleQueue()
        self.start()

    def watch(self, step: Launched, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called in this thread, once `step` can be read and after that of all steps before it."""
        self._steps.put((step, on_ready))

    def stop(self) -> None:
        self._steps.put(None)

    def run(self) -> None:
        while (entry := self._steps.get()) is not None:
            step, on_ready = entry
            # A device that failed fails the read as well, in the engine's thread, which is where it is handled.
            with contextlib.suppress(RuntimeError):
                step.wait()
            on_ready()
