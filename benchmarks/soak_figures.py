"""What each process takes during a soak, once a second: memory, descriptors, threads, blocks; and whether it grows."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grpc
import matplotlib
import psutil

from benchmarks.soak_clients import Door
from pdserve.v1 import router_pb2, types_pb2
from tests.support.processes import Cluster, Service

MEMORY, DESCRIPTORS, THREADS, BLOCKS = "memory, MiB", "descriptors", "threads", "held blocks"
# Of one start of a process, from half a minute after its first moment to its last.
WARM_UP_S = 30.0
WINDOW_S = 10.0
MAX_GROWTH = {MEMORY: 40.0, DESCRIPTORS: 16.0, THREADS: 8.0}

Points = list[tuple[float, float]]


class Start(NamedTuple):
    """One start of a process."""

    name: str
    pid: int


class Figures:
    """Takes them while `run`."""

    def __init__(self, cluster: Cluster, doors: Sequence[Door]) -> None:
        self._services = {
            f"{service.name.removesuffix('_service')}-{number}": service
            for services in (cluster.routers, cluster.prefills, cluster.decodes)
            for number, service in enumerate(services)
        }
        self._doors = doors
        self._begun_s = time.time()
        self.taken: dict[str, dict[Start, Points]] = {what: {} for what in (MEMORY, DESCRIPTORS, THREADS, BLOCKS)}

    async def run(self) -> None:
        while True:
            for name, service in self._services.items():
                self._take_process(name, service)
            await self._take_blocks()
            await asyncio.sleep(1.0)

    def _take_process(self, name: str, service: Service) -> None:
        start = Start(name, service.process.pid)
        try:
            process = psutil.Process(start.pid)
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    return
                self._add(MEMORY, start, process.memory_info().rss / 2**20)
                self._add(DESCRIPTORS, start, process.num_fds())
                self._add(THREADS, start, process.num_threads())
        except psutil.Error:
            # It has just been killed.
            return

    async def _take_blocks(self) -> None:
        for door in self._doors:
            if not door.is_open:
                continue
            try:
                listed = await door.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=1)
            except grpc.RpcError:
                continue
            for one in listed.workers:
                is_away = one.state == types_pb2.WORKER_STATE_UNREACHABLE
                num_held = math.nan if is_away else one.num_total_blocks - one.num_free_blocks
                self._add(BLOCKS, Start(one.instance_id, 0), num_held)
            return

    def _add(self, what: str, start: Start, value: float) -> None:
        self.taken[what].setdefault(start, []).append((time.time() - self._begun_s, value))

    def plot(self, path: str, strikes_s: Sequence[float]) -> None:
        """`strikes_s` are times of the machine's clock; each is a line."""
        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = dict.fromkeys(start.name for by_start in self.taken.values() for start in by_start)
        colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
        figure, axes = pyplot.subplots(len(self.taken), sharex=True, figsize=(10, 12))
        for axis, (what, by_start) in zip(axes, self.taken.items(), strict=True):
            for start, points in by_start.items():
                axis.plot(*zip(*points, strict=True), color=colours[start.name], linewidth=1, label=start.name)
            for at_s in strikes_s:
                axis.axvline(at_s - self._begun_s, color="0.85", linewidth=0.8, zorder=0)
            axis.set_ylabel(what)
            axis.set_ylim(bottom=0)
            unique = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            axis.legend(unique.values(), unique.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[0].set_title("a gap: started anew, or not reached; a grey line: somebody was struck", fontsize=9)
        axes[-1].set_xlabel("seconds")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def growth(taken: Mapping[Start, Points]) -> dict[Start, float]:
    """Of each start that was there for long enough: how much more it takes at its end than when it was warm."""
    grown = {}
    for start, points in taken.items():
        warm_s, last_s = points[0][0] + WARM_UP_S, points[-1][0]
        if last_s - warm_s < 2 * WINDOW_S:
            continue
        before = max(value for at_s, value in points if warm_s <= at_s < warm_s + WINDOW_S)
        grown[start] = max(value for at_s, value in points if at_s > last_s - WINDOW_S) - before
    return grown
