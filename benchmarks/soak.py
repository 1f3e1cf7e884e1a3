"""`make soak MINUTES=n`: mixed traffic with random faults, what was promised at its end, and what the processes took.

64 clients at two routers, two prefill and two decode workers. Every ten seconds a worker is killed, and started again
as a supervisor would, or stopped for a while. No request may be lost, and each has the tokens of an undisturbed one; at
the end no worker holds a block and everybody serves. A plot shows memory, descriptors, threads and blocks over time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field

import grpc
import grpc.aio
import matplotlib
import psutil

from benchmarks.report import Report
from common import rpc
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import Cluster, Service, running_cluster
from tests.support.streams import wait_until_free, wait_until_listed

NUM_CLIENTS = 64
NUM_KINDS = 16
MAX_TOKENS = 60
DEADLINE_S = 60.0
FAULT_EVERY_S = 10.0
RESTART_S = 1.0
STOPPED_S = 4.0
# One in so many clients leaves in the middle.
LEAVES = 20


def request(kind: int) -> router_pb2.GenerateRequest:
    """One of `NUM_KINDS`, always the same."""
    draw = random.Random(kind)
    message = router_pb2.GenerateRequest()
    message.prompt_token_ids.ids.extend(draw.randrange(3, 2048) for _ in range(draw.choice([5, 17, 60, 200, 600])))
    message.sampling.temperature = draw.choice([0.0, 0.9])
    message.sampling.seed = kind
    message.stopping.max_tokens = MAX_TOKENS
    message.stopping.ignore_eos = True
    return message


@dataclass
class Tally:
    """What became of the requests."""

    num_exact: int = 0
    num_left: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    # Longest time between two messages of a request, by how often it went on elsewhere.
    gaps_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})


class Clients:
    """They ask again as soon as they are answered, until they are told to stop."""

    def __init__(self, stubs: list[router_pb2_grpc.RouterServiceStub]) -> None:
        self._stubs = stubs
        self.is_over = False
        self.tally = Tally()
        self.expected: list[list[int]] = []

    async def learn(self) -> None:
        """What each kind puts out undisturbed."""
        for kind in range(NUM_KINDS):
            self.expected.append((await self._generate(0, kind))[0])

    async def run(self, number: int) -> None:
        draw = random.Random(number)
        while not self.is_over:
            kind = draw.randrange(NUM_KINDS)
            try:
                if draw.randrange(LEAVES) == 0:
                    await self._leave(number, kind, after=draw.randrange(1, 20))
                    self.tally.num_left += 1
                else:
                    self._judge(kind, *await self._generate(number, kind))
            except grpc.aio.AioRpcError as error:
                self.tally.lost.append(f"{error.code().name}: {error.details()}")

    def _judge(self, kind: int, token_ids: list[int], gap_ms: float, was_resumed: bool) -> None:
        self.tally.gaps_ms[was_resumed].append(gap_ms)
        if token_ids == self.expected[kind]:
            self.tally.num_exact += 1
        else:
            self.tally.wrong.append(f"kind {kind}: {token_ids}")

    async def _generate(self, number: int, kind: int) -> tuple[list[int], float, bool]:
        token_ids: list[int] = []
        arrivals_s: list[float] = []
        was_resumed = False
        async for response in self._stubs[number % len(self._stubs)].Generate(request(kind), timeout=DEADLINE_S):
            arrivals_s.append(time.monotonic())
            token_ids += response.chunk.token_ids
            was_resumed = response.completion.path.num_resumptions > 0
        gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
        return token_ids, max(gaps_s, default=0.0) * 1e3, was_resumed

    async def _leave(self, number: int, kind: int, *, after: int) -> None:
        call = self._stubs[number % len(self._stubs)].Generate(request(kind), timeout=DEADLINE_S)
        num_messages = 0
        async for _ in call:
            num_messages += 1
            if num_messages == after:
                call.cancel()
                return


class Figures:
    """What each process takes, once a second."""

    def __init__(self, cluster: Cluster, stub: router_pb2_grpc.RouterServiceStub) -> None:
        self._names = {
            f"{service.name.removesuffix('_service')} {number}": service
            for services in (cluster.routers, cluster.prefills, cluster.decodes)
            for number, service in enumerate(services)
        }
        self._stub = stub
        self._begun_s = time.monotonic()
        self.taken: dict[str, dict[str, list[tuple[float, float]]]] = {
            what: {} for what in ("memory, MiB", "descriptors", "threads", "held blocks")
        }

    async def run(self) -> None:
        while True:
            for name, service in self._names.items():
                self._take_process(name, service)
            listed = await self._stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5)
            for one in listed.workers:
                if one.state != types_pb2.WORKER_STATE_UNREACHABLE:
                    self._add("held blocks", one.instance_id, one.num_total_blocks - one.num_free_blocks)
            await asyncio.sleep(1.0)

    def _take_process(self, name: str, service: Service) -> None:
        try:
            process = psutil.Process(service.process.pid)
            with process.oneshot():
                self._add("memory, MiB", name, process.memory_info().rss / 2**20)
                self._add("descriptors", name, process.num_fds())
                self._add("threads", name, process.num_threads())
        except psutil.Error:
            # It has just been killed.
            return

    def _add(self, what: str, name: str, value: float) -> None:
        self.taken[what].setdefault(name, []).append((time.monotonic() - self._begun_s, value))

    def plot(self, path: str) -> None:
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(len(self.taken), sharex=True, figsize=(9, 11))
        for axis, (what, by_name) in zip(axes, self.taken.items(), strict=True):
            for name, points in by_name.items():
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
            axis.set_ylabel(what)
            axis.legend(fontsize=6, loc="upper left")
        axes[-1].set_xlabel("seconds")
        figure.tight_layout()
        figure.savefig(path, dpi=120)


async def strike(cluster: Cluster, draw: random.Random, counts: dict[str, int]) -> None:
    """A fault every so often, for ever; one at a time."""
    while True:
        await asyncio.sleep(FAULT_EVERY_S)
        victim = draw.choice(cluster.workers)
        if draw.random() < 0.7:
            counts["kills"] += 1
            await asyncio.to_thread(victim.kill)
            await asyncio.sleep(RESTART_S)
            victim.start()
            await asyncio.to_thread(victim.wait_ready)
        else:
            counts["stops"] += 1
            victim.process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(STOPPED_S)
            finally:
                victim.process.send_signal(signal.SIGCONT)


async def soak(cluster: Cluster, minutes: float, report: Report) -> list[str]:
    """The promises that were broken."""
    channels = [rpc.connect(router.address) for router in cluster.routers]
    stubs = [router_pb2_grpc.RouterServiceStub(channel) for channel in channels]
    clients, figures, counts = Clients(stubs), Figures(cluster, stubs[0]), {"kills": 0, "stops": 0}
    await clients.learn()
    asking = [asyncio.create_task(clients.run(number)) for number in range(NUM_CLIENTS)]
    beside = [
        asyncio.create_task(strike(cluster, random.Random(1), counts)),
        asyncio.create_task(figures.run()),
    ]
    done, _ = await asyncio.wait(beside, timeout=minutes * 60, return_when=asyncio.FIRST_COMPLETED)
    clients.is_over = True
    await asyncio.gather(*asking)
    for one in beside:
        one.cancel()
    outcomes = await asyncio.gather(*beside, return_exceptions=True)
    await asyncio.to_thread(cluster.restore)
    tally = clients.tally
    broken = [repr(outcome) for outcome in outcomes if done and not isinstance(outcome, asyncio.CancelledError)]
    broken += [f"lost: {one}" for one in tally.lost] + [f"wrong: {one}" for one in tally.wrong]
    try:
        for router in cluster.routers:
            await asyncio.to_thread(wait_until_listed, router, cluster.workers, types_pb2.WORKER_STATE_SERVING)
        await asyncio.to_thread(wait_until_free, cluster.workers)
    except (AssertionError, grpc.RpcError) as error:
        broken.append(f"blocks are held, or somebody does not serve: {error}")
    for channel in channels:
        await channel.close()
    report.add(
        minutes=minutes,
        clients=NUM_CLIENTS,
        **counts,
        exact=tally.num_exact,
        wrong=len(tally.wrong),
        lost=len(tally.lost),
        left=tally.num_left,
        resumed=len(tally.gaps_ms[True]),
        **{f"gap p99 ms, {name}": _p99(tally.gaps_ms[key]) for key, name in ((False, "others"), (True, "resumed"))},
    )
    figures.plot(str(report.path("png")))
    return broken


def _p99(values: list[float]) -> float | None:
    return round(statistics.quantiles(values, n=100)[-1]) if len(values) > 1 else None


def main(minutes: float) -> int:
    report = Report("soak", "Mixed traffic with random faults")
    with running_cluster(num_routers=2, worker_args=("--num-blocks", "2048")) as cluster:
        broken = asyncio.run(soak(cluster, minutes, report))
    report.notes.append("Kept: everything." if not broken else f"Broken: {len(broken)} promises.")
    report.save()
    for one in broken[:50]:
        print(one)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0))
