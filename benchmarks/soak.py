"""`make soak MINUTES=n`: mixed traffic under random faults, what was promised, and what the processes took.

64 clients at two routers, two prefill and two decode workers. Every ten seconds one process is struck
(`benchmarks.soak_strikes`): killed, stopped, told to end, its link cut or its connections reset. `ARGS=kills` kills a
prefill or decode worker each time, and nothing else. Afterwards no request may be lost but those of a router that was
struck itself, each has the tokens of an undisturbed one, no worker holds a block, everybody serves, and no process has
grown. A broken promise is a line of its own, and exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence

import grpc
import uvloop

from benchmarks import soak_verdict
from benchmarks.report import Report
from benchmarks.soak_clients import NUM_KINDS, Clients, Door, Fate
from benchmarks.soak_figures import Figures
from benchmarks.soak_freed import freed
from benchmarks.soak_strikes import KILLS, MIXED, OF_THE_NETWORK, Blow, Striker
from benchmarks.soak_verdict import Row
from pdserve.v1 import types_pb2
from tests.support import network
from tests.support.processes import Cluster, running_cluster
from tests.support.streams import wait_until_free, wait_until_listed

NUM_CLIENTS = 64
SCENARIOS = {"mixed": MIXED, "kills": KILLS}
MAX_LINES = 50


class Soaked:
    """One run, and what is to be said of it."""

    def __init__(self, cluster: Cluster, blows: dict[Blow, int], *, num_clients: int = NUM_CLIENTS) -> None:
        self._cluster = cluster
        self._num_clients = num_clients
        self._doors = [Door(router) for router in cluster.routers]
        self._clients = Clients(self._doors)
        self._striker = Striker(cluster, self._doors, blows, random.Random(1))
        self.figures = Figures(cluster, self._doors)
        self.broken: list[str] = []

    async def run(self, minutes: float) -> None:
        """Traffic and faults for so long, then what has to hold afterwards."""
        await self._clients.learn()
        begun_s = time.time()
        asking = [asyncio.create_task(self._clients.run(number)) for number in range(self._num_clients)]
        beside = [asyncio.create_task(one.run()) for one in (self._striker, self.figures)]
        ended, _ = await asyncio.wait([*beside, *asking], timeout=minutes * 60, return_when=asyncio.FIRST_COMPLETED)
        self._clients.is_over = True
        beside[0].cancel()
        await asyncio.gather(*asking)
        await self._striker.healed()
        beside[1].cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for one in ended:
            # None of them ends by itself.
            one.result()
        self.took_s = time.time() - begun_s
        self.broken += self._striker.broken
        await self._check_afterwards()

    async def rows(self) -> list[Row]:
        """Every figure beside its limit. Measures how soon a left request is freed, which needs everybody idle."""
        asked, strikes = self._clients.asked, self._striker.strikes
        routers = {router.address: router.log.read_text().splitlines() for router in self._cluster.routers}
        told = [one for address, log in routers.items() for one in soak_verdict.noticed(address, log)]
        left = await freed(self._doors[0], self._cluster.workers)
        return [
            *soak_verdict.requests(asked, strikes),
            *soak_verdict.detection(strikes, told, list(routers)),
            *soak_verdict.failover(asked, strikes),
            *soak_verdict.freed(left),
            *soak_verdict.resources(self.figures.taken),
        ]

    @property
    def strikes(self) -> list[soak_verdict.Strike]:
        return self._striker.strikes

    @property
    def losses(self) -> list[str]:
        """What was wrong with each request that was lost or has other tokens."""
        bad = [one for one in self._clients.asked if one.fate in (Fate.LOST, Fate.WRONG)]
        return [f"{one.fate.value}: {one.detail}" for one in bad]

    async def close(self) -> None:
        for door in self._doors:
            await door.channel.close()

    async def _check_afterwards(self) -> None:
        await asyncio.to_thread(self._cluster.restore)
        try:
            for router in self._cluster.routers:
                serving = types_pb2.WORKER_STATE_SERVING
                await asyncio.to_thread(wait_until_listed, router, self._cluster.workers, serving)
            await asyncio.to_thread(wait_until_free, self._cluster.workers)
        except (AssertionError, grpc.RpcError) as error:
            self.broken.append(f"blocks are held, or somebody does not serve: {error!r}")
        for number, door in enumerate(self._doors):
            canaries = [await self._clients.ask(door, kind) for kind in range(NUM_KINDS)]
            self.broken += [
                f"a canary through router {number} was {one.fate.value}: {one.detail}"
                for one in canaries
                if one.fate is not Fate.EXACT
            ]


async def soak(cluster: Cluster, minutes: float, scenario: str, report: Report, blows: dict[Blow, int]) -> list[str]:
    """Fills the report; the promises that were broken."""
    soaked = Soaked(cluster, blows)
    await soaked.run(minutes)
    rows = await soaked.rows()
    await soaked.close()
    for row in rows:
        kept = "" if row.limit is None else "yes" if row.is_kept else "NO"
        measured = None if row.measured is None else round(row.measured, 1)
        report.add(figure=row.figure, measured=measured, limit=row.limit, kept=kept)
    report.notes.append(f"{minutes:g} minutes of {scenario}, {NUM_CLIENTS} clients. Struck: {_told(soaked.strikes)}.")
    soaked.figures.plot(str(report.path("png")), [strike.at_s for strike in soaked.strikes])
    missed = [f"{row.figure}: {row.measured:,.1f}, promised {row.limit:g}" for row in rows if not row.is_kept]
    return soaked.broken + missed + soaked.losses


def _told(strikes: Sequence[soak_verdict.Strike]) -> str:
    names = [f"{strike.kind} of {strike.role}" for strike in strikes]
    return ", ".join(f"{names.count(name)} × {name}" for name in sorted(set(names))) or "nobody"


def main(minutes: float, scenario: str = "mixed") -> int:
    """The exit code: 1 when a promise was broken."""
    if scenario not in SCENARIOS:
        print(f"{scenario!r} is none of {', '.join(SCENARIOS)}")
        return 2
    report = Report("soak" if scenario == "mixed" else f"soak-{scenario}", f"Traffic under random faults: {scenario}")
    blows, obstacle = SCENARIOS[scenario], network.obstacle()
    needs_network = any(kind in OF_THE_NETWORK for kind, _ in blows)
    if needs_network and obstacle:
        report.notes.append(f"Without faults of the network: {obstacle}.")
        blows = {blow: weight for blow, weight in blows.items() if blow[0] not in OF_THE_NETWORK}
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network.private_network(6)) if needs_network and not obstacle else ()
        cluster = stack.enter_context(
            running_cluster(
                num_routers=2,
                worker_args=["--num-blocks", "2048"],
                # Prefill workers are to be needed; and the log says when a worker was missed.
                router_args=["--local-prefill", "never", "--log-format", "json", "--no-access-log"],
                hosts=hosts,
            )
        )
        broken = uvloop.run(soak(cluster, minutes, scenario, report, blows))
    report.notes.append(f"Broken: {len(broken)} promises." if broken else "Every promise was kept.")
    report.save()
    for line in broken[:MAX_LINES]:
        print(f"BROKEN  {line}")
    print(report.notes[-1])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0, *sys.argv[2:3]))
