"""The prefill engine: computes prompts chunk by chunk and ships each layer's blocks as soon as they are final."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from common.clock import Clock
from common.engine.chunks import Chunk
from common.engine.loop import EngineLoop
from common.engine.prefill_step import FirstToken
from common.engine.prefiller import Prefiller
from common.engine.streams import mark
from common.errors import Aborted, DataLoss, DeadlineExceeded, Internal, InvalidArgument, PdserveError, Unavailable
from common.load import Load, StepTimer, TokenPace
from common.metrics import PrefillMetrics
from common.sequence import Sequence
from common.transport.messages import AttemptKey, AttemptOutcome, Commit, TransferStatus
from prefill_service.scheduler import Job, PrefillScheduler

if TYPE_CHECKING:
    from common.transport.sending import OutgoingAttempt, SendingPair

log = logging.getLogger(__name__)


class PrefillResult(NamedTuple):
    """What a shipped prompt cost."""

    queue_ms: float
    prefill_ms: float
    kv_transfer_ms: float
    kv_bytes: int
    num_cached_tokens: int


# Called once, from the engine thread.
OnDone = Callable[[PrefillResult | PdserveError], None]


@dataclass(eq=False, slots=True)
class Task:
    """A job together with where its KV goes and who waits for it."""

    job: Job
    key: AttemptKey
    pair: SendingPair
    on_done: OnDone
    outgoing: OutgoingAttempt | None = None
    # Why the attempt was given up here; the transport's outcome otherwise.
    error: PdserveError | None = None


class PrefillEngine(EngineLoop):
    """Runs jobs from `submit_task` to the decode worker's last acknowledgement."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        prefiller: Prefiller,
        *,
        clock: Clock,
        metrics: PrefillMetrics,
        on_load: Callable[[Load], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        super().__init__("prefill-engine", device=prefiller.device, on_crash=on_crash)
        self.scheduler = scheduler
        self._prefiller = prefiller
        self._clock = clock
        self._metrics = metrics
        self._on_load = on_load
        self._step_timer = StepTimer(clock)
        self._pace = TokenPace()
        # Every task whose blocks are not back in the pool yet.
        self._tasks: dict[Sequence, Task] = {}

    def submit_task(self, task: Task) -> None:
        """Queues a job; `task.on_done` tells how it ended."""
        self.submit(partial(self._accept, task))

    def cancel(self, task: Task, error: PdserveError) -> None:
        """Gives a task up; its blocks come back once what is announced has been sent."""
        self.submit(partial(self._give_up, task, error))

    def has_work(self) -> bool:
        return bool(self.scheduler.running)

    def step(self) -> None:
        self._drop_hopeless()
        chunks = self.scheduler.schedule()
        if not chunks:
            return
        with self._step_timer:
            first_tokens = self._prefiller.run(chunks, partial(self._ship_layer, chunks)).read()
        for chunk in chunks:
            self._advance(self._tasks[chunk.sequence].job, chunk)
        for sequence, first_token in first_tokens.items():
            if isinstance(first_token, PdserveError):
                self._give_up(self._tasks[sequence], first_token)
            else:
                self._commit(self._tasks[sequence], first_token)
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        self._pace.record(self._step_timer.last_ms, num_tokens)
        self._metrics.step_s.observe(self._step_timer.last_ms / 1e3)
        self._metrics.batch_size.observe(len(chunks))
        self._metrics.computed_tokens.inc(num_tokens)

    def idle(self) -> None:
        self._drop_hopeless()
        self.scheduler.start_waiting()

    def publish(self) -> None:
        pool = self.scheduler.pool
        self._on_load(
            Load(
                step_counter=self.step_counter,
                num_free_blocks=pool.num_free,
                num_cached_blocks=pool.num_cached,
                num_running=len(self._tasks) - self.scheduler.num_waiting,
                num_waiting=self.scheduler.num_waiting,
                num_waiting_tokens=self.scheduler.num_waiting_tokens,
                step_ms=self._step_timer.mean_ms,
                token_ms=self._pace.token_ms,
            )
        )

    def check(self) -> None:
        """Proves that no block leaked."""
        self.scheduler.pool.check([sequence.block_table for sequence in self._tasks])

    def _accept(self, task: Task) -> None:
        try:
            self.scheduler.submit(task.job)
        except PdserveError as error:
            task.on_done(error)
            return
        self._tasks[task.job.sequence] = task
        task.outgoing = task.pair.begin(task.key, lambda outcome: self.submit(partial(self._ended, task, outcome)))

    def _ship_layer(self, chunks: list[Chunk], layer: int) -> None:
        self.tick()
        ready = mark(self._prefiller.device)
        for chunk in chunks:
            task = self._tasks[chunk.sequence]
            assert task.outgoing is not None
            first, end = task.job.num_shipped_blocks, self._num_final_blocks(chunk)
            if first < end and not task.outgoing.gone:
                task.outgoing.ship(layer, first, chunk.sequence.block_table[first:end], ready)

    def _num_final_blocks(self, chunk: Chunk) -> int:
        size = self.scheduler.pool.block_size
        return -(-chunk.end // size) if chunk.is_last else chunk.end // size

    def _advance(self, job: Job, chunk: Chunk) -> None:
        job.num_shipped_blocks = max(job.num_shipped_blocks, self._num_final_blocks(chunk))

    def _commit(self, task: Task, first_token: FirstToken) -> None:
        assert task.outgoing is not None
        task.job.first_token_s = self._clock()
        self.scheduler.finish_computing(task.job)
        task.outgoing.commit(
            Commit(
                key=task.key,
                num_bytes=task.outgoing.num_bytes,
                first_token_id=first_token.token_id,
                first_token_logprob=first_token.logprob,
                prompt_logprobs=first_token.prompt_logprobs,
            )
        )

    def _drop_hopeless(self) -> None:
        """Between chunks is where cancel, fence and deadline act."""
        now = self._clock()
        for task in list(self._tasks.values()):
            if task.error is not None:
                continue
            if task.job.sequence.request.deadline_s <= now:
                self._give_up(task, DeadlineExceeded("the deadline passed while the prompt was being prefilled"))
            elif task.outgoing is not None and task.outgoing.gone and not task.job.first_token_s:
                self._give_up(task, Aborted("decode gave up this attempt"))

    def _give_up(self, task: Task, error: PdserveError) -> None:
        if task.job.sequence not in self._tasks or task.error is not None:
            return
        task.error = error
        if not task.job.first_token_s:
            self.scheduler.drop(task.job)
            self._prefiller.forget(task.job.sequence)
        assert task.outgoing is not None
        task.outgoing.abandon()

    def _ended(self, task: Task, outcome: AttemptOutcome) -> None:
        """The transport needs the blocks no more."""
        job = task.job
        if not job.first_token_s and task.error is None:
            self.scheduler.drop(job)
            self._prefiller.forget(job.sequence)
        del self._tasks[job.sequence]
        self.scheduler.release(job)
        if outcome.status is TransferStatus.OK:
            result = self._result(job, outcome)
            self._observe(result, job, task.pair.transport)
            task.on_done(result)
        else:
            task.on_done(task.error or error_of(outcome))

    def _result(self, job: Job, outcome: AttemptOutcome) -> PrefillResult:
        return PrefillResult(
            queue_ms=(job.started_s - job.arrived_s) * 1e3,
            prefill_ms=(job.first_token_s - job.started_s) * 1e3,
            kv_transfer_ms=(self._clock() - job.first_token_s) * 1e3,
            kv_bytes=outcome.num_bytes,
            num_cached_tokens=job.num_cached_tokens,
        )

    def _observe(self, result: PrefillResult, job: Job, transport: str) -> None:
        metrics = self._metrics
        metrics.kv_bytes.labels(transport=transport).inc(result.kv_bytes)
        metrics.prefix_hit_tokens.inc(result.num_cached_tokens)
        metrics.prefix_miss_tokens.inc(job.sequence.num_tokens - result.num_cached_tokens)
        metrics.output_tokens.inc()
        metrics.queue_s.observe(result.queue_ms / 1e3)
        metrics.compute_s.observe(result.prefill_ms / 1e3)
        metrics.handover_s.observe(result.kv_transfer_ms / 1e3)


def error_of(outcome: AttemptOutcome) -> PdserveError:
    """The error behind an attempt that did not end OK."""
    match outcome.status:
        case TransferStatus.FENCED:
            return Aborted(outcome.detail or "a newer attempt exists, or the reservation is gone")
        case TransferStatus.CORRUPT:
            return DataLoss(outcome.detail or "a KV chunk's checksum did not hold")
        case TransferStatus.INVALID:
            return InvalidArgument(outcome.detail or "decode refused a KV chunk")
        case None:
            return Unavailable(outcome.detail or "the pair with the decode worker broke", reason="PAIR_LOST")
    return Internal(f"unexpected transfer status {outcome.status}")
