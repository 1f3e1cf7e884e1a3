"""What was promised for a soak, and what was measured: one row a promise."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.fault_cells import DETECT_MS
from benchmarks.soak_clients import Asked, Fate
from benchmarks.soak_figures import MAX_GROWTH, Points, Start, growth
from benchmarks.soak_freed import Freed
from benchmarks.soak_strikes import Strike

# How much later than undisturbed the next token may come.
LATER_MS = {"kill": 1500, "stop": 4000, "cut": 4000}
FREED_MS = 100
# A request is disturbed by what was struck in its life, or shortly before.
AFTERMATH_S = 10.0
NOTICE_S = 10.0


class Row(NamedTuple):
    """`limit` None: nothing was promised, it is told."""

    figure: str
    measured: float | None
    limit: float | None = None

    @property
    def is_kept(self) -> bool:
        return self.limit is None or self.measured is None or self.measured <= self.limit


class Noticed(NamedTuple):
    """A router has logged that a worker is unreachable."""

    router: str
    worker: str
    at_s: float


def noticed(router: str, log: Iterable[str]) -> list[Noticed]:
    """From the lines that a router with `log_format` json has written."""
    found = []
    for line in log:
        if '"worker is unreachable' in line:
            record = json.loads(line)
            at_s = datetime.datetime.fromisoformat(record["time"]).timestamp()
            found.append(Noticed(router, record["worker"], at_s))
    return found


def requests(asked: Sequence[Asked], strikes: Sequence[Strike]) -> list[Row]:
    """What became of all of them."""
    counts = Counter(one.fate for one in asked)
    num_routers = sum(strike.role == "router" and strike.kind in ("kill", "reset") for strike in strikes)
    return [
        Row("requests", len(asked)),
        Row("with exactly the tokens of an undisturbed one", counts[Fate.EXACT]),
        Row("left by their client", counts[Fate.LEFT]),
        Row("turned away by a router that ends, and asked again", counts[Fate.TURNED_AWAY]),
        Row("went on at another decode worker", sum(one.num_resumptions > 0 for one in asked)),
        Row("lost with their own router", counts[Fate.LOST_WITH_ROUTER], None if num_routers else 0),
        Row("lost", counts[Fate.LOST], 0),
        Row("with other tokens", counts[Fate.WRONG], 0),
    ]


def detection(strikes: Sequence[Strike], told: Sequence[Noticed], routers: Sequence[str]) -> list[Row]:
    """Until the last of the routers that were there had noticed; never is infinitely late."""
    rows = []
    gone_ms = [(strike.gone_s - strike.at_s) * 1e3 for strike in strikes if strike.gone_s and strike.role != "router"]
    if gone_ms:
        # Nobody can notice much earlier: its connections are closed as it ends.
        rows.append(Row("a killed worker's process has ended, ms, median", statistics.median(gone_ms)))
        rows.append(Row(f"a killed worker's process has ended, ms, the latest of {len(gone_ms)}", max(gone_ms)))
    for kind in ("kill", "stop", "cut"):
        taken_ms = []
        for strike in strikes:
            if strike.kind != kind or strike.role == "router":
                continue
            for router in routers:
                if _was_there(router, strike, strikes):
                    times = [one.at_s for one in told if (one.router, one.worker) == (router, strike.address)]
                    after = [at_s for at_s in times if strike.at_s <= at_s <= strike.at_s + NOTICE_S]
                    taken_ms.append((min(after, default=math.inf) - strike.at_s) * 1e3)
        if taken_ms:
            rows.append(Row(f"a {kind} is noticed, ms, median", statistics.median(taken_ms)))
            rows.append(Row(f"a {kind} is noticed, ms, the latest of {len(taken_ms)}", max(taken_ms), DETECT_MS[kind]))
    return rows


def failover(asked: Sequence[Asked], strikes: Sequence[Strike]) -> list[Row]:
    """How much later the next token comes for those that were struck: that go on at another decode worker, or wait for
    their first token while a prefill worker is struck (half of these are at the other one)."""
    served = [one for one in asked if one.fate in (Fate.EXACT, Fate.WRONG)]
    calm = [one.longest_wait_s() for one in served if not any(_overlap(one, strike) for strike in strikes)]
    if len(calm) < 2:
        return []
    usual_s = statistics.median(calm)
    rows = [Row("the longest wait for a token of an undisturbed request, ms, median", usual_s * 1e3)]
    for kind, limit_ms in LATER_MS.items():
        for role in ("prefill", "decode"):
            hit = [
                one.longest_wait_s(strike.at_s) - usual_s
                for strike in strikes
                if (strike.kind, strike.role) == (kind, role)
                for one in served
                if one.began_s <= strike.at_s <= one.ended_s and _was_hit(one, strike)
            ]
            if len(hit) > 1:
                p99_ms = statistics.quantiles(hit, n=100, method="inclusive")[-1] * 1e3
                rows.append(Row(f"so much later after a {kind} of {role}, ms, p99 of {len(hit)}", p99_ms, limit_ms))
    return rows


def freed(left: Freed) -> list[Row]:
    """Within 100 ms or a chunk, whichever is longer."""
    figure = f"blocks of a left request are free, ms, the latest of {len(left.taken_ms)}"
    return [Row(figure, max(left.taken_ms), round(max(FREED_MS, left.chunk_ms)))]


def resources(taken: Mapping[str, Mapping[Start, Points]]) -> list[Row]:
    """Of whoever was there for long enough, the one that grew most."""
    rows = []
    for what, limit in MAX_GROWTH.items():
        grown = growth(taken[what])
        if grown:
            worst = max(grown, key=lambda start: grown[start])
            rows.append(Row(f"growth after warm-up of {what}, of {worst.name}", grown[worst], limit))
    return rows


def _was_there(router: str, strike: Strike, strikes: Sequence[Strike]) -> bool:
    return not any(
        other.address == router
        and other.at_s <= strike.at_s + NOTICE_S
        and (other.healed_s is None or other.healed_s >= strike.at_s)
        for other in strikes
    )


def _overlap(asked: Asked, strike: Strike) -> bool:
    ended_s = math.inf if strike.healed_s is None else strike.healed_s
    return asked.began_s <= ended_s + AFTERMATH_S and asked.ended_s >= strike.at_s


def _was_hit(asked: Asked, strike: Strike) -> bool:
    if strike.role == "decode":
        return asked.num_resumptions > 0
    return not asked.arrivals_s or asked.arrivals_s[0] > strike.at_s
