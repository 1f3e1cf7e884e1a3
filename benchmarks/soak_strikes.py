"""What strikes during a soak: every ten seconds one process, which comes back as it would under a supervisor.

Whoever is alone in its role is spared until the other is back: with two of each, one of a role is away at a time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from benchmarks.soak_clients import Door
from pdserve.v1 import types_pb2
from tests.support.processes import Cluster, Service
from tests.support.streams import wait_until_listed

EVERY_S = 10.0
# The supervisor starts what has ended within this.
RESTART_S = 5.0
AWAY_S = 4.0
EXIT_S = 120.0

# (kind, role), and how often it is in a deck, which is dealt to its end in any order.
# "restart" is SIGTERM, its own end, and a new process.
KILLS = {("kill", "prefill"): 1, ("kill", "decode"): 1}
MIXED = {
    **{(kind, role): 2 for kind in ("kill", "stop", "cut") for role in ("prefill", "decode")},
    **{(kind, role): 1 for kind in ("reset", "restart") for role in ("prefill", "decode", "router")},
    ("kill", "router"): 1,
}
OF_THE_NETWORK = ("cut", "reset")

Blow = tuple[str, str]


@dataclass(eq=False)
class Strike:
    """`gone_s` is when the machine had ended a killed process, `healed_s` when the victim served again."""

    kind: str
    role: str
    address: str
    at_s: float
    healed_s: float | None = None
    gone_s: float | None = None


class Striker:
    """Strikes while `run`; `healed` waits until everybody is back."""

    def __init__(self, cluster: Cluster, doors: Sequence[Door], blows: dict[Blow, int], draw: random.Random) -> None:
        self.strikes: list[Strike] = []
        self.broken: list[str] = []
        self._of_role = {"prefill": cluster.prefills, "decode": cluster.decodes, "router": cluster.routers}
        self._cluster = cluster
        self._doors = {door.service.address: door for door in doors}
        self._blows = blows
        self._deck: list[Blow] = []
        self._draw = draw
        self._away: set[str] = set()
        self._healing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            chosen = self.choose()
            if chosen is not None:
                self._begin(*chosen)

    async def healed(self) -> None:
        await asyncio.gather(*self._healing)

    def choose(self) -> tuple[Blow, Service] | None:
        """Who is next, and what for; None while everybody who is left is needed."""
        if not self._deck:
            self._deck = [blow for blow, count in self._blows.items() for _ in range(count)]
            self._draw.shuffle(self._deck)
        whole = {
            role for role, services in self._of_role.items() if not any(one.address in self._away for one in services)
        }
        blow = next((blow for blow in self._deck if blow[1] in whole), None)
        if blow is None:
            return None
        self._deck.remove(blow)
        return blow, self._draw.choice(self._of_role[blow[1]])

    def _begin(self, blow: Blow, victim: Service) -> None:
        self._away.add(victim.address)
        task = asyncio.create_task(self._strike(*blow, victim))
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)

    async def _strike(self, kind: str, role: str, victim: Service) -> None:
        door = self._doors.get(victim.address)
        if door is not None:
            # Clients stay away from a router that is not ready.
            door.is_open = kind == "reset"
        strike = Strike(kind, role, victim.address, time.time())
        self.strikes.append(strike)
        try:
            await self._deal(strike, victim, door)
            await asyncio.to_thread(victim.wait_ready)
            if door is None:
                for router in self._cluster.routers:
                    if router.address not in self._away:
                        serving = types_pb2.WORKER_STATE_SERVING
                        await asyncio.to_thread(wait_until_listed, router, [victim], serving)
            else:
                await door.open()
            strike.healed_s = time.time()
            self._away.discard(victim.address)
        except (AssertionError, OSError, RuntimeError, TimeoutError, grpc.RpcError) as error:
            # It stays away: nobody of its role is struck any more.
            self.broken.append(f"{role} {victim.address} does not serve after a {kind}: {error!r}")

    async def _deal(self, strike: Strike, victim: Service, door: Door | None) -> None:
        """Strikes and heals, but for what takes its own time."""
        match strike.kind:
            case "kill":
                if door is not None:
                    door.struck_s = time.time()
                strike.at_s = time.time()
                victim.process.kill()
                await asyncio.to_thread(os.waitid, os.P_PID, victim.process.pid, os.WEXITED | os.WNOWAIT)
                strike.gone_s = time.time()
                victim.process.wait()
                await asyncio.sleep(self._draw.uniform(0.5, RESTART_S - 0.5))
                victim.start()
            case "restart":
                victim.process.terminate()
                code = await asyncio.to_thread(victim.process.wait, EXIT_S)
                if code:
                    self.broken.append(f"{victim.name} {victim.address} ended with {code} after SIGTERM")
                victim.start()
            case "stop":
                os.kill(victim.process.pid, signal.SIGSTOP)
                await _away()
                os.kill(victim.process.pid, signal.SIGCONT)
            case "cut":
                assert victim.host is not None, "faults of the network need one"
                victim.host.cut()
                await _away()
                victim.host.mend()
            case "reset":
                assert victim.host is not None, "faults of the network need one"
                if door is not None:
                    door.struck_s = time.time()
                victim.host.reset()


async def _away() -> None:
    await asyncio.sleep(AWAY_S)
