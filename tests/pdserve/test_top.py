"""`pdserve top`: its rates on given times, its frames on given answers, and the command on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import os
import pty
import re
import sys
import termios

import pytest
from rich.console import Console

from common import errors, rpc
from pdserve.access import Access
from pdserve.results import Workers, workers_from_proto
from pdserve.top.cluster import Cluster
from pdserve.top.columns import shared_out
from pdserve.top.rates import Rate
from pdserve.top.screen import frame
from pdserve.top.sorting import ORDERS, in_order, next_order
from pdserve.top.watch import Watch
from pdserve.top.watching import Watching
from pdserve.v1 import router_pb2, types_pb2
from tests.fakes.cluster import eventually
from tests.pdserve.fakes import FakeRouter, FakeWorker
from tests.support.cluster import RealCluster

NOON = datetime.datetime(2026, 1, 1, 12, 0)
SERVING, UNREACHABLE = types_pb2.WORKER_STATE_SERVING, types_pb2.WORKER_STATE_UNREACHABLE


def worker(name: str = "decode-a", **fields) -> router_pb2.Worker:
    default = {
        "role": types_pb2.ROLE_DECODE,
        "address": f"{name}:50053",
        "instance_id": name,
        "boot_id": f"boot of {name}",
        "state": SERVING,
        "num_total_blocks": 100,
        "num_free_blocks": 100,
    }
    return router_pb2.Worker(**default | fields)


def told(*workers: router_pb2.Worker, degraded: bool = False, **load) -> Workers:
    own = router_pb2.RouterLoad(**{"instance_id": "router-a", "boot_id": "r"} | load)
    return workers_from_proto(router_pb2.ListWorkersResponse(workers=workers, degraded=degraded, load=own))


class Told:
    """A cluster, and the routers' answers in it."""

    def __init__(self) -> None:
        self.cluster = Cluster(old_after_s=3.0)
        self.watches: dict[str, Watch[Workers]] = {}

    def hear(self, answer: Workers, at_s: float, router: str = "r:1") -> None:
        watch = self.watches.setdefault(router, Watch(router, lambda: None, interval_s=1.0, clock=lambda: 0.0))
        watch.answer, watch.answered_s = answer, at_s
        self.cluster.hear(router, answer, at_s)

    def view(self, now_s: float):
        return self.cluster.view(list(self.watches.values()), [], now_s)

    def shown(self, now_s: float, *, width: int = 140, order: str = "name") -> str:
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(frame(console, self.view(now_s), order=order, time=NOON))
        return console.file.getvalue()


def test_a_rate_is_the_difference_over_the_time_between():
    rate = Rate()
    rate.hear(100, 1.0, "a")
    assert rate.latest is None
    rate.hear(150, 1.5, "a")
    assert rate.latest == pytest.approx(100.0)


def test_a_counter_that_begins_anew_is_no_negative_rate():
    rate = Rate()
    for count, at_s, life in ((100, 1.0, "a"), (150, 2.0, "a"), (10, 3.0, "b")):
        rate.hear(count, at_s, life)
    assert rate.latest is None
    rate.hear(20, 4.0, "b")
    assert rate.latest == pytest.approx(10.0)


def test_tokens_a_second_are_by_when_the_worker_told_them_not_by_when_the_router_was_asked():
    one = Told()
    one.hear(told(worker(num_output_tokens=0, told_s=0.1)), 10.0)
    one.hear(told(worker(num_output_tokens=100, told_s=0.6)), 11.0)
    assert one.view(11.0).workers[0].out_per_s == pytest.approx(200.0)


def test_the_same_news_twice_leaves_the_rate_as_it_was():
    one = Told()
    for count, at_s, told_s in ((0, 10.0, 0.0), (100, 11.0, 0.0), (100, 11.5, 0.5)):
        one.hear(told(worker(num_output_tokens=count, told_s=told_s)), at_s)
    assert one.view(11.5).workers[0].out_per_s == pytest.approx(100.0)


def test_admission_is_told_by_what_became_of_requests():
    one = Told()
    one.hear(told(), 10.0)
    ended = {"OK": 20, "RESOURCE_EXHAUSTED": 6, "UNAVAILABLE": 2, "CANCELLED": 9}
    one.hear(told(ended_requests=ended, num_turned_away_requests=6), 12.0)
    (row,) = one.view(12.0).routers
    assert (row.ok_per_s, row.refused_per_s, row.failed_per_s) == (10.0, 3.0, 1.0)


def test_a_worker_of_two_routers_is_one_row_with_both_opinions():
    one = Told()
    one.hear(told(worker(num_running=3)), 10.0, "r:1")
    one.hear(told(worker(num_running=4, state=UNREACHABLE)), 10.5, "r:2")
    (row,) = one.view(11.0).workers
    assert (row.worker.num_running, row.states) == (4, ("UNREACHABLE", "SERVING"))
    assert "UNREACHABLE/SERVING" in one.shown(11.0)


def test_a_router_that_has_gone_silent_leaves_the_word_to_the_others():
    one = Told()
    one.hear(told(worker(num_running=3)), 10.0, "r:1")
    one.hear(told(worker(num_running=4)), 20.0, "r:2")
    assert [row.worker.num_running for row in one.view(21.0).workers] == [4]


def test_when_nobody_answers_what_is_shown_is_called_old():
    one = Told()
    one.hear(told(worker(num_running=3)), 10.0)
    one.watches["r:1"].error = errors.Unavailable("no connection", reason="UNREACHABLE")
    shown = one.shown(25.0)
    assert "silent for 15 s" in shown
    assert "r:1: UNAVAILABLE (UNREACHABLE): no connection" in shown
    assert "no router answers: what is shown of workers is old" in shown
    assert "decode-a" in shown


def test_blocks_are_a_bar_of_held_cached_and_free():
    one = Told()
    one.hear(told(worker(num_free_blocks=75, num_cached_blocks=25)), 10.0)
    assert "███▒▒▒░░░░░░  25%" in one.shown(10.0)


def test_pressure_degradation_and_two_models_are_said_in_words():
    pressed = worker("a", pressure=[types_pb2.PRESSURE_REASON_SLOW_STEPS], model_fingerprint="m1")
    one = Told()
    one.hear(told(pressed, worker("b", model_fingerprint="m2"), degraded=True), 10.0)
    shown = one.shown(10.0)
    assert "a is under pressure and gets no new prompts: slow steps" in shown
    assert "degraded: no prefill worker is alive" in shown
    assert "2 models, as in a rolling upgrade: m1, m2" in shown


def test_a_router_older_than_the_command_shows_no_zeros():
    one = Told()
    one.hear(told(worker(), instance_id="", boot_id=""), 10.0)
    (line,) = [line for line in one.shown(10.0).splitlines() if line.startswith("r:1")]
    assert line.split()[2:6] == ["–"] * 4


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal_and_state_and_numbers_stay(width):
    one = Told()
    one.hear(told(worker(num_running=7), worker("prefill-a", role=types_pb2.ROLE_PREFILL)), 10.0)
    shown = one.shown(10.0, width=width)
    assert max(map(len, shown.splitlines())) <= width
    (line,) = [line for line in shown.splitlines() if line.startswith("decode-a")]
    assert {"SERVING", "7"} <= set(line.split())


def test_orders_put_first_what_they_are_named_for():
    one = Told()
    idle, busy = worker("a", num_free_blocks=10), worker("b", num_running=5)
    one.hear(told(idle, busy), 10.0)
    one.hear(told(idle, worker("b", num_running=5, num_output_tokens=50)), 11.0)
    rows = one.view(11.0).workers
    first = {order: in_order(rows, order)[0].worker.instance_id for order in ORDERS}
    assert first == {"name": "a", "busy": "b", "tokens": "b", "blocks": "a"}
    assert next_order(ORDERS[-1]) == ORDERS[0]


@pytest.mark.parametrize(
    ("wanted", "available", "given"), [([1, 2, 3], 10, [1, 2, 3]), ([1, 50, 50], 21, [1, 10, 10]), ([5, 5], 0, [1, 1])]
)
def test_lines_are_shared_out_fairly(wanted, available, given):
    assert shared_out(wanted, available) == given


async def test_once_is_one_frame_of_routers_workers_and_pipelines(serve, pdserve):
    decode = await serve(FakeWorker().add_to)
    router = FakeRouter()
    router.workers = router_pb2.ListWorkersResponse(workers=[worker(address=decode, num_running=3)])
    target = await serve(router.add_to)
    exit_code, stdout, _ = await pdserve("top", "--once", "--interval", "0.05", "--router", target)
    assert exit_code == 0
    assert "\x1b" not in stdout
    assert re.search(r"decode-a +127\.0\.0\.1:\d+ +SERVING", stdout)
    assert re.search(r"decode-a +static +16 █{12} 16 +0\.040 / 0\.030 ms", stdout)
    assert "pipelined, cut layer" in stdout


async def test_a_pipeline_that_may_not_be_read_says_so_and_the_rest_is_shown(serve, pdserve):
    class Closed(FakeWorker):
        async def GetPipelineStats(self, request, context):
            raise errors.PermissionDenied("for operators")

    router = FakeRouter()
    router.workers = router_pb2.ListWorkersResponse(workers=[worker(address=await serve(Closed().add_to))])
    argv = ["top", "--once", "--interval", "0.05", "--router", await serve(router.add_to)]
    exit_code, stdout, _ = await pdserve(*argv)
    assert exit_code == 0
    assert "pipeline of decode-a: PERMISSION_DENIED: for operators" in stdout
    _, stdout, _ = await pdserve(*argv, "--no-pipelines")
    assert "pipeline" not in stdout


async def test_a_frame_can_be_kept_as_a_picture(serve, pdserve, tmp_path):
    argv = ["--once", "--interval", "0.05", "--no-pipelines", "--router", await serve(FakeRouter().add_to)]
    await pdserve("top", *argv, "--svg", str(tmp_path / "top.svg"))
    assert "prefill-a" in (tmp_path / "top.svg").read_text()


async def test_once_without_any_router_is_a_failure(pdserve, unused_address):
    exit_code, stdout, stderr = await pdserve("top", "--once", "--interval", "0.05", "--router", unused_address)
    assert exit_code == 1
    assert "never answered" in stdout
    assert "UNREACHABLE" in stderr


async def test_a_router_that_comes_back_is_shown_again():
    address = "127.0.0.1:0"
    async with contextlib.AsyncExitStack() as stack:

        async def start() -> None:
            nonlocal address
            server = rpc.create_server()
            FakeRouter().add_to(server)
            address = f"127.0.0.1:{rpc.bind(server, address)}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            stop.append(server)

        stop: list = []
        await start()
        watching = Watching([address], Access(), interval_s=0.02, pipelines=False)
        async with watching.running(), asyncio.timeout(30):
            await watching.told(1)
            (row,) = watching.view.routers
            assert row.error is None
            await stop[0].stop(None)
            await eventually(lambda: watching.view.routers[0].error is not None)
            assert watching.view.workers, "what was known stays to be seen"
            await start()
            await eventually(lambda: watching.view.routers[0].error is None)


async def test_in_a_terminal_keys_sort_and_quit(serve):
    target = await serve(FakeRouter().add_to)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pdserve", "top", "--no-pipelines", "--interval", "0.1", "--router", target,
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown = ""

    async def until(word: str) -> None:
        nonlocal shown
        while word not in shown:
            shown += (await asyncio.to_thread(os.read, ours, 65536)).decode(errors="ignore")

    try:
        async with asyncio.timeout(60):
            await until("prefill-a")
            await until("s sort: name")
            os.write(ours, b"s")
            await until("s sort: busy")
            os.write(ours, b"q")
            assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        os.close(ours)


async def test_the_real_services_are_shown_with_their_tokens():
    async with RealCluster().running() as cluster:
        watching = Watching([cluster.address], Access(), interval_s=0.05, pipelines=True)
        async with watching.running(), asyncio.timeout(60):
            await watching.told(1)
            await cluster.generate("Once", max_tokens=8)
            await eventually(lambda: _has_counted(watching.view))
        view = watching.view
    assert {row.worker.role for row in view.workers} == {"PREFILL", "DECODE"}
    assert view.routers[0].load.ended_requests["OK"] == 1
    assert view.pipelines[0].stats is not None


def _has_counted(view) -> bool:
    """The first token is prefill's, the others decode's; and the prompt was computed at prefill."""
    tokens = {row.worker.role: (row.worker.num_output_tokens, row.worker.num_prompt_tokens > 0) for row in view.workers}
    ended = view.routers[0].load.ended_requests.get("OK") == 1
    return ended and tokens == {"PREFILL": (1, True), "DECODE": (7, False)} and bool(view.pipelines)
