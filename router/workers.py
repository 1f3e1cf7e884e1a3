"""One worker as this router sees it: who it is, how loaded, whether it may be used. No I/O: `fleet` keeps it true.

  first message of a load stream             WatchLoad says so, or a refusal does
UNREACHABLE ─────────────────────▶ SERVING ──────────────────▶ DRAINING
     ▲                                │                            │
     └────────────────────────────────┴────────────────────────────┘
       the load stream ends, falls silent, or its step counter stands still with work waiting
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from common.errors import Unavailable
from common.load import Load
from router.fit import LinearFit
from router.prefixes import PrefixIndex
from router.ramp import Ramp

# A step counter must stand still for this many steps of the usual length before it means anything.
WEDGED_STEPS = 20
# Load messages that a decode worker's step time is learnt from.
STEPS_REMEMBERED = 32
# A pace that has not been seen for this long counts no more: what made a worker slow may be over, and a worker that
# gets nothing shows nothing.
PACE_FORGOTTEN_S = 60.0


# Model fingerprint and protocol version.
Kind = tuple[str, int]


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(Enum):
    SERVING = "serving"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"


class Identity(NamedTuple):
    """What a worker says about itself; the fields mean what WorkerIdentity says."""

    instance_id: str
    boot_id: str
    model_id: str
    model_fingerprint: str
    protocol_version: int
    context_length: int
    vocab_size: int
    block_size: int
    num_total_blocks: int
    max_num_seqs: int
    eos_token_ids: tuple[int, ...]
    num_spare_blocks: int = 0

    @property
    def kind(self) -> Kind:
        """Workers whose kinds differ never share a request."""
        return self.model_fingerprint, self.protocol_version

    @property
    def num_total_tokens(self) -> int:
        return self.num_total_blocks * self.block_size


class Cut(NamedTuple):
    """How a worker cuts a prompt into blocks and hashes them."""

    model_fingerprint: str
    block_size: int


LossCallback = Callable[[Unavailable], None]


class Worker:
    """Mutable, owned by the event loop. What is known of a worker that was lost stays readable."""

    def __init__(self, role: Role, address: str, *, wedged_after_s: float) -> None:
        self.role = role
        self.address = address
        self.state = WorkerState.UNREACHABLE
        # Why it is unreachable.
        self.reason = "not met yet"
        self.identity: Identity | None = None
        self.load = Load()
        self.num_pairs = 0
        # Routers that watch it, this one among them.
        self.num_watchers = 0
        # Drawn and computed there since it started.
        self.num_output_tokens = 0
        self.num_prompt_tokens = 0
        # When it last told of its load.
        self.heard_s: float | None = None
        # Grows each time the worker is met anew.
        self.generation = 0
        self.prefixes = PrefixIndex(0)
        self._is_leaving = False
        self._ramp = Ramp()
        self._wedged_after_s = wedged_after_s
        self._stepped_s = 0.0
        # Of a decode worker: milliseconds of a step against sequences in its batch.
        self._step_ms = LinearFit(STEPS_REMEMBERED)
        # When it last showed its pace.
        self._paced_s: float | None = None
        self._on_loss: dict[object, LossCallback] = {}
        # Called when a request of this router has ended there.
        self.on_room: Callable[[], None] = lambda: None
        # Called when anything that placement reads may have changed.
        self.on_reckoned: Callable[[], None] = lambda: None
        # What this router's requests take there, and of that, what the worker has not been seen to count yet.
        self._num_seqs = 0
        self._num_blocks = 0
        self._num_uncounted = 0
        self._num_uncounted_blocks = 0
        self._num_tokens = 0
        self._reckon()

    def _reckon(self) -> None:
        """What placement reads of every worker for every request: reckoned when something changes, not when read."""
        who, load = self.identity, self.load
        # It takes new work of this router.
        self.is_serving = self.state is WorkerState.SERVING and not self._is_leaving
        # Workers whose kinds differ never share a request.
        self.kind = who.kind if who else None
        self.cut = Cut(who.model_fingerprint, who.block_size) if who else Cut("", 1)
        self.block_size = self.cut.block_size
        self.num_spare_blocks = who.num_spare_blocks if who else 0
        # Sequences running, reserved or waiting there, and of those, the ones whose KV is not there yet.
        self.num_seqs = max(self._num_seqs, load.num_running + load.num_reserved + load.num_waiting)
        self.num_coming = self._num_uncounted + load.num_reserved + load.num_waiting
        # A decode worker that is to get nothing new, by what it last told. It tells anew at least every 500 ms, or is
        # lost and then not asked at all: no pressure outlives the news of it.
        most = self._ramp.most
        self.is_pressed = bool(load.pressure) or (most is not None and self.num_coming >= most)
        # Blocks that a new request may have: one for each running sequence to grow is kept.
        num_total = who.num_total_blocks if who else 0
        told = load.num_free_blocks - self._num_uncounted_blocks
        self.num_free_blocks = min(told, num_total - self._num_blocks) - load.num_running
        # A sequence more would not have to wait for a place in the batch.
        self.has_place = who is not None and self.num_seqs < who.max_num_seqs and not load.num_waiting
        # Prompt tokens waiting or being computed there.
        self.num_waiting_tokens = max(self._num_tokens, load.num_waiting_tokens)
        # Milliseconds: of the step that a sequence more would be in (decode), of a prompt token (prefill). 0: unknown.
        self.pace = self._pace_ms()
        if self.role is Role.PREFILL:
            # Tokens to get through before anything new.
            self.work: float = self.num_waiting_tokens
        else:
            # How full it is, in sequences and in blocks: from 1 to 3, or more when it has promised more than it has.
            self.work = 1 + self.num_seqs / who.max_num_seqs + 1 - self.num_free_blocks / num_total if who else 0.0
        self.on_reckoned()

    def _pace_ms(self) -> float:
        if self.role is Role.PREFILL:
            return 0.0 if self._paced_s is None else self.load.token_ms
        return self._step_ms.at(self.num_seqs + 1) if self._step_ms.num_observed else 0.0

    def _learn_pace(self, load: Load, now_s: float) -> None:
        """From a message of the load stream that shows steps with work."""
        if load.step_counter != self.load.step_counter and load.num_running:
            self._paced_s = now_s
            if self.role is Role.DECODE and load.step_ms:
                self._step_ms.add(load.num_running, load.step_ms)
        elif self._paced_s is not None and now_s - self._paced_s >= PACE_FORGOTTEN_S:
            self._forget_pace()

    def _forget_pace(self) -> None:
        self._paced_s = None
        self._step_ms = LinearFit(STEPS_REMEMBERED)

    def __repr__(self) -> str:
        return f"{self.role.value} {self.address}"

    @property
    def has_requests(self) -> bool:
        """Of this router, there or on their way."""
        return self._num_seqs > 0

    @property
    def instance_id(self) -> str:
        return self.identity.instance_id if self.identity else ""

    def meet(self, identity: Identity, now_s: float) -> None:
        """The first message of a new load stream."""
        if self.identity is None or identity.boot_id != self.identity.boot_id:
            self.prefixes = PrefixIndex(identity.num_total_blocks)
            self._forget_pace()
            # What it tells of its pace is news to this router.
            self._paced_s = now_s
        self.identity = identity
        self.generation += 1
        self._stepped_s = now_s
        self._reckon()

    def hear(self, state: WorkerState, load: Load, num_pairs: int, now_s: float) -> None:
        """A message of the load stream, SERVING or DRAINING."""
        assert self.identity is not None, "a worker is met before it is heard"
        self.heard_s = now_s
        has_work = load.num_running or load.num_reserved or load.num_waiting
        if load.step_counter != self.load.step_counter or not has_work:
            self._stepped_s = now_s
        self._learn_pace(load, now_s)
        self.load, self.num_pairs = load, num_pairs
        self._reckon()
        self._ramp.hear(load, num_coming=self.num_coming, max_num_seqs=self.identity.max_num_seqs)
        stood_still_s = now_s - self._stepped_s
        if stood_still_s >= max(self._wedged_after_s, WEDGED_STEPS * load.step_ms / 1e3):
            self.lose(f"its step counter has stood still for {stood_still_s:.1f} s with work waiting")
        else:
            self.state, self.reason = state, ""
            self._reckon()

    def set_leaving(self, is_leaving: bool) -> None:
        """Whether this router watches it for not much longer, and sends it nothing new."""
        self._is_leaving = is_leaving
        self._reckon()

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    def drain(self) -> None:
        """It has refused or handed over a request of this router."""
        if self.state is WorkerState.SERVING:
            self.state = WorkerState.DRAINING
            self._reckon()

    def lose(self, reason: str) -> None:
        """It cannot be used; whoever has work there is told."""
        self.reason = reason
        if self.state is WorkerState.UNREACHABLE:
            return
        self.state = WorkerState.UNREACHABLE
        self._reckon()
        for callback in list(self._on_loss.values()):
            callback(Unavailable(f"{self} was lost: {reason}", reason="WORKER_LOST"))

    @contextlib.contextmanager
    def loss_told_to(self, callback: LossCallback) -> Iterator[None]:
        """Calls `callback` if the worker is lost meanwhile."""
        key = object()
        self._on_loss[key] = callback
        try:
            yield
        finally:
            del self._on_loss[key]

    def take(self, *, num_blocks: int = 0, num_tokens: int = 0) -> Share:
        """A request goes there. Its share counts at once, before the worker tells of it."""
        self._num_seqs += 1
        self._num_uncounted += 1
        self._num_blocks += num_blocks
        self._num_uncounted_blocks += num_blocks
        self._num_tokens += num_tokens
        self._reckon()
        return Share(self, num_blocks, num_tokens)

    def count(self, share: Share) -> None:
        self._num_uncounted -= 1
        self._num_uncounted_blocks -= share.num_blocks
        self._reckon()

    def move_tokens(self, num_tokens: int) -> None:
        """So many more have to be computed there, of what this router's requests take."""
        self._num_tokens += num_tokens
        self._reckon()

    def give_back(self, share: Share) -> None:
        self._num_seqs -= 1
        self._num_blocks -= share.num_blocks
        self._num_tokens -= share.num_tokens
        self._reckon()


class Share:
    """What one request takes of a worker, until `end`."""

    def __init__(self, worker: Worker, num_blocks: int, num_tokens: int) -> None:
        self.worker = worker
        self.num_blocks = num_blocks
        self.num_tokens = num_tokens
        self._is_counted = False
        self._has_ended = False

    def counted(self) -> None:
        """The worker counts it in the load that it tells."""
        if not self._is_counted:
            self._is_counted = True
            self.worker.count(self)

    def compute(self, num_tokens: int) -> None:
        """So many of its tokens are to be computed there from now on, in the place of what was said before."""
        self.worker.move_tokens(num_tokens - self.num_tokens)
        self.num_tokens = num_tokens

    def end(self) -> None:
        """Safe to repeat."""
        if not self._has_ended:
            self._has_ended = True
            self.counted()
            self.worker.give_back(self)
            self.worker.on_room()
