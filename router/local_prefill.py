"""Where a prompt is computed: by a prefill worker, or by the decode worker that holds its reservation (LOCAL).

The aim is the least waiting of all users together. A prompt that a prefill worker computes lets its own user wait:

    remote_ms = what waits at the prefill worker + remote(uncached tokens)

and one that decode computes also those whose sequences run there, since a chunk goes between two of their steps:

    local_ms  = what waits to be computed at decode + local(uncached tokens)
                + sequences running × compute(uncached tokens)

`remote`, `local` and `compute` are lines through what this router has measured of its own requests, for each model
apart: from asking decode for an attempt until its first token, less the wait for blocks; and the time that decode says
it has computed. A millisecond counts the same whoever waits it. What KV that arrives costs decode is taken for nothing.

LOCAL has to be better by a tenth. Until all three are measured, prompts go to prefill workers. What the other way takes
is found out by sending it one in EXPLORE_EVERY of those prompts for which that is cheap: the shorter ones while nothing
is known of it, later those for which the two ways differ by less than twice.

A policy: a clock goes in, no I/O.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from common.clock import Clock
from router.fit import LinearFit
from router.placement import Choice, Demand
from router.workers import Kind, Worker

EXPLORE_EVERY = 32
# Of this many requests about, a line is made; of so many at least.
MEMORY = 64
ENOUGH = 8
# LOCAL costs decode what the lines know nothing of.
MARGIN = 0.9
# The ways differ by less than this: which is better may be an error.
NEAR = 2.0
# A way that was not taken for so long is explored again.
STALE_S = 600.0
# What takes longer than so many times as expected counts as this: a pair was made, a worker stood still.
OUTLIER = 4.0
# A crossover in tokens that no prompt reaches.
ALL_PROMPTS = float(2**32 - 1)


class Mode(Enum):
    """What the setting `local_prefill` says."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class Reason(Enum):
    """Why a prompt is computed where it is; the values name it in metrics."""

    # No prefill worker is alive. The others say what was chosen.
    DEGRADED = "degraded"
    SETTING = "setting"
    UNMEASURED = "unmeasured"
    LESS_WAITING = "less_waiting"
    EXPLORING = "exploring"


class Prospect(NamedTuple):
    """What is known of a prompt when it is decided where to compute it."""

    kind: Kind
    # Prompt tokens that decode has not cached, and that the prefill worker has not, as far as this router knows.
    num_local_tokens: int
    num_remote_tokens: int
    # Prompt tokens that decode is to compute before.
    num_waiting_tokens: int = 0
    # In decode's batch.
    num_running: int = 0
    # Until the prefill worker has computed what waits there.
    remote_wait_ms: float = 0.0


def prospect_of(
    demand: Demand, decode: Worker, num_cached_blocks: int, prefill: Choice | None, *, reads_cache: bool
) -> Prospect | None:
    """Of a request at that decode worker, which holds so many blocks of it; None: no prefill worker is alive.

    `reads_cache`: prompt log-probabilities are of positions that have to be computed, whatever is cached.
    """
    if prefill is None or decode.kind is None:
        return None
    worker = prefill.worker
    return Prospect(
        kind=decode.kind,
        num_local_tokens=demand.num_uncached_tokens(decode, num_cached_blocks * reads_cache),
        num_remote_tokens=demand.num_uncached_tokens(worker, prefill.num_cached_blocks * reads_cache),
        num_waiting_tokens=decode.num_waiting_tokens,
        num_running=decode.load.num_running,
        remote_wait_ms=worker.pace * worker.work,
    )


class Way(NamedTuple):
    """Where a prompt is computed, and why. Milliseconds are None while they are not measured."""

    is_local: bool
    reason: Reason
    # Until the first token, and of others' waiting.
    local_ms: float | None = None
    harm_ms: float | None = None
    remote_ms: float | None = None
    # Uncached prompts that are shorter would be LOCAL. 0: none, ALL_PROMPTS: all.
    crossover_tokens: float | None = None

    def __str__(self) -> str:
        times = {"local": self.local_ms, "others' waiting": self.harm_ms, "remote": self.remote_ms}
        told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items() if ms is not None)
        return f"{self.name} ({self.reason.value}; {told or 'nothing is measured'})"

    @property
    def name(self) -> str:
        return "local" if self.is_local else "remote"


class _Lines:
    """Of one model, in milliseconds against tokens."""

    def __init__(self, now_s: float) -> None:
        self.local = LinearFit(MEMORY)
        self.compute = LinearFit(MEMORY)
        self.remote = LinearFit(MEMORY)
        self.local_seen_s = self.remote_seen_s = now_s
        self.num_explorable = 0

    def wait_ms(self, prospect: Prospect) -> float:
        """Until decode has computed what waits there."""
        return self.compute.slope * prospect.num_waiting_tokens

    @property
    def knows_local(self) -> bool:
        return min(self.local.num_observed, self.compute.num_observed) >= ENOUGH

    @property
    def knows_remote(self) -> bool:
        return self.remote.num_observed >= ENOUGH


class LocalPrefill:
    """Decides, and learns from what comes of it."""

    def __init__(self, mode: Mode, clock: Clock) -> None:
        self._mode = mode
        self._clock = clock
        self._lines: dict[Kind, _Lines] = {}

    def choose(self, prospect: Prospect | None) -> Way:
        """For a prompt that is to be computed; None: no prefill worker is alive."""
        way = self.judge(prospect)
        if prospect is None or way.reason not in (Reason.LESS_WAITING, Reason.UNMEASURED):
            return way
        lines = self._lines_of(prospect.kind)
        if not self._is_explorable(lines, prospect, way):
            return way
        lines.num_explorable += 1
        if lines.num_explorable % EXPLORE_EVERY:
            return way
        return way._replace(is_local=not way.is_local, reason=Reason.EXPLORING)

    def judge(self, prospect: Prospect | None) -> Way:
        """What `choose` says when it does not explore. Changes nothing."""
        if prospect is None:
            return Way(True, Reason.DEGRADED)
        lines = self._lines_of(prospect.kind)
        local_ms = harm_ms = remote_ms = None
        if lines.knows_local:
            local_ms = lines.wait_ms(prospect) + lines.local.at(prospect.num_local_tokens)
            harm_ms = prospect.num_running * lines.compute.at(prospect.num_local_tokens)
        if lines.knows_remote:
            remote_ms = prospect.remote_wait_ms + lines.remote.at(prospect.num_remote_tokens)
        if self._mode is not Mode.AUTO:
            return Way(self._mode is Mode.ALWAYS, Reason.SETTING, local_ms, harm_ms, remote_ms)
        if local_ms is None or harm_ms is None or remote_ms is None:
            return Way(False, Reason.UNMEASURED, local_ms, harm_ms, remote_ms)
        is_local = local_ms + harm_ms < MARGIN * remote_ms
        return Way(is_local, Reason.LESS_WAITING, local_ms, harm_ms, remote_ms, _crossover(lines, prospect))

    def first_token(self, prospect: Prospect, *, is_local: bool, seconds: float) -> None:
        """It came so long after the attempt was asked for, the wait for blocks not counted."""
        lines, ms = self._lines_of(prospect.kind), seconds * 1e3
        if is_local:
            lines.local_seen_s = self._clock()
            _learn(lines.local, prospect.num_local_tokens, max(0.0, ms - lines.wait_ms(prospect)))
        else:
            lines.remote_seen_s = self._clock()
            _learn(lines.remote, prospect.num_remote_tokens, max(0.0, ms - prospect.remote_wait_ms))

    def computed(self, kind: Kind, num_tokens: int, ms: float) -> None:
        """A decode worker has computed so many tokens of a prompt, its steps standing still for so long."""
        _learn(self._lines_of(kind).compute, num_tokens, ms)

    def _lines_of(self, kind: Kind) -> _Lines:
        if kind not in self._lines:
            self._lines[kind] = _Lines(self._clock())
        return self._lines[kind]

    def _is_explorable(self, lines: _Lines, prospect: Prospect, way: Way) -> bool:
        """The way not taken is worth a look, and cheap for this prompt."""
        if not lines.knows_remote:
            return False
        if not lines.knows_local:
            return prospect.num_local_tokens <= lines.remote.mean_x
        local_ms, remote_ms = (way.local_ms or 0.0) + (way.harm_ms or 0.0), way.remote_ms or 0.0
        if max(local_ms, remote_ms) <= NEAR * min(local_ms, remote_ms):
            return True
        if way.is_local:
            return self._clock() - lines.remote_seen_s >= STALE_S
        return self._clock() - lines.local_seen_s >= STALE_S and prospect.num_local_tokens <= lines.local.mean_x


def _learn(line: LinearFit, num_tokens: int, ms: float) -> None:
    if line.num_observed >= ENOUGH:
        ms = min(ms, OUTLIER * line.at(num_tokens))
    line.add(num_tokens, ms)


def _crossover(lines: _Lines, prospect: Prospect) -> float:
    """Where MARGIN times the line of remote meets that of local, with what runs and waits for this prompt."""
    lead_ms = MARGIN * (lines.remote.at_zero + prospect.remote_wait_ms)
    lead_ms -= lines.wait_ms(prospect) + lines.local.at_zero + prospect.num_running * lines.compute.at_zero
    closing_ms = lines.local.slope + prospect.num_running * lines.compute.slope - MARGIN * lines.remote.slope
    if lead_ms <= 0:
        return 0.0
    return min(lead_ms / closing_ms, ALL_PROMPTS) if closing_ms > 0 else ALL_PROMPTS
