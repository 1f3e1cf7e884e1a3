"""`make faults`: every fault in every phase of a request at every role, and what was promised for each.

Real processes, two of each role, each in a network namespace of its own where root allows that; without it the faults
of the network are left out and named. Each cell brings two requests of the first router into a phase, so that one is at
each worker, and two bystanders of the second router; strikes; heals; and checks what has to hold:

  requests     end with exactly the tokens of an undisturbed run, or with UNAVAILABLE where their own router was struck
  bystanders   end with exactly those tokens
  afterwards   no worker holds a block, everybody serves, and a canary through each router is exact
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grpc

from benchmarks.fault_cells import DETECT_MS, Cell, blows, cells
from benchmarks.report import Report
from common.rpc import CHANNEL_OPTIONS
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.support import network
from tests.support.control_link import ControlLink, Fault, control_link
from tests.support.processes import Cluster, Service, running_cluster
from tests.support.streams import PROMPT, Stream, wait_until_free, wait_until_listed

LONG_PROMPT = PROMPT * 200
SAMPLED = types_pb2.SamplingParams(temperature=0.9, top_p=0.95, seed=7, presence_penalty=0.3)
NUM_TOKENS = 400
# In small chunks a prompt is long enough under way to be struck; few places, so that requests can be made to queue.
WORKER_ARGS = ("--num-blocks", "1024", "--max-batch-tokens", "32")
NUM_PLACES = 4
# A strike lasts until it was noticed, and so long where nobody can notice it.
UNNOTICED_S = 3.0
NOTICE_S = 10.0
END_S = 60.0
NUMBERS = itertools.count()


class Following(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.code: grpc.StatusCode | None = None

    def run(self) -> None:
        try:
            self.stream.read()
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code = error.code()
        except ValueError:
            # The channel was closed under it: the client has left.
            self.code = grpc.StatusCode.CANCELLED

    def longest_gap_ms(self, after_s: float) -> float:
        """Between two messages, or from the strike to the first one."""
        later = [after_s, *(at for at in self.stream.arrivals_s if at > after_s)]
        return max((b - a for a, b in itertools.pairwise(later)), default=0.0) * 1e3


class Matrix:
    """The cluster, and what an undisturbed run puts out."""

    def __init__(self, cluster: Cluster, link: ControlLink | None = None) -> None:
        """`link` stands before the one decode worker, for faults of messages."""
        self.cluster = cluster
        self._link = link
        # To the second router, which is never struck. A connection for each question would be measured as well.
        channel = grpc.insecure_channel(cluster.routers[1].address, options=CHANNEL_OPTIONS)
        self._second_router = router_pb2_grpc.RouterServiceStub(channel)
        self.expected = {prompt: self._start(0, prompt).read().token_ids for prompt in (PROMPT, LONG_PROMPT)}

    def run(self, cell: Cell) -> dict[str, object]:
        """One row of the table; `violated` says which promises were broken."""
        violated: list[str] = []
        fillers = [self._follow(1, PROMPT) for _ in range(2 * NUM_PLACES)] if cell.phase == "queued" else []
        prompt = LONG_PROMPT if cell.phase == "prefilling" or self._drains_prefill(cell) else PROMPT
        if fillers:
            self._until(lambda: all(self._listed(one).num_running == NUM_PLACES for one in self.cluster.decodes))
        # Nobody else is there yet, so the first router gives one to each worker.
        struck = [self._start(0, prompt) for _ in range(2)]
        bystanders = [self._follow(1, PROMPT) for _ in range(2)]
        self._reach(cell, struck, prompt)
        follow_later = cell.fault == "slow"
        following = [Following(stream) for stream in struck]
        if not follow_later:
            for one in following:
                one.start()
        victim = self._victim(cell)
        struck_s = time.monotonic()
        detect_ms, recover_ms = self._strike(cell, victim, struck)
        if follow_later:
            for one in following:
                one.start()
        for one in (*following, *bystanders, *fillers):
            one.join(END_S)
        violated += self._judge(cell, following, bystanders + fillers, prompt)
        violated += self._afterwards(cell, victim)
        limit = DETECT_MS.get(cell.fault)
        if limit is not None and detect_ms is not None and detect_ms > limit:
            violated.append(f"noticed after {detect_ms:.0f} ms")
        gap_ms = max(one.longest_gap_ms(struck_s) for one in following) if cell.role != "client" else None
        return {
            "fault": cell.fault,
            "phase": cell.phase,
            "role": cell.role,
            "noticed ms": None if detect_ms is None else round(detect_ms),
            "serving again ms": None if recover_ms is None else round(recover_ms),
            "longest gap ms": None if gap_ms is None else round(gap_ms),
            "resumptions": sum(one.stream.path.num_resumptions for one in following if one.stream.path),
            "violated": "; ".join(violated) or "nothing",
        }

    def _start(self, router: int, prompt: str) -> Stream:
        salt = f"cell-{next(NUMBERS)}"
        return Stream(self.cluster.routers[router], prompt, max_tokens=NUM_TOKENS, sampling=SAMPLED, cache_salt=salt)

    def _follow(self, router: int, prompt: str) -> Following:
        one = Following(self._start(router, prompt))
        one.start()
        return one

    @staticmethod
    def _drains_prefill(cell: Cell) -> bool:
        return cell.phase == "draining" and cell.role == "prefill"

    def _reach(self, cell: Cell, struck: Sequence[Stream], prompt: str) -> None:
        """Brings the requests into the phase."""
        if cell.phase == "decoding" or (cell.phase == "draining" and prompt == PROMPT):
            for stream in struck:
                stream.read(20)
        elif prompt == LONG_PROMPT:
            self._until(lambda: self._listed(self.cluster.prefills[0]).num_running)
        if cell.phase == "draining":
            self._drain(cell)

    def _drain(self, cell: Cell) -> None:
        draining = self._victim(cell) or self.cluster.decodes[0]
        if draining in self.cluster.routers:
            draining.process.terminate()
            return
        with grpc.insecure_channel(draining.address) as channel:
            next(iter(worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest(), timeout=END_S)))

    def _victim(self, cell: Cell) -> Service | None:
        places = {"prefill": self.cluster.prefills, "decode": self.cluster.decodes, "router": self.cluster.routers}
        return places[cell.role][0] if cell.role in places else None

    def _strike(
        self, cell: Cell, victim: Service | None, struck: Sequence[Stream]
    ) -> tuple[float | None, float | None]:
        """Strikes and heals; when it was noticed and when the victim served again, in ms from strike and healing."""
        if self._link is not None:
            fault = Fault(cell.fault)
            dealt_before = self._link.dealt[fault]
            self._link.arm(fault)
            self._until(lambda: self._link.dealt[fault] > dealt_before)
            return None, None
        if victim is None:
            if cell.fault == "leave":
                for stream in struck:
                    stream.leave()
            else:
                time.sleep(UNNOTICED_S)
            return None, None
        is_worker = victim not in self.cluster.routers
        boot_id = self._listed(victim).boot_id if is_worker else ""
        strike, heal = blows(cell.fault, victim)
        struck_s = time.monotonic()
        strike()
        detect_ms = None
        if is_worker and cell.fault in ("kill", "stop", "cut"):
            self._until(lambda: self._listed(victim).state == types_pb2.WORKER_STATE_UNREACHABLE)
            detect_ms = (time.monotonic() - struck_s) * 1e3
        elif cell.fault in ("stop", "cut"):
            time.sleep(UNNOTICED_S)
        heal()
        healed_s = time.monotonic()
        if not is_worker or cell.phase == "draining":
            return detect_ms, None
        if cell.fault in ("kill", "restart"):
            self._until(lambda: self._listed(victim).boot_id != boot_id, within_s=END_S)
        self._until(lambda: self._listed(victim).state == types_pb2.WORKER_STATE_SERVING, within_s=END_S)
        return detect_ms, (time.monotonic() - healed_s) * 1e3

    def _judge(
        self, cell: Cell, struck: Sequence[Following], others: Sequence[Following], prompt: str
    ) -> Iterator[str]:
        for one in struck:
            may_fail = cell.role == "router" and one.code is grpc.StatusCode.UNAVAILABLE
            if cell.fault == "leave" or may_fail:
                continue
            if one.code is not grpc.StatusCode.OK:
                yield f"a request ended with {one.code and one.code.name}"
            elif one.stream.token_ids != self.expected[prompt]:
                yield "a request has other tokens"
        for one in others:
            if one.code is not grpc.StatusCode.OK:
                yield f"a bystander ended with {one.code and one.code.name}"
            elif one.stream.token_ids != self.expected[PROMPT]:
                yield "a bystander has other tokens"

    def _afterwards(self, cell: Cell, victim: Service | None) -> Iterator[str]:
        """Everybody is there again, and nothing is left of the cell."""
        # Who was killed has been started anew, and does not drain.
        if cell.phase == "draining" and cell.fault not in ("kill", "restart"):
            drained = victim or self.cluster.decodes[0]
            drained.process.terminate()
            if (code := drained.process.wait(END_S)) not in (0, -signal.SIGKILL):
                yield f"{drained.name} ended with {code}"
        self.cluster.restore()
        for service in (*self.cluster.workers, *self.cluster.routers):
            service.wait_ready()
        try:
            for router in self.cluster.routers:
                wait_until_listed(router, self.cluster.workers, types_pb2.WORKER_STATE_SERVING)
            wait_until_free(self.cluster.workers)
        except (AssertionError, grpc.RpcError) as error:
            yield f"blocks are held, or somebody does not serve: {error}"
        for number in range(2):
            canary = self._follow(number, PROMPT)
            canary.join(END_S)
            if canary.stream.token_ids != self.expected[PROMPT]:
                yield f"a canary through router {number} is not exact"

    def _listed(self, worker: Service) -> router_pb2.Worker:
        """As the second router sees it."""
        request = router_pb2.ListWorkersRequest()
        listed = self._second_router.ListWorkers(request, timeout=5, wait_for_ready=True).workers
        return next(one for one in listed if one.address == worker.address)

    @staticmethod
    def _until(condition: Callable[[], object], *, within_s: float = NOTICE_S) -> None:
        until_s = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > until_s:
                raise TimeoutError("what was waited for has not come")
            time.sleep(0.005)


@contextlib.contextmanager
def started(*, num_decode: int = 2, hosts: Sequence[network.Host] = (), pair_endpoint: str = "") -> Iterator[Cluster]:
    decode_args = ["--max-num-seqs", str(NUM_PLACES), *(("--pair-endpoint", pair_endpoint) if pair_endpoint else ())]
    with running_cluster(
        num_decode=num_decode,
        num_routers=2,
        worker_args=WORKER_ARGS,
        decode_args=decode_args,
        # A fault of prefill needs requests that are there.
        router_args=["--local-prefill", "never"],
        hosts=hosts,
    ) as cluster:
        yield cluster


def run(matrix: Matrix, chosen: Sequence[Cell], report: Report) -> None:
    cluster = matrix.cluster
    for cell in chosen:
        try:
            report.add(**matrix.run(cell))
        except (AssertionError, TimeoutError, grpc.RpcError) as error:
            report.add(fault=cell.fault, phase=cell.phase, role=cell.role, violated=f"{type(error).__name__}: {error}")
            for service in (*cluster.workers, *cluster.routers):
                service.kill()
            cluster.restore()


def main(words: Sequence[str]) -> int:
    """Runs the cells that have every one of `words`, all when there are none; the exit code.

    Rows of cells that are not run stay in the table as they were kept.
    """
    report = Report("faults", "Faults, phases and roles: what was promised, after each")
    obstacle = network.obstacle()
    if obstacle:
        report.notes.append(f"Without faults of the network: {obstacle}.")
    chosen = [one for one in cells(has_network=not obstacle) if set(words) <= {*one.fault.split(), one.phase, one.role}]
    of_messages = [one for one in chosen if one.role == "pair"]
    others = [one for one in chosen if one.role != "pair"]
    if others:
        with contextlib.ExitStack() as stack:
            hosts = () if obstacle else stack.enter_context(network.private_network(6))
            run(Matrix(stack.enter_context(started(hosts=hosts))), others, report)
    if of_messages:
        with control_link() as link, started(num_decode=1, pair_endpoint=link.address) as cluster:
            link.target = cluster.decodes[0].address
            run(Matrix(cluster, link), of_messages, report)
    num_violated = sum(row["violated"] != "nothing" for row in report.rows)
    print(f"{len(report.rows)} cells, {num_violated} with a violated promise.")
    _save(report, words)
    return 1 if num_violated else 0


def _save(report: Report, words: Sequence[str]) -> None:
    """Together with the rows of cells that were not run this time."""
    rows = {_cell_of(row): row for row in (*report.kept_rows(), *report.rows)}
    order = {cell: place for place, cell in enumerate(cells(has_network=True))}
    num_new = len(report.rows)
    report.rows = sorted(rows.values(), key=lambda row: order[_cell_of(row)])
    num_violated = sum(row["violated"] != "nothing" for row in report.rows)
    report.notes.append(f"{len(report.rows)} cells, {num_violated} with a violated promise.")
    if num_new < len(report.rows):
        report.notes.append(
            f"This run was of the {num_new} cells with {' '.join(words)}; the others are of earlier ones."
        )
    report.save()


def _cell_of(row: Mapping[str, object]) -> Cell:
    return Cell(str(row["fault"]), str(row["phase"]), str(row["role"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
