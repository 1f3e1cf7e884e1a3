"""From the queue to a decode worker: requests leave it when one has room and no pressure, so overload waits here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.clock import Clock
from common.errors import PdserveError, Unavailable
from common.metrics import RouterMetrics
from router.explanation import PlacementLog
from router.failures import Failures
from router.fleet import Fleet
from router.hold import Hold
from router.placement import Choice, DecodeTerms, Demand, choose_decode, remember
from router.queue import Dropped, RequestQueue, Ticket
from router.request import Request
from router.workers import Identity, Role, Share, Worker

log = logging.getLogger(__name__)

# How often the queue is searched for requests that are late.
SWEEP_S = 0.05
# Finding out that nobody has room takes a millisecond among a thousand workers, which tell of a change a thousand times
# a second: at most this share of the router's time goes into searches in vain.
DISPATCH_SHARE = 0.2


class Placement(NamedTuple):
    """A decode worker, as it was when it was chosen, and what the request takes of it."""

    worker: Worker
    generation: int
    identity: Identity
    share: Share
    demand: Demand
    num_cached_blocks: int


class _Waiting(NamedTuple):
    demand: Demand
    placed: asyncio.Future[Placement]

    @property
    def was_placed(self) -> bool:
        return self.placed.done() and not self.placed.cancelled() and self.placed.exception() is None


class Dispatcher:
    """Belongs to the event loop. `wake` it whenever a worker may have more room."""

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        placings: PlacementLog,
        metrics: RouterMetrics,
        clock: Clock,
        *,
        replace_wait_s: float,
    ) -> None:
        """What is here waits for `replace_wait_s` while no decode worker takes new work; what comes then, does not."""
        self.queue = queue
        # Requests that have lost their decode worker and wait for another.
        self.num_replacing = 0
        self._replace_wait_s = replace_wait_s
        self._fleet = fleet
        self._placings = placings
        self._metrics = metrics
        self._clock = clock
        # Runs while whoever is next would have a worker, were it not under pressure.
        self._hold = Hold(clock)
        self._waiting: dict[Ticket, _Waiting] = {}
        self._sweep: asyncio.TimerHandle | None = None
        # Since when no decode worker takes new work.
        self._stranded_since_s: float | None = None
        self._changed = asyncio.Event()
        self._dispatching: asyncio.Handle | None = None
        self._not_before_s = 0.0

    async def place(self, request: Request) -> Placement:
        """A decode worker with room for `request`, waiting for one in the queue.

        Raises:
            ResourceExhausted: the queue is full.
            DeadlineExceeded: its time is up, or would be.
            Unavailable: no decode worker takes new work, and that is more than a hiccup.
        """
        if self.stranded_s >= self._fleet.heartbeat_timeout_s:
            raise self._nobody_serves()
        demand = Demand(request.prompt_token_ids, cache_salt=request.cache_salt, request_id=request.request_id)
        if not len(self.queue) and (placement := self._place_now(demand)):
            self.queue.passed_by(request)
            return placement
        ticket = self._join(request)
        waiting = self._waiting[ticket] = _Waiting(demand, asyncio.get_running_loop().create_future())
        held_before_s = self._hold.total_s
        self._arm()
        # It may be ahead of those that have no room.
        self.wake()
        try:
            return await waiting.placed
        except asyncio.CancelledError:
            if waiting.was_placed:
                waiting.placed.result().share.end()
            raise
        finally:
            self._forget(ticket)
            if held_s := self._hold.total_s - held_before_s:
                self._metrics.held_s.observe(held_s)

    @property
    def num_held(self) -> int:
        """Those that wait because decode is under pressure."""
        return len(self.queue) if self._hold.is_on else 0

    async def place_again(
        self, demand: Demand, failures: Failures, error: PdserveError, *, can_wait: bool
    ) -> Placement:
        """Another decode worker for a request that lost its own with `error`: one with room and no pressure if there
        is, else any. It waits for neither, only for a worker, where it can: pressure ends as requests that have begun
        end, and this is one of them.

        Raises `error` when none comes up; where it is a loss, with how long was waited for whom.
        """
        begun_s, is_told = self._clock(), False
        self.num_replacing += 1
        try:
            while True:
                changed = self._changed
                exclude = failures.excluded
                placement = self._place_now(demand, exclude) or self._place_now(demand, exclude, anywhere=True)
                if placement is not None:
                    return placement
                waited_s = self._clock() - begun_s
                left_s = self._patience_s - waited_s if can_wait else 0.0
                if left_s <= 0:
                    raise self._not_replaced(error, waited_s)
                if not is_told:
                    is_told = True
                    log.info("waiting for a decode worker to go on at: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await changed.wait()
        finally:
            self.num_replacing -= 1

    def wake(self) -> None:
        """Gives those at the head of the queue to workers that have room: soon, and once for all that has changed until
        then."""
        self._note_stranded()
        if self._dispatching is None:
            loop, wait_s = asyncio.get_running_loop(), self._not_before_s - self._clock()
            self._dispatching = (
                loop.call_later(wait_s, self._dispatch) if wait_s > 0 else loop.call_soon(self._dispatch)
            )

    def _dispatch(self) -> None:
        self._dispatching = None
        begun_s = self._clock()
        self._changed.set()
        self._changed = asyncio.Event()
        has_placed = self._place_waiting()
        ended_s = self._clock()
        self._not_before_s = 0.0 if has_placed else ended_s + (ended_s - begun_s) * (1 / DISPATCH_SHARE - 1)

    def _place_waiting(self) -> bool:
        """Whether anybody had room."""
        has_placed = False
        while (ticket := self.queue.head) is not None:
            waiting = self._waiting[ticket]
            if waiting.placed.cancelled():
                self._forget(ticket)
                continue
            placement = self._place_now(waiting.demand)
            if placement is None:
                break
            has_placed = True
            self.queue.take(ticket)
            waiting.placed.set_result(placement)
        self._note_hold()
        return has_placed

    @property
    def _patience_s(self) -> float:
        """How long a worker may be waited for. That one is away may be heard later than what failed there."""
        is_away = not self._fleet.decode or any(not one.is_serving for one in self._fleet.decode)
        return self._replace_wait_s if is_away else min(self._replace_wait_s, self._fleet.heartbeat_timeout_s)

    def _not_replaced(self, error: PdserveError, waited_s: float) -> PdserveError:
        if not isinstance(error, Unavailable):
            return error
        limit = f"replace_wait_s = {self._replace_wait_s:g}"
        return Unavailable(
            f"{error.message}; no decode worker took over within {waited_s:.1f} s ({limit}): {self._states()}",
            retry_after_s=1.0,
            reason=error.reason,
        )

    def _join(self, request: Request) -> Ticket:
        try:
            ticket, displaced = self.queue.join(request)
        except PdserveError as error:
            self._metrics.turned_away.labels(reason=error.reason).inc()
            raise
        self._drop(displaced)
        return ticket

    def _place_now(self, demand: Demand, exclude: Sequence[Worker] = (), *, anywhere: bool = False) -> Placement | None:
        terms = DecodeTerms(
            self._fleet.prefill_kinds, exclude=exclude, only_with_room=not anywhere, heed_pressure=not anywhere
        )
        choice = choose_decode(self._fleet.ranking[Role.DECODE], demand, terms)
        if choice is None:
            return None
        self._placings.note_decode(demand, terms, choice)
        return self._take(choice, demand)

    def _note_hold(self) -> None:
        """Is it the end of pressure that whoever is next waits for? Then there is a worker that has room."""
        head, choice = self.queue.head, None
        if head is not None:
            terms = DecodeTerms(self._fleet.prefill_kinds, heed_pressure=False)
            choice = choose_decode(self._fleet.ranking[Role.DECODE], self._waiting[head].demand, terms)
        if choice is not None and not self._hold.is_on:
            self._hold.begin()
            reasons = ", ".join(reason.name for reason in choice.worker.load.pressure)
            log.info("prompts are held back: %s is under pressure, %s", choice.worker, reasons or "or soon would be")
        elif choice is None and self._hold.is_on:
            log.info("prompts are no longer held back, after %.3f s", self._hold.end())

    def _take(self, choice: Choice, demand: Demand) -> Placement:
        remember(choice, demand)
        identity = choice.worker.identity
        assert identity is not None, "a serving worker has been met"
        num_blocks = demand.num_blocks(identity) - choice.num_cached_blocks
        share = choice.worker.take(num_blocks=num_blocks)
        return Placement(choice.worker, choice.worker.generation, identity, share, demand, choice.num_cached_blocks)

    def _arm(self) -> None:
        if self._sweep is None and len(self.queue):
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._drop_late)

    def _drop_late(self) -> None:
        self._sweep = None
        self._drop(self.queue.drop_late())
        if self.stranded_s >= self._replace_wait_s:
            for ticket in list(self.queue):
                self._fail(ticket, self._nobody_serves())
        self._arm()

    def _drop(self, dropped: Iterable[Dropped]) -> None:
        for ticket, error in dropped:
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: PdserveError) -> None:
        waiting = self._waiting[ticket]
        if not waiting.placed.done():
            self._metrics.turned_away.labels(reason=error.reason).inc()
            waiting.placed.set_exception(error)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._waiting.pop(ticket, None)
        if ticket in self.queue:
            self.queue.leave(ticket)

    def _note_stranded(self) -> None:
        if self._fleet.can_serve:
            self._stranded_since_s = None
        elif self._stranded_since_s is None:
            self._stranded_since_s = self._clock()

    @property
    def stranded_s(self) -> float:
        """How long no decode worker has taken new work; 0 while one does."""
        return 0.0 if self._stranded_since_s is None else self._clock() - self._stranded_since_s

    def _nobody_serves(self) -> PdserveError:
        return Unavailable(f"no decode worker takes new work: {self._states()}", retry_after_s=1.0, reason="NO_WORKER")

    def _states(self) -> str:
        return "; ".join(
            [f"{one.address} is {one.state.value} {one.reason}".strip() for one in self._fleet.decode]
            + [f"{name} leads nowhere" for name in self._fleet.unknown_decode_names]
        )
