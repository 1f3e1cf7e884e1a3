"""The decode engine: owns reservations, KV blocks and the batch, and turns committed KV into tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from common.clock import Clock
from common.engine.chunks import Chunk
from common.engine.kv_cache import KvCache
from common.engine.kv_writer import KvWriter
from common.engine.loop import EngineLoop
from common.engine.prefill_step import FirstToken, PrefillStep
from common.engine.prefiller import Prefiller
from common.engine.sampler import NonFiniteLogits
from common.errors import Internal, PdserveError
from common.load import Load, StepTimer
from common.metrics import DecodeMetrics
from common.model.config import ModelConfig
from common.sequence import Sequence
from common.transport.messages import AttemptKey, ChunkHeader, Commit, TransferStatus
from common.transport.receiving import Done
from decode_service.events import Completed, Event, Lost, OnEvents, Reserved, Token
from decode_service.outbox import Outbox
from decode_service.pipeline.scheduler import PipelineScheduler, PipelineStats
from decode_service.reservations import Reservation, State
from decode_service.runner import DecodeRunner, Launched, Step, StepReader
from decode_service.scheduler import DecodeScheduler, Plan

# Of captures and of a calibration, at a time: a request that comes waits for it.
IDLE_S = 0.02
# A sequence's first tokens never gather: somebody waits for them.
FIRST_TOKENS = 2


class DecodeEngine(EngineLoop):
    """Implements the transport's KvSink: what comes from the pairs' threads is judged and written here."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        prefiller: Prefiller,
        pipeline: PipelineScheduler,
        runner: DecodeRunner,
        cache: KvCache,
        *,
        config: ModelConfig,
        stream_interval_s: float,
        stream_messages_per_s: float,
        clock: Clock,
        metrics: DecodeMetrics,
        on_events: OnEvents,
        on_load: Callable[[Load], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        super().__init__("decode-engine", device=cache.device, on_crash=on_crash)
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.runner = runner
        self._prefiller = prefiller
        self._cache = cache
        self._writer = KvWriter(cache)
        self._num_layers = config.num_layers
        self._vocab_size = config.vocab_size
        self._clock = clock
        self._outbox: Outbox[Sequence, Event] = Outbox(
            on_events, interval_s=stream_interval_s, rate=stream_messages_per_s, clock=clock
        )
        self._on_load = on_load
        self._metrics = metrics
        # Tells a pair's sender to stop working for an attempt.
        self.on_gone: Callable[[int, AttemptKey], None] = lambda pair_id, key: None
        self._num_decodes_in_flight = 0
        self._num_prefills_in_flight = 0
        self._landed_s = 0.0
        # Where steps outrun the host, somebody has to wait for their tokens, and it is not this thread.
        self._reader = StepReader() if runner.max_in_flight > 1 else None
        self._reservation_of: dict[Sequence, Reservation] = {}
        self._step_timer = StepTimer(clock)
        # A pair's transport, as the serving path names it.
        self.transport_of: Callable[[int], str] = lambda pair_id: ""

    @property
    def num_in_flight(self) -> int:
        """Steps that have been launched and not landed, of both kinds."""
        return self._num_decodes_in_flight + self._num_prefills_in_flight

    def has_work(self) -> bool:
        # Counted apart, so that the device has another step behind the oldest of either kind. Neither runs ahead of the
        # other: a chunk goes between two decode steps, and never a second one before the next tokens.
        num_in_flight = max(self._num_decodes_in_flight, self._num_prefills_in_flight)
        return num_in_flight < self.runner.max_in_flight and self.scheduler.can_step

    def waits_for_device(self) -> bool:
        return self.num_in_flight > 0 and not self.has_work()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self._announce(plan)
        # Decoding first: whoever has just joined does not wait for the chunk in front of the device and for this one.
        if plan.decoding:
            self._launch(plan.decoding)
        if plan.chunks:
            # A decode step ends no reservation that is being filled, so the plan still holds.
            self._prefill(plan.chunks)

    def idle(self) -> None:
        # With decode steps in flight the next one is near, and it schedules. Chunks take longer: who comes meanwhile is
        # to have blocks before the device has nothing left to do.
        if not self._num_decodes_in_flight:
            self._announce(self.scheduler.schedule())
            if not self.scheduler.reservations and not self._num_prefills_in_flight:
                self.pipeline.idle(IDLE_S)

    def stop(self, timeout_s: float = 5.0) -> None:
        super().stop(timeout_s)
        if self._reader is not None:
            self._reader.stop()
        if not self.is_alive():
            self.pipeline.close()

    def publish(self) -> None:
        self._outbox.send()
        scheduler, pool = self.scheduler, self.scheduler.pool
        self._on_load(
            Load(
                step_counter=self.step_counter,
                num_free_blocks=pool.num_free,
                num_cached_blocks=pool.num_cached,
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                num_reserved=scheduler.num_filling,
                num_waiting_tokens=scheduler.num_waiting_tokens,
                step_ms=self._step_timer.mean_ms,
            )
        )

    # The front end speaks of sequences; each of these takes effect between two steps.

    def open(self, sequence: Sequence, *, local: bool) -> None:
        """Asks for a reservation; events tell what becomes of it."""
        self.submit(partial(self._open, sequence, local))

    def retry(self, sequence: Sequence, attempt: int, *, local: bool) -> None:
        """Gives up an attempt and asks for the next."""
        self.submit(partial(self._retry, sequence, attempt, local))

    def finish(self, sequence: Sequence) -> None:
        """The router has matched a stop string."""
        self.submit(partial(self._finish, sequence))

    def configure_pipeline(self, **changes: Any) -> Future[PipelineStats]:
        """See `PipelineScheduler.configure`."""
        done: Future[PipelineStats] = Future()

        def configure() -> None:
            try:
                self.pipeline.configure(**changes)
            except PdserveError as error:
                done.set_exception(error)
            else:
                done.set_result(self.pipeline.stats())

        self.submit(configure)
        return done

    def close(self, sequence: Sequence) -> None:
        """The stream is over: nothing of the sequence remains."""
        self.submit(partial(self._close, sequence))

    # The pairs' threads speak of attempts (KvSink).

    def attempt_begun(self, pair_id: int, key: AttemptKey) -> None:
        self.submit(partial(self._begin, pair_id, key))

    def chunk_landed(self, pair_id: int, header: ChunkHeader, payload: torch.Tensor, done: Done) -> None:
        # Chunks come faster than steps and take some tenths of a millisecond of the host each: tokens that have come
        # from the device are not to wait for a handful of them. Where every step is waited for, all go between two.
        self.submit(partial(self._write, pair_id, header, payload, done), can_wait=self._reader is not None)

    def commit_received(self, pair_id: int, commit: Commit, done: Done) -> None:
        self.submit(partial(self._commit, pair_id, commit, done))

    def attempt_abandoned(self, pair_id: int, key: AttemptKey) -> None:
        """The router hears it from the Prefill call and retries; nothing to undo."""

    def pair_lost(self, pair_id: int, reason: str) -> None:
        self.submit(partial(self._lose_pair, pair_id, reason))

    def check(self) -> None:
        """Proves that no block leaked. Call between steps."""
        self.scheduler.check()

    def _open(self, sequence: Sequence, local: bool) -> None:
        try:
            self._reservation_of[sequence] = self.scheduler.open(sequence, local=local)
        except PdserveError as error:
            self._outbox.put(sequence, error)

    def _retry(self, sequence: Sequence, attempt: int, local: bool) -> None:
        reservation = self._reservation_of.get(sequence)
        if reservation is not None:
            pair_id, key = reservation.pair_id, reservation.key
            if self.scheduler.retry(reservation, attempt, local=local):
                self._writer.join()
                self._prefiller.forget(sequence)
                self._tell_gone(pair_id, key)

    def _finish(self, sequence: Sequence) -> None:
        reservation = self._reservation_of.get(sequence)
        if reservation is not None:
            self._complete(reservation, by_length=False, stop_token_id=None)

    def _close(self, sequence: Sequence) -> None:
        reservation = self._reservation_of.get(sequence)
        if reservation is not None:
            self._end(reservation)

    def _announce(self, plan: Plan) -> None:
        for reservation, error in plan.failed:
            self._tell_gone(reservation.pair_id, reservation.key)
            self._release(reservation)
            del self._reservation_of[reservation.sequence]
            self._outbox.put(reservation.sequence, error)
        for reservation in plan.preempted:
            self._release(reservation)
            detail = "its KV blocks went to older sequences"
            self._outbox.put(reservation.sequence, Lost(reservation.attempt, True, detail))
            self._metrics.preemptions.inc()
        if plan.reserved:
            self._writer.blocks_reserved()
        for reservation in plan.reserved:
            cached = reservation.num_cached_blocks * self.scheduler.pool.block_size
            queue_ms = (self._clock() - reservation.queued_s) * 1e3
            self._metrics.queue_s.observe(queue_ms / 1e3)
            self._metrics.prefix_hit_tokens.inc(cached)
            self._metrics.prefix_miss_tokens.inc(reservation.sequence.num_tokens - cached)
            self._outbox.put(reservation.sequence, Reserved(reservation.id, reservation.attempt, cached, queue_ms))

    def _launch(self, decoding: list[Reservation]) -> None:
        launched_s = self._clock()
        step = self.runner.launch(decoding)
        self.scheduler.launched(decoding)
        self._num_decodes_in_flight += 1
        self._when_landed(step, partial(self._land, step, launched_s))

    def _prefill(self, chunks: list[Chunk]) -> None:
        # Tokens that have come do not wait for prompts.
        self._outbox.send()
        reservations = [self._reservation_of[chunk.sequence] for chunk in chunks]
        attempts = [(reservation, reservation.attempt) for reservation in reservations]
        launched_s = self._clock()
        step = self._prefiller.run(chunks, self.tick)
        self._num_prefills_in_flight += 1
        self._metrics.computed_tokens.inc(sum(chunk.end - chunk.start for chunk in chunks))
        self._when_landed(step, partial(self._land_prefill, step, attempts, launched_s))

    def _when_landed(self, step: Launched, land: Callable[[], None]) -> None:
        """Calls `land` in this thread when the step can be read without waiting, or at once where nobody else waits."""
        if self._reader is None:
            land()
        else:
            self._reader.watch(step, partial(self.submit, land))

    def _land_prefill(self, step: PrefillStep, attempts: list[tuple[Reservation, int]], launched_s: float) -> None:
        self._num_prefills_in_flight -= 1
        self.tick()
        first_tokens = step.read()
        seconds = self._record_landing(launched_s)
        self._metrics.local_prefills.inc(len(first_tokens))
        for reservation, attempt in attempts:
            # Ended or given up since it was launched: the first token is nobody's.
            if reservation.state is not State.FILLING or reservation.attempt != attempt:
                continue
            reservation.local_prefill_ms += seconds * 1e3
            match first_tokens.get(reservation.sequence):
                case FirstToken() as first_token:
                    self._join(reservation, first_token)
                case PdserveError() as error:
                    self._fail(reservation, error)

    def _land(self, step: Step, launched_s: float) -> None:
        self._num_decodes_in_flight -= 1
        self.tick()
        faulty: tuple[int, ...] = ()
        try:
            sampled = step.read()
        except NonFiniteLogits as error:
            sampled, faulty = error.sampled, error.rows
        seconds = self._record_landing(launched_s)
        for row in faulty:
            reservation, attempt = step.rows[row]
            if reservation.is_running(attempt):
                self._fail(reservation, Internal("the model's logits hold NaN or infinity", reason="NON_FINITE_LOGITS"))
        # Ended or preempted since it was launched: the token is nobody's.
        landed = [
            (reservation, token_id, logprob)
            for (reservation, attempt), token_id, logprob in zip(
                step.rows, sampled.token_ids, sampled.logprobs, strict=True
            )
            if reservation.is_running(attempt)
        ]
        self.pipeline.record_step(seconds, len(landed))
        self._metrics.step_s.observe(seconds)
        self._metrics.batch_size.observe(len(step.rows))
        self._metrics.output_tokens.inc(len(landed))
        for reservation, token_id, logprob in landed:
            self.scheduler.advance(reservation, token_id)
            token = token_id if logprob is None else Token(token_id, logprob)
            if not reservation.first_decode_ms:
                reservation.first_decode_ms = (self._landed_s - reservation.committed_s) * 1e3
                self._metrics.first_step_s.observe(reservation.first_decode_ms / 1e3)
                token = Token(token_id, logprob, at_s=self._landed_s)
            self._put_out(reservation, token)

    def _record_landing(self, launched_s: float) -> float:
        """The seconds that a step took which has just been read."""
        now = self._clock()
        # A step that was launched behind another began when that one ended.
        seconds = now - max(launched_s, self._landed_s)
        self._landed_s = now
        self._step_timer.record(seconds)
        return seconds

    def _join(self, reservation: Reservation, first_token: FirstToken) -> None:
        self.scheduler.commit(reservation, first_token.token_id)
        self._put_out(reservation, Token(*first_token, at_s=reservation.committed_s))

    def _put_out(self, reservation: Reservation, token: int | Token) -> None:
        """The newest token of a sequence."""
        sequence = reservation.sequence
        token_ids, request = sequence.token_ids, sequence.request
        token_id = token_ids[-1]
        num_output_tokens = len(token_ids) - request.num_prompt_tokens
        self._outbox.put(sequence, token, can_wait=num_output_tokens > FIRST_TOKENS)
        if token_id in sequence.stop_token_ids and num_output_tokens >= request.stopping.min_tokens:
            self._complete(reservation, by_length=False, stop_token_id=token_id)
        elif len(token_ids) >= reservation.most_tokens:
            self._complete(reservation, by_length=True, stop_token_id=None)

    def _complete(self, reservation: Reservation, *, by_length: bool, stop_token_id: int | None) -> None:
        self._outbox.put(
            reservation.sequence,
            Completed(
                by_length=by_length,
                stop_token_id=stop_token_id,
                num_output_tokens=reservation.sequence.num_output_tokens,
                kv_path=reservation.kv_path,
                kv_bytes=reservation.kv_bytes,
                kv_transport=reservation.kv_transport,
                first_decode_ms=reservation.first_decode_ms,
                num_cached_tokens=reservation.num_local_cached_tokens,
                local_prefill_ms=reservation.local_prefill_ms,
            ),
        )
        self._end(reservation)

    def _fail(self, reservation: Reservation, error: PdserveError) -> None:
        self._outbox.put(reservation.sequence, error)
        self._end(reservation)

    def _end(self, reservation: Reservation) -> None:
        pair_id, key = (
            (reservation.pair_id, reservation.key) if reservation.state is State.FILLING else (None, reservation.key)
        )
        self.scheduler.end(reservation)
        self._release(reservation)
        del self._reservation_of[reservation.sequence]
        self._tell_gone(pair_id, key)

    def _release(self, reservation: Reservation) -> None:
        """Drops what the engine keeps beside the scheduler's books."""
        if reservation.slot >= 0:
            self.runner.leave(reservation)
            reservation.slot = -1
        else:
            # Its blocks may have been in the middle of being written.
            self._writer.join()
        self._prefiller.forget(reservation.sequence)

    def _tell_gone(self, pair_id: int | None, key: AttemptKey) -> None:
        if pair_id is not None:
            self._metrics.attempts_fenced.inc()
            self.on_gone(pair_id, key)

    def _begin(self, pair_id: int, key: AttemptKey) -> None:
        reservation = self.scheduler.reservations.get(key.reservation)
        is_open = reservation is not None and reservation.judge_key(key)[0] is TransferStatus.OK
        # An attempt belongs to the pair that began it.
        if reservation is None or not is_open or reservation.pair_id is not None:
            self.on_gone(pair_id, key)
        else:
            reservation.pair_id = pair_id
            reservation.kv_transport = self.transport_of(pair_id)

    def _write(self, pair_id: int, header: ChunkHeader, payload: torch.Tensor, done: Done) -> None:
        """The fence check and the scatter are one step of this thread: nothing can come between them."""
        reservation = self.scheduler.reservations.get(header.key.reservation)
        status, detail = self._judge(pair_id, header, reservation)
        still_read = None
        if reservation is not None and status is TransferStatus.OK:
            blocks = reservation.sequence.block_table[header.first_block : header.first_block + header.num_blocks]
            still_read = self._writer.write(header.first_layer, header.num_layers, blocks, payload)
            reservation.record(header)
            self._metrics.kv_bytes.labels(transport=reservation.kv_transport).inc(header.num_bytes)
        self._metrics.kv_chunks.labels(status=status.name).inc()
        done(status, detail, still_read)

    def _judge(self, pair_id: int, header: ChunkHeader, reservation: Reservation | None) -> tuple[TransferStatus, str]:
        """May this chunk be written?"""
        if reservation is None:
            return TransferStatus.FENCED, f"reservation {header.key.reservation} is gone"
        verdict = reservation.judge_pair(pair_id, header.key)
        if verdict[0] is not TransferStatus.OK:
            return verdict
        return reservation.judge_chunk(
            header,
            num_layers=self._num_layers,
            block_bytes=self._cache.block_bytes,
            num_blocks=self.scheduler.num_prompt_blocks(reservation),
        )

    def _commit(self, pair_id: int, commit: Commit, done: Done) -> None:
        reservation = self.scheduler.reservations.get(commit.key.reservation)
        if reservation is None:
            done(TransferStatus.FENCED, f"reservation {commit.key.reservation} is gone")
            return
        status, detail = reservation.judge_pair(pair_id, commit.key)
        if status is TransferStatus.OK:
            status, detail = reservation.judge_commit(
                commit,
                num_layers=self._num_layers,
                num_blocks=self.scheduler.num_prompt_blocks(reservation),
                vocab_size=self._vocab_size,
            )
        done(status, detail)
        if status is TransferStatus.OK:
            self._writer.join()
            self._join(
                reservation, FirstToken(commit.first_token_id, commit.first_token_logprob, commit.prompt_logprobs)
            )

    def _lose_pair(self, pair_id: int, reason: str) -> None:
        self._metrics.pairs_ended.inc()
        for reservation in list(self.scheduler.reservations.values()):
            if reservation.pair_id == pair_id and reservation.state is State.FILLING:
                self.scheduler.lose(reservation)
                self._metrics.attempts_lost.inc()
                self._outbox.put(reservation.sequence, Lost(reservation.attempt, False, reason))
