"""Which reservations get blocks and which sequences decode in a step. Knows block ids and token counts, never tensors.

Rules: blocks are promised all or nothing, for the prompt plus one block, first come, first served; one block a running
sequence stays free as a watermark; when a running sequence cannot grow even so, the youngest running sequence is
preempted, never a reservation whose KV is on its way.
"""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from common.blocks import BlockPool
from common.clock import Clock
from common.engine.chunks import Chunk, plan_chunks
from common.engine.prefix import PrefixCache
from common.errors import DeadlineExceeded, InvalidArgument, PdserveError, ResourceExhausted
from common.sequence import Sequence
from decode_service.reservations import Reservation, State

# Leaves room to count up in an unsigned 64-bit field.
FIRST_ID_BITS = 63


class Plan(NamedTuple):
    """One step."""

    # New attempts: their routers must be told.
    reserved: list[Reservation]
    # Lost their blocks in this step.
    preempted: list[Reservation]
    # Gave up waiting, or ran out of time.
    failed: list[tuple[Reservation, PdserveError]]
    # Local prefill.
    chunks: list[Chunk]
    # One token each.
    decoding: list[Reservation]


@dataclass(eq=False)
class DecodeScheduler:
    """Owns the reservations and, through them, every held block of the pool."""

    pool: BlockPool
    prefix: PrefixCache
    max_num_seqs: int
    max_batch_tokens: int
    max_waiting: int
    reservation_wait_s: float
    context_length: int
    clock: Clock
    reservations: dict[int, Reservation] = field(default_factory=dict)
    _waiting: OrderedDict[int, Reservation] = field(default_factory=OrderedDict)
    _filling: OrderedDict[int, Reservation] = field(default_factory=OrderedDict)
    _running: OrderedDict[int, Reservation] = field(default_factory=OrderedDict)
    _free_slots: list[int] = field(default_factory=list)
    # From a random place: KV meant for a former start of this worker, at the same address, finds no reservation here.
    _ids: itertools.count = field(default_factory=lambda: itertools.count(secrets.randbits(FIRST_ID_BITS)))
    num_preemptions: int = 0
    # Nobody gives up waiting or runs out of time before.
    _next_expiry_s: float = float("inf")

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.max_num_seqs - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_filling(self) -> int:
        return len(self._filling)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens without KV, of waiting reservations and local prefills."""
        pending = [*self._waiting.values(), *(r for r in self._filling.values() if r.local)]
        return sum(reservation.sequence.num_tokens - reservation.sequence.num_computed for reservation in pending)

    @property
    def can_step(self) -> bool:
        """A step would compute something."""
        return any(self._wanting()) or any(map(self._wants_chunk, self._filling.values()))

    def open(self, sequence: Sequence, *, local: bool) -> Reservation:
        """Queues a new reservation.

        Raises:
            InvalidArgument: its tokens can never fit.
            ResourceExhausted: too many are waiting.
        """
        stopping = sequence.request.stopping
        longest = sequence.request.num_prompt_tokens + stopping.max_tokens
        if self._blocks_for(longest) > self.pool.num_blocks or self._blocks_to_open(sequence) > self.pool.num_blocks:
            capacity = self.pool.num_blocks * self.pool.block_size
            raise InvalidArgument(
                f"prompt and max_tokens make {longest} tokens, this decode worker's KV cache holds {capacity}; "
                "ask for fewer tokens or raise num_blocks",
                field="stopping.max_tokens",
            )
        if len(self._waiting) >= self.max_waiting:
            raise ResourceExhausted(
                f"{self.max_waiting} reservations are waiting at this decode worker (max_waiting_requests)"
            )
        now = self.clock()
        most_tokens = min(longest, self.context_length)
        wait_until_s = now + self.reservation_wait_s
        reservation = Reservation(next(self._ids), sequence, local, now, now, wait_until_s, most_tokens)
        # The tokens beyond the prompt were put out by a worker that is gone.
        reservation.recomputed = sequence.num_output_tokens > 0
        self.reservations[reservation.id] = reservation
        self._wait(reservation)
        return reservation

    def retry(self, reservation: Reservation, attempt: int, *, local: bool) -> bool:
        """Gives up `attempt`; the next is minted at once if blocks are still held, else when they can be had.

        Returns whether anything changed: False when a newer attempt exists or the sequence runs.
        """
        if attempt != reservation.attempt or reservation.state not in (State.FILLING, State.LOST):
            return False
        self._filling.pop(reservation.id, None)
        if local or reservation.local:
            # The blocks are chosen anew: what may be reused from the prefix cache differs, and even a prompt that has
            # been computed here has to be begun again, since its first token is lost with the attempt.
            self._return_blocks(reservation)
            reservation.local = local
        reservation.state = State.WAITING
        reservation.queued_s = self.clock()
        reservation.wait_until_s = reservation.queued_s + self.reservation_wait_s
        self._wait(reservation)
        # A reservation that holds blocks already, or held them before younger ones came, does not queue behind them.
        self._waiting.move_to_end(reservation.id, last=False)
        return True

    def lose(self, reservation: Reservation) -> None:
        """The pair that filled it broke: it keeps its blocks and waits for `retry`."""
        del self._filling[reservation.id]
        reservation.state = State.LOST

    def schedule(self) -> Plan:
        """Decides one step. The caller computes it and then calls `commit`, `end` and `advance`."""
        failed = self._expire()
        decoding = list(self._wanting())
        preempted = self._grow(decoding)
        if preempted:
            decoding = [reservation for reservation in decoding if reservation.state is State.RUNNING]
        reserved = self._admit()
        local = [reservation.sequence for reservation in filter(self._wants_chunk, self._filling.values())]
        chunks = plan_chunks(local, max_batch_tokens=self.max_batch_tokens, block_size=self.pool.block_size)
        return Plan(reserved, preempted, failed, chunks, decoding)

    def launched(self, decoding: list[Reservation]) -> None:
        """A step that computes their next tokens is on its way."""
        for reservation in decoding:
            reservation.next_position += 1

    def commit(self, reservation: Reservation, first_token: int) -> None:
        """All KV of its tokens is here: publishes the prefix and joins the batch."""
        sequence = reservation.sequence
        del self._filling[reservation.id]
        sequence.num_computed = reservation.next_position = sequence.num_tokens
        self.prefix.publish(sequence, 0)
        sequence.token_ids.append(first_token)
        reservation.state = State.RUNNING
        reservation.committed_s = self.clock()
        reservation.slot = self._free_slots.pop()
        self._running[reservation.id] = reservation

    def advance(self, reservation: Reservation, token: int) -> None:
        """The last token's KV is written and the next token is drawn."""
        sequence = reservation.sequence
        sequence.num_computed += 1
        if sequence.num_computed % self.pool.block_size == 0:
            self.prefix.publish(sequence, sequence.num_computed - 1)
        sequence.token_ids.append(token)

    def end(self, reservation: Reservation) -> None:
        """Forgets a reservation in whatever state; its blocks are free at once."""
        if reservation.state is State.ENDED:
            return
        self._leave(reservation)
        reservation.state = State.ENDED
        del self.reservations[reservation.id]

    def check(self) -> None:
        """Proves that exactly the reservations' blocks are held."""
        self.pool.check([reservation.sequence.block_table for reservation in self.reservations.values()])
        assert len(self._free_slots) + len(self._running) == self.max_num_seqs, "slots and running sequences differ"

    def num_prompt_blocks(self, reservation: Reservation) -> int:
        """Blocks that a commit must have filled."""
        return self._blocks_for(reservation.sequence.num_tokens)

    def _expire(self) -> list[tuple[Reservation, PdserveError]]:
        now = self.clock()
        failed: list[tuple[Reservation, PdserveError]] = []
        if now < self._next_expiry_s:
            return failed
        for reservation in self.reservations.values():
            if reservation.sequence.request.deadline_s <= now:
                failed.append((reservation, DeadlineExceeded(f"the deadline passed while {reservation.state.value}")))
            elif reservation.state is State.WAITING and reservation.wait_until_s <= now:
                waited = f"no KV blocks came free within {self.reservation_wait_s:g} s (reservation_wait_s)"
                failed.append((reservation, ResourceExhausted(waited)))
        for reservation, _ in failed:
            self.end(reservation)
        self._next_expiry_s = min(map(_expiry_s, self.reservations.values()), default=float("inf"))
        return failed

    def _wait(self, reservation: Reservation) -> None:
        self._waiting[reservation.id] = reservation
        self._next_expiry_s = min(self._next_expiry_s, _expiry_s(reservation))

    def _admit(self) -> list[Reservation]:
        reserved = []
        while self._waiting and len(self._running) + len(self._filling) < self.max_num_seqs:
            reservation = next(iter(self._waiting.values()))
            if not reservation.sequence.block_table and not self._reserve(reservation):
                break
            self._waiting.popitem(last=False)
            reservation.begin_attempt()
            self._filling[reservation.id] = reservation
            reserved.append(reservation)
        return reserved

    def _reserve(self, reservation: Reservation) -> bool:
        sequence = reservation.sequence
        self.prefix.hash(sequence)
        cached = self.pool.match(sequence.block_hashes)
        if reservation.local:
            # The last token is computed here, since its logits draw the next one.
            cached = cached[: (sequence.num_tokens - 1) // self.pool.block_size]
            if sequence.request.num_prompt_logprobs is not None:
                cached = []
        self.pool.pin(cached)
        needed = self._blocks_to_open(sequence) - len(cached)
        if needed + len(self._running) > self.pool.num_free:
            self.pool.free(cached)
            return False
        sequence.block_table = cached + self.pool.allocate(needed)
        reservation.num_cached_blocks = len(cached)
        if reservation.local:
            sequence.num_computed = reservation.num_local_cached_tokens = len(cached) * self.pool.block_size
        return True

    def _wanting(self) -> Iterator[Reservation]:
        """Those whose tokens on their way, at most as many as they may have, still leave one to compute."""
        return (one for one in self._running.values() if one.next_position + 1 < one.most_tokens)

    def _grow(self, decoding: list[Reservation]) -> list[Reservation]:
        """A block for each whose next position lies beyond its table; oldest first. Returns whom that preempted."""
        preempted: list[Reservation] = []
        block_size = self.pool.block_size
        for reservation in decoding:
            block_table = reservation.sequence.block_table
            if reservation.next_position < len(block_table) * block_size:
                continue
            while reservation.state is State.RUNNING and reservation.next_position >= len(block_table) * block_size:
                if self.pool.num_free:
                    block_table += self.pool.allocate(1)
                else:
                    preempted.append(self._preempt_youngest())
        return preempted

    def _wants_chunk(self, reservation: Reservation) -> bool:
        """It is computed here, and not all of it has been launched yet; afterwards it waits for its first token."""
        return reservation.local and not reservation.sequence.prefilled

    def _preempt_youngest(self) -> Reservation:
        youngest = max(self._running.values(), key=lambda reservation: reservation.id)
        self._leave(youngest)
        youngest.state = State.LOST
        youngest.recomputed = True
        self.num_preemptions += 1
        return youngest

    def _leave(self, reservation: Reservation) -> None:
        """Takes it off every list and returns its blocks."""
        self._waiting.pop(reservation.id, None)
        self._filling.pop(reservation.id, None)
        if self._running.pop(reservation.id, None):
            self._free_slots.append(reservation.slot)
        self._return_blocks(reservation)

    def _return_blocks(self, reservation: Reservation) -> None:
        sequence = reservation.sequence
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        reservation.num_cached_blocks = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _blocks_to_open(self, sequence: Sequence) -> int:
        return self._blocks_for(sequence.num_tokens) + 1


def _expiry_s(reservation: Reservation) -> float:
    deadline_s = reservation.sequence.request.deadline_s
    return min(deadline_s, reservation.wait_until_s) if reservation.state is State.WAITING else deadline_s
