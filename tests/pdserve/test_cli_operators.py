"""`pdserve workers`, `stats` and `drain`: what operators type."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from common import errors
from pdserve.v1 import decode_pb2, router_pb2, types_pb2
from tests.pdserve.fakes import HANG, WORKERS, FakeRouter, FakeWorker


async def test_workers_are_a_table(serve, pdserve):
    exit_code, stdout, _ = await pdserve("workers", "--router", await serve(FakeRouter().add_to))
    rows = [" ".join(line.split()) for line in stdout.splitlines() if line.strip()]
    assert exit_code == 0
    assert rows == [
        "worker role address state free blocks run wait pairs",
        "prefill-a prefill 127.0.0.1:50052 SERVING 1,000/2,048 3 1 1",
        "? decode [::1]:50053 UNREACHABLE 0/0 0 0 0",
        "model 0123456789ab on prefill-a",
    ]


async def test_workers_as_json_have_every_field(serve, pdserve):
    _, stdout, _ = await pdserve("workers", "--json", "--router", await serve(FakeRouter().add_to))
    known = json.loads(stdout)
    assert known["degraded"] is False
    assert set(known["workers"][0]) == {field.name for field in router_pb2.Worker.DESCRIPTOR.fields}
    assert (known["workers"][0]["state"], known["workers"][1]["role"]) == ("SERVING", "DECODE")


async def test_pressure_is_shown_with_its_reasons(serve, pdserve):
    reasons = [types_pb2.PRESSURE_REASON_FEW_FREE_BLOCKS, types_pb2.PRESSURE_REASON_SLOW_STEPS]
    pressed = router_pb2.Worker(role=types_pb2.ROLE_DECODE, instance_id="decode-b", pressure=reasons)
    router = FakeRouter(workers=router_pb2.ListWorkersResponse(workers=[pressed]))
    _, stdout, _ = await pdserve("workers", "--router", await serve(router.add_to))
    assert "decode-b is under pressure and gets no new prompts: few free blocks, slow steps" in stdout


async def test_a_degraded_cluster_is_called_so(serve, pdserve):
    router = FakeRouter(workers=router_pb2.ListWorkersResponse(workers=WORKERS.workers[1:], degraded=True))
    _, stdout, _ = await pdserve("workers", "--router", await serve(router.add_to))
    assert "degraded: no prefill worker is alive" in stdout


async def test_a_router_without_workers_says_so(serve, pdserve):
    router = FakeRouter(workers=router_pb2.ListWorkersResponse())
    _, stdout, _ = await pdserve("workers", "--router", await serve(router.add_to))
    assert "knows no worker" in stdout


async def test_workers_of_a_worker_is_one_line(serve, pdserve):
    exit_code, _, stderr = await pdserve("workers", "--router", await serve(FakeWorker().add_to))
    assert (exit_code, stderr.count("\n")) == (1, 1)
    assert "WRONG_SERVICE" in stderr


async def test_stats_print_the_figure_lines(serve, pdserve):
    exit_code, stdout, _ = await pdserve("stats", "--decode", await serve(FakeWorker().add_to))
    assert exit_code == 0
    assert stdout == (
        "Pipeline statistics\n"
        "  Total tokens: 256\n"
        "  Avg attention time: 1.23 ms\n"
        "  Avg FFN time: 0.98 ms\n"
        "  Avg total time: 2.21 ms\n"
        "  Attention SMs: 16\n"
        "  FFN SMs: 16\n"
        "  Mode: static\n"
        "  Active: yes, cut layer\n"
        "  Steps: 64, 60 of them pipelined, 64 profiled\n"
        "  Gain: 1.05 x sequential; 1 switches, 2 rebalances\n"
        "  Attention stages: p50 0.040 ms, p99 0.051 ms; busy 56% of a step, 0.25 waiting\n"
        "  FFN stages: p50 0.030 ms, p99 0.033 ms; busy 44% of a step, 0.00 waiting\n"
        "  Bubbles: 50% of both lanes' time\n"
        "  From attention to FFN: 4,096 bytes a layer and token\n"
    )


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("DISABLED", "(DISABLED: the mode says so)"),
        ("NO_GPU", "(NO_GPU: computing on the CPU)"),
        ("SOMETHING_NEW", "(SOMETHING_NEW)"),
    ],
)
async def test_stats_say_why_steps_are_sequential(serve, pdserve, reason, words):
    stats = decode_pb2.GetPipelineStatsResponse(
        mode=decode_pb2.PIPELINE_MODE_AUTO,
        fallback_reason=reason,
        fallback_detail="computing on the CPU" if reason == "NO_GPU" else "",
        attention_sm_asked=16,
        ffn_sm_asked=24,
    )
    _, stdout, _ = await pdserve("stats", "--decode", await serve(FakeWorker(stats=stats).add_to))
    assert f"Active: no, attention and FFN take turns on the whole device {words}" in stdout
    assert "none profiled" in stdout
    assert "SMs asked for: 16 attention, 24 FFN" in stdout


async def test_stats_as_json_have_every_field(serve, pdserve):
    _, stdout, _ = await pdserve("stats", "--json", "--decode", await serve(FakeWorker().add_to))
    stats = json.loads(stdout)
    assert set(stats) == {field.name for field in decode_pb2.GetPipelineStatsResponse.DESCRIPTOR.fields}
    assert (stats["mode"], stats["ffn_ms"]) == ("STATIC", 0.98)


@pytest.mark.parametrize(("argv", "deadline_s"), [([], None), (["--deadline", "5"], 5.0)])
async def test_drain_follows_until_nothing_is_left(serve, pdserve, argv, deadline_s):
    worker = FakeWorker()
    target = await serve(worker.add_to)
    exit_code, stdout, _ = await pdserve("drain", "--worker", target, *argv)
    assert (exit_code, stdout) == (0, f"3 requests left\n2 requests left\n1 request left\n{target} is drained\n")
    assert worker.drain_deadlines_s == [deadline_s]


async def test_a_drain_that_breaks_off_is_no_success(serve, pdserve):
    class Dying(FakeWorker):
        async def Drain(self, request, context):
            raise errors.Unavailable("the worker is gone")
            yield

    exit_code, stdout, stderr = await pdserve("drain", "--worker", await serve(Dying().add_to))
    assert (exit_code, stdout, stderr) == (1, "", "pdserve: UNAVAILABLE: the worker is gone\n")


async def test_a_drain_whose_stream_just_ends_is_no_success(serve, pdserve):
    class Ending(FakeWorker):
        async def Drain(self, request, context):
            return
            yield

    exit_code, stdout, _ = await pdserve("drain", "--worker", await serve(Ending().add_to))
    assert (exit_code, stdout) == (1, "")


async def test_ctrl_c_stops_watching_a_drain(serve, spawn):
    worker = FakeWorker(remaining=[2, HANG])
    process = spawn("-m", "pdserve", "drain", "--worker", await serve(worker.add_to))
    assert await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20) == "2 requests left\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = await asyncio.wait_for(asyncio.to_thread(process.communicate), 20)
    assert (process.returncode, stdout) == (130, "")
    assert "the drain goes on" in stderr


async def test_an_explanation_names_the_chosen_worker_and_why_the_others_were_not(serve, pdserve):
    exit_code, stdout, _ = await pdserve("explain", "--router", await serve(FakeRouter().add_to), "Once")
    assert exit_code == 0
    lines = stdout.splitlines()
    assert lines[0] == "decode of 64 tokens: 10.0.0.2:50053, 3.0 s ago"
    assert lines[2].split()[:4] == ["▶", "10.0.0.2:50053", "12.50", "11.000"]
    assert lines[3].rstrip().endswith("it is draining")
    assert "decode computes the prompt: all users together wait less" in stdout
    assert "crossover 90 tokens" in stdout
    assert lines[-2] == "2 requests would be in front of it in the queue"
    assert lines[-1] == "1 request without a decode worker: lost, and none to go on at"


async def test_a_request_is_explained_by_its_id(serve, pdserve):
    router = FakeRouter()
    _, stdout, _ = await pdserve("explain", "--json", "--request", "r-1", "--router", await serve(router.add_to))
    assert [one.request_id for one in router.explained] == ["r-1"]
    decode, prefill = json.loads(stdout)["placings"]
    assert (decode["role"], decode["way"]) == ("DECODE", None)
    assert set(decode["candidates"][0]) == {field.name for field in router_pb2.Candidate.DESCRIPTOR.fields}
    assert [one["refusal"] for one in decode["candidates"]] == ["", "DRAINING"]
    assert prefill["way"] == {
        "is_local": True,
        "reason": "LESS_WAITING",
        "local_ms": 5.0,
        "remote_ms": 20.0,
        "harm_ms": 1.0,
        "crossover_tokens": 90.0,
    }
