"""What a soak strikes, and what it makes of what it saw."""

import json
import math
import random
from array import array
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks import soak_verdict
from benchmarks.soak import SCENARIOS, Soaked
from benchmarks.soak_clients import Asked, Fate
from benchmarks.soak_figures import MEMORY, WARM_UP_S, Start, growth
from benchmarks.soak_freed import Freed
from benchmarks.soak_strikes import KILLS, MIXED, Strike, Striker
from benchmarks.soak_verdict import Noticed
from tests.support.processes import Cluster, running_cluster


def _asked(began_s: float, *arrivals_s: float, fate: Fate = Fate.EXACT, num_resumptions: int = 0) -> Asked:
    return Asked(0, began_s, arrivals_s[-1], array("d", arrivals_s), num_resumptions, fate)


def _measured(rows, beginning: str) -> float | None:
    return next(row.measured for row in rows if row.figure.startswith(beginning))


@pytest.fixture
def striker() -> Striker:
    services = [SimpleNamespace(address=f"{role}-{number}") for role in ("r", "p", "d") for number in range(2)]
    return Striker(Cluster(services[:2], services[2:4], services[4:]), [], MIXED, random.Random(0))


def test_every_blow_is_dealt_as_often_as_the_scenario_says(striker):
    dealt = Counter(striker.choose()[0] for _ in range(2 * sum(MIXED.values())))
    assert dealt == {blow: 2 * count for blow, count in MIXED.items()}


def test_who_is_alone_in_its_role_is_spared(striker):
    striker._away = {"d-0", "r-1"}
    assert {striker.choose()[0][1] for _ in range(5)} == {"prefill"}
    striker._away.add("p-0")
    assert striker.choose() is None


def test_the_kills_of_the_promise_are_of_workers_alone():
    assert set(KILLS) == {("kill", "prefill"), ("kill", "decode")}


def test_a_wait_counts_from_the_strike_on():
    asked = _asked(0.0, 1.0, 8.0, 9.0)
    assert (asked.longest_wait_s(), asked.longest_wait_s(6.0), asked.longest_wait_s(20.0)) == (7.0, 2.0, 0)


def test_a_request_that_was_lost_without_its_router_is_a_broken_promise():
    asked = [_asked(0.0, 1.0, fate=fate) for fate in (Fate.EXACT, Fate.LOST, Fate.LEFT, Fate.LOST_WITH_ROUTER)]
    router_killed = [Strike("kill", "router", "r-0", 0.0, 1.0)]
    assert [row.figure for row in soak_verdict.requests(asked, router_killed) if not row.is_kept] == ["lost"]
    missed = [row.figure for row in soak_verdict.requests(asked, []) if not row.is_kept]
    assert missed == ["lost with their own router", "lost"]


def test_a_kill_is_noticed_when_the_last_router_that_was_there_has():
    kill = Strike("kill", "decode", "d-0", 100.0, 108.0)
    told = [Noticed("r-0", "d-0", 100.05), Noticed("r-1", "d-0", 100.1), Noticed("r-1", "d-1", 103.0)]
    assert soak_verdict.detection([kill], told, ["r-0", "r-1"])[-1].measured == pytest.approx(100.0)
    assert soak_verdict.detection([kill], told[:1], ["r-0", "r-1"])[-1].measured == math.inf
    kill.gone_s = 100.08
    assert soak_verdict.detection([kill], told, ["r-0"])[0].measured == pytest.approx(80.0)
    away = Strike("restart", "router", "r-1", 95.0, 104.0)
    assert soak_verdict.detection([kill, away], told[:1], ["r-0", "r-1"])[-1].measured == pytest.approx(50.0)


def test_what_a_router_logs_of_a_lost_worker_is_found_among_its_lines():
    line = {"time": "2026-01-01T00:00:01.250+00:00", "message": "worker is unreachable: gone", "worker": "d-0"}
    assert soak_verdict.noticed("r-0", ["Traceback", json.dumps(line)]) == [Noticed("r-0", "d-0", 1767225601.25)]


def test_the_delay_of_who_was_struck_is_against_who_was_not():
    kill = Strike("kill", "decode", "d-0", 100.0, 108.0)
    calm = [_asked(0.0, 0.5, 1.0)] * 3
    hit = [_asked(99.0, 99.9, 101.5, num_resumptions=1)] * 2
    rows = soak_verdict.failover([*calm, *hit, _asked(99.0, 107.0)], [kill])
    assert _measured(rows, "so much later after a kill of decode") == pytest.approx(1000.0)


def test_a_left_request_may_keep_its_blocks_for_as_long_as_a_chunk_takes():
    kept = [soak_verdict.freed(Freed([20.0, 120.0], chunk_ms))[0].is_kept for chunk_ms in (10.0, 130.0)]
    assert kept == [False, True]


def test_growth_is_told_of_starts_that_were_there_for_long_enough():
    old = [(float(at_s), 100.0 if at_s < WARM_UP_S + 20 else 150.0) for at_s in range(100)]
    taken = {Start("router-0", 1): old, Start("decode-0", 2): old[:40]}
    assert growth(taken) == {Start("router-0", 1): 50.0}
    [row] = soak_verdict.resources({MEMORY: taken, "descriptors": {}, "threads": {}})
    assert not row.is_kept


@pytest.mark.slow
async def test_kills_of_workers_under_load_lose_no_request_and_no_token():
    with running_cluster(num_routers=2, router_args=["--local-prefill", "never", "--log-format", "json"]) as cluster:
        soaked = Soaked(cluster, SCENARIOS["kills"], num_clients=8)
        await soaked.run(0.3)
        # How long things took is nothing to hold against a machine that does other things as well.
        rows = await soaked.rows()
        await soaked.close()
    assert soaked.broken + soaked.losses == []
    assert _measured(rows, "with exactly the tokens") > 50
    assert soaked.strikes
    assert _measured(rows, "a kill is noticed, ms, the latest") < math.inf
