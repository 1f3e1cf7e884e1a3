"""One reservation on one decode worker, and the attempts to fill it. A request's life is one leg, unless a worker dies.

    open ──▶ reserved(n) ──▶ Prefill at some prefill worker ──▶ chunks ──▶ completion
                 ▲                     │ fails                    │ preempted, pair lost
                 │                     ▼                          ▼
                 └───────────────── retry(n) ◀──────────── prefill_needed(n)

Open and retry ask decode to compute the prompt itself where that is better (`router.local_prefill`), or where no
prefill worker is alive.
"""

from __future__ import annotations

import contextlib
import logging
from enum import Enum
from functools import partial
from types import TracebackType

from common.errors import DeadlineExceeded, Unavailable
from common.tracing import PREFILL, Span
from router.attempt import Attempt, PrefillFailed
from router.decode_stream import (
    Chunk,
    DecodeCompletion,
    DecodeStream,
    Event,
    KvPath,
    PrefillNeeded,
    Reserved,
    StreamLost,
    opening,
)
from router.dispatcher import Placement
from router.failures import Failures
from router.inbox import Inbox
from router.local_prefill import Prospect, prospect_of
from router.meter import Meter
from router.output import Ending, Output
from router.parts import Parts
from router.path import PathRecord
from router.placement import Choice, Demand, PrefillTerms, choose_prefill, remember
from router.prefill_call import prefill
from router.request import Request
from router.workers import Role

log = logging.getLogger(__name__)

# Decode may complete before the prefill worker's answer is here; this is how long it is waited for.
PREFILL_ANSWER_S = 1.0


class State(Enum):
    # No attempt runs: decode was asked for one.
    ASKED = "asked"
    # The KV is on its way.
    FILLING = "filling"
    # Tokens come.
    RUNNING = "running"


class Leg:
    """A context manager: the stream, the Prefill call and what they take of both workers end with it."""

    def __init__(
        self,
        request: Request,
        output: Output,
        placement: Placement,
        parts: Parts,
        path: PathRecord,
        failures: Failures,
        meter: Meter,
        span: Span,
    ) -> None:
        """`span`: that of the call to the decode worker."""
        self.identity = placement.identity
        self._worker = placement.worker
        self._share = placement.share
        self._demand = placement.demand
        self._request = request
        self._output = output
        self._fleet = parts.fleet
        self._path = path
        self._failures = failures
        self._meter = meter
        self._span = span
        span.set(worker=self.identity.instance_id)
        self._metrics = parts.metrics
        self._clock = parts.clock
        self._inbox: Inbox[Event | PrefillFailed] = Inbox()
        self._state = State.ASKED
        self._num_cached_blocks = placement.num_cached_blocks
        self._local_prefill = parts.local_prefill
        self._placings = parts.placings
        # When decode was asked for the attempt at hand, and where its prompt is computed.
        self._asked_s = 0.0
        self._prospect: Prospect | None = None
        self._is_local = self._choose_way()
        # For blocks, of the time since then.
        self._queue_s = 0.0
        # The last attempt that decode was asked to give up.
        self._retried = 0
        self._attempt: Attempt | None = None
        self._is_finishing = False

    def __enter__(self) -> Leg:
        """Raises DeadlineExceeded."""
        with contextlib.ExitStack() as resources:
            resources.callback(self._share.end)
            resources.enter_context(self._worker.loss_told_to(lambda error: self._deliver(StreamLost(error))))
            first = opening(
                self._request,
                self._current_demand().token_ids,
                model_fingerprint=self.identity.model_fingerprint,
                local_prefill=self._is_local,
            )
            self._asked_s = self._clock()
            stub = self._fleet.decode_stub(self._worker)
            self._stream = DecodeStream(
                stub, first, timeout_s=self._left_s(), metadata=self._span.metadata, deliver=self._deliver
            )
            resources.callback(self._stream.close)
            resources.callback(self._end_attempt)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def pause(self, seconds: float) -> None:
        """Lets tokens gather for so long before `advance` goes on; nothing else waits."""
        self._inbox.pause(seconds)

    async def advance(self) -> DecodeCompletion | None:
        """Waits until something has happened, and deals with all that has. Tokens go to the output.

        Returns the completion, once it is there. Raises the PdserveError that ends the leg.
        """
        for event in await self._inbox.take():
            match event:
                case Chunk(token_ids, logprobs, prompt_logprobs):
                    if self._state is State.FILLING:
                        self._note_first_token()
                    self._state = State.RUNNING
                    self._failures.progressed()
                    self._output.push(token_ids, logprobs, prompt_logprobs)
                case Reserved():
                    self._begin_attempt(event)
                case PrefillFailed():
                    self._prefill_failed(event)
                case PrefillNeeded():
                    self._prefill_needed(event)
                case StreamLost(error):
                    raise error
                case DecodeCompletion():
                    self._note_local_prefill(event)
                    return event
        if self._output.stop_string is not None and not self._is_finishing:
            self._is_finishing = True
            self._stream.finish()
        return None

    @property
    def lacks_prefill_answer(self) -> bool:
        """The prefill worker has not told its part of the path yet."""
        return self._attempt is not None and self._attempt.is_running

    async def prefill_answer(self) -> None:
        """After the completion: waits for it, not for long."""
        if self._attempt is not None:
            await self._attempt.ended(PREFILL_ANSWER_S)

    def presumed_completion(self, ending: Ending) -> DecodeCompletion:
        """What is known when every token has come and decode was lost before it said so."""
        return DecodeCompletion(
            ending=ending,
            kv_path=KvPath.LOCAL if self._is_local else KvPath.REMOTE,
            kv_bytes=self._path.leg_kv_bytes,
            kv_transport=self._path.kv_transport,
            first_decode_ms=0.0,
            decode_worker=self.identity.instance_id,
            num_cached_tokens=0,
            local_prefill_ms=0.0,
        )

    def _deliver(self, event: Event) -> None:
        if isinstance(event, DecodeCompletion | StreamLost):
            # Room for the next request, even while the client of this one has yet to read what came.
            self._share.end()
        if isinstance(event, Chunk):
            self._meter.drawn(len(event.token_ids))
        self._inbox.put(event, can_wait=isinstance(event, Chunk))

    def _begin_attempt(self, reserved: Reserved) -> None:
        self._state = State.FILLING
        self._share.counted()
        self._queue_s = reserved.queue_ms / 1e3
        self._path.queue_ms += reserved.queue_ms
        self._output.go_on()
        if self._is_local:
            self._path.begin_attempt("")
            return
        demand, choice = self._current_demand(), self._choose_prefill()
        if choice is None:
            self._retry(reserved.attempt)
            return
        self._placings.note_prefill(demand, self._prefill_terms, choice, self._way)
        remember(choice, demand)
        self._path.begin_attempt(choice.worker.instance_id)
        span = self._span.call(PREFILL, choice.worker.address)
        span.set(worker=choice.worker.instance_id, attempt=reserved.attempt, num_tokens=len(demand.token_ids))
        call = partial(
            prefill,
            self._fleet.prefill_stub(choice.worker),
            self._request,
            demand.token_ids,
            reserved,
            decode_address=self._worker.address,
            model_fingerprint=self.identity.model_fingerprint,
            timeout_s=self._left_s(),
            metadata=span.metadata,
        )
        share = choice.worker.take(num_tokens=len(demand.token_ids))
        self._attempt = Attempt(reserved.attempt, share, call, self._inbox.put, span)

    def _prefill_failed(self, event: PrefillFailed) -> None:
        self._fleet.heed(event.worker, event.error)
        # Once tokens come the call does not matter any more, nor does that of an older attempt.
        if self._state is not State.FILLING or self._attempt is None or event.attempt != self._attempt.number:
            return
        log.info("prefill failed, trying again: %s", event.error, extra={"worker": event.worker.address})
        self._failures.prefill_workers.add(event.worker)
        self._failures.add(event.error)
        self._give_up(event.attempt, cause=event.error.reason)

    def _prefill_needed(self, event: PrefillNeeded) -> None:
        # It crossed a retry, or the output has ended and decode is about to be told.
        if self._state is State.ASKED or self._output.stop_string is not None:
            return
        log.info("decode needs the prompt's KV again: %s", event.detail)
        if not event.is_preemption:
            self._failures.add(Unavailable(f"the prompt's KV was lost: {event.detail}", reason="KV_LOST"))
        self._give_up(event.attempt, cause="PREEMPTED" if event.is_preemption else "KV_LOST")

    def _give_up(self, attempt: int, *, cause: str) -> None:
        self._metrics.retries.labels(cause=cause).inc()
        self._span.event("attempt_given_up", attempt=attempt, cause=cause)
        self._output.go_on()
        if self._output.token_ids:
            self._path.num_resumptions += 1
            self._metrics.resumptions.labels(cause=cause).inc()
        self._end_attempt()
        self._retry(attempt)

    def _retry(self, attempt: int) -> None:
        self._state = State.ASKED
        # Decode heeds the first retry of an attempt alone, so a second one must ask for the same.
        if attempt != self._retried:
            self._retried, self._is_local = attempt, self._choose_way()
            self._asked_s = self._clock()
        self._stream.retry(attempt, local_prefill=self._is_local)

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.give_up()
            if self._attempt.result is not None:
                self._path.prefilled(self._attempt.result)
            self._attempt = None

    def _current_demand(self) -> Demand:
        """The prompt, and on a resumption the output so far."""
        prompt, output = self._request.prompt_token_ids, self._output.token_ids
        if len(self._demand.token_ids) != len(prompt) + len(output):
            self._demand = Demand(
                [*prompt, *output], cache_salt=self._request.cache_salt, request_id=self._request.request_id
            )
        return self._demand

    @property
    def _prefill_terms(self) -> PrefillTerms:
        return PrefillTerms(self.identity.kind, avoid=self._failures.prefill_workers)

    def _choose_prefill(self) -> Choice | None:
        """The prefill worker that would be done first, and what is to be expected of it; None: none is alive."""
        demand = self._current_demand()
        choice = choose_prefill(self._fleet.ranking[Role.PREFILL], demand, self._prefill_terms)
        reads_cache = self._request.num_prompt_logprobs is None
        self._prospect = prospect_of(demand, self._worker, self._num_cached_blocks, choice, reads_cache=reads_cache)
        return choice

    def _choose_way(self) -> bool:
        """Whether decode is to compute the prompt."""
        self._choose_prefill()
        way = self._way = self._local_prefill.choose(self._prospect)
        self._metrics.prefill_ways.labels(way=way.name, reason=way.reason.value).inc()
        self._span.set(prefill_way=way.name, prefill_way_reason=way.reason.value)
        if way.crossover_tokens is not None:
            self._metrics.local_crossover_tokens.set(way.crossover_tokens)
        self._share.compute(self._prospect.num_local_tokens if way.is_local and self._prospect else 0)
        if way.is_local:
            self._placings.note_prefill(self._current_demand(), self._prefill_terms, None, way)
        return way.is_local

    def _note_first_token(self) -> None:
        self._share.compute(0)
        if self._prospect is not None:
            seconds = max(0.0, self._clock() - self._asked_s - self._queue_s)
            self._local_prefill.first_token(self._prospect, is_local=self._is_local, seconds=seconds)

    def _note_local_prefill(self, completion: DecodeCompletion) -> None:
        if completion.local_prefill_ms and self._prospect is not None:
            num_tokens = self._prospect.num_local_tokens
            self._local_prefill.computed(self.identity.kind, num_tokens, completion.local_prefill_ms)

    def _left_s(self) -> float:
        left_s = self._request.deadline_s - self._clock()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the next worker was asked")
        return left_s
