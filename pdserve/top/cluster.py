"""What several routers tell, as one picture: a row a router, a row a worker, rates of what they count.

A worker that several routers know is one row, as the router that answered last has it; where they do not agree on its
state, all of it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from common.errors import PdserveError
from pdserve.results import PipelineStats, RouterLoad, Worker, Workers
from pdserve.top.rates import Rate
from pdserve.top.watch import Watch

OUT, IN = "out", "in"
OK, CANCELLED = "OK", "CANCELLED"


@dataclass(frozen=True, kw_only=True)
class RouterRow:
    """`load` is None before the first answer, `age_s` how old it is, `error` why there is no newer one. Rates are
    requests a second that ended well, were turned away by the queue, or failed; cancelled ones are none of it."""

    address: str
    load: RouterLoad | None
    age_s: float | None
    error: PdserveError | None
    ok_per_s: float | None
    refused_per_s: float | None
    failed_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class WorkerRow:
    """`states` has several when routers do not agree; rates are tokens a second, drawn and of prompts computed."""

    worker: Worker
    states: tuple[str, ...]
    is_old: bool
    out_per_s: float | None
    in_per_s: float | None
    # Of what its role is for: drawn by decode, computed by prefill.
    history: Sequence[float]

    @property
    def role_per_s(self) -> float | None:
        return self.out_per_s if self.worker.role == "DECODE" else self.in_per_s


@dataclass(frozen=True, kw_only=True)
class PipelineRow:
    """Of one decode worker; `stats` is None before the first answer."""

    name: str
    stats: PipelineStats | None
    age_s: float | None
    error: PdserveError | None


@dataclass(frozen=True, kw_only=True)
class View:
    """One frame. `is_old`: no router has answered of late."""

    routers: Sequence[RouterRow]
    workers: Sequence[WorkerRow]
    pipelines: Sequence[PipelineRow]
    degraded: bool
    is_old: bool

    def of_role(self, role: str) -> list[WorkerRow]:
        return [row for row in self.workers if row.worker.role == role]


@dataclass
class _Known:
    """The counters of one router, and of the workers as it tells them."""

    ended: dict[str, Rate] = field(default_factory=dict)
    workers: dict[tuple[str, str], Rate] = field(default_factory=dict)

    def rate(self, group: dict, key) -> Rate:
        return group.setdefault(key, Rate())


class Cluster:
    """Told by the watches of routers; `view` at any time."""

    def __init__(self, *, old_after_s: float) -> None:
        self._old_after_s = old_after_s
        self._known: dict[str, _Known] = {}

    def hear(self, router: str, told: Workers, at_s: float) -> None:
        """A router has answered."""
        known = self._known.setdefault(router, _Known())
        load = told.load
        failed = sum(number for code, number in load.ended_requests.items() if code not in (OK, CANCELLED))
        counts = {
            "ok": load.ended_requests.get(OK, 0),
            "refused": load.num_turned_away_requests,
            "failed": max(0, failed - load.num_turned_away_requests),
        }
        for name, count in counts.items():
            known.rate(known.ended, name).hear(count, at_s, load.boot_id)
        for worker in told.workers:
            # What it has counted it has counted when it told so, not when the router was asked.
            for way, count in ((OUT, worker.num_output_tokens), (IN, worker.num_prompt_tokens)):
                rate = known.rate(known.workers, (worker.address, way))
                rate.hear(count, at_s - worker.told_s, worker.boot_id)

    def view(self, routers: Sequence[Watch[Workers]], pipelines: Iterable[Watch[PipelineStats]], now_s: float) -> View:
        answered = sorted(
            (watch for watch in routers if watch.answer), key=lambda watch: watch.answered_s or 0.0, reverse=True
        )
        fresh = [watch for watch in answered if not self._is_old(watch, now_s)]
        workers = list(self._workers(fresh or answered[:1], is_old=not fresh))
        names = {row.worker.address: row.worker.instance_id or row.worker.address for row in workers}
        return View(
            routers=[self._router(watch, now_s) for watch in routers],
            workers=workers,
            pipelines=[
                PipelineRow(name=names[one.address], stats=one.answer, age_s=one.age_s(now_s), error=one.error)
                for one in pipelines
                if one.address in names
            ],
            degraded=any(watch.answer.degraded for watch in fresh if watch.answer),
            is_old=not fresh,
        )

    def _is_old(self, watch: Watch[Workers], now_s: float) -> bool:
        age_s = watch.age_s(now_s)
        return age_s is None or age_s > self._old_after_s

    def _router(self, watch: Watch[Workers], now_s: float) -> RouterRow:
        ended = self._known.get(watch.address, _Known()).ended
        latest = {name: rate.latest for name, rate in ended.items()} if not self._is_old(watch, now_s) else {}
        return RouterRow(
            address=watch.address,
            load=watch.answer.load if watch.answer else None,
            age_s=watch.age_s(now_s),
            error=watch.error,
            ok_per_s=latest.get("ok"),
            refused_per_s=latest.get("refused"),
            failed_per_s=latest.get("failed"),
        )

    def _workers(self, watches: Sequence[Watch[Workers]], *, is_old: bool) -> Iterator[WorkerRow]:
        states: dict[str, list[str]] = {}
        first: dict[str, tuple[Worker, str]] = {}
        for watch in watches:
            for worker in watch.answer.workers if watch.answer else ():
                key = worker.boot_id or worker.address
                first.setdefault(key, (worker, watch.address))
                states.setdefault(key, []).append(worker.state)
        for key, (worker, router) in first.items():
            rates = {way: self._known[router].workers[worker.address, way] for way in (OUT, IN)}
            is_counting = not is_old and worker.state != "UNREACHABLE"
            yield WorkerRow(
                worker=worker,
                states=tuple(dict.fromkeys(states[key])),
                is_old=is_old,
                out_per_s=rates[OUT].latest if is_counting else None,
                in_per_s=rates[IN].latest if is_counting else None,
                history=rates[OUT if worker.role == "DECODE" else IN].history,
            )
