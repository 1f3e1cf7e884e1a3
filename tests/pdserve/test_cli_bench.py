"""`pdserve bench`: the command, with its processes, on real servers."""

from __future__ import annotations

import asyncio
import builtins
import json
import signal

import pytest

from common import errors
from common.settings import ConfigError
from pdserve.access import Access
from pdserve.bench.fleet import Fleet
from pdserve.bench.job import Job
from pdserve.bench.lengths import Lengths
from pdserve.bench.load import Point, Share
from pdserve.bench.prompt_file import FilePrompt, read_prompts
from pdserve.bench.workload import Workload
from pdserve.cli import parse
from pdserve.request import Chat, Message
from tests.pdserve.fakes import TokenRouter
from tests.support.cluster import RealCluster

SHORT = ["--warmup", "0", "--prompt-tokens", "8-16", "--output-tokens", "6"]


async def measured(pdserve, tmp_path, *argv: str) -> dict:
    path = tmp_path / "run.json"
    exit_code, _, stderr = await pdserve("bench", *SHORT, *argv, "--json", str(path))
    assert exit_code == 0, stderr
    return json.loads(path.read_text())


async def test_a_sweep_goes_to_all_routers_in_turn_and_counts_every_request(serve, pdserve, tmp_path):
    routers = [TokenRouter(per_message=3), TokenRouter(per_message=3)]
    targets = [await serve(router.add_to) for router in routers]
    run = await measured(
        pdserve, tmp_path, "--router", *targets, "--rate", "40", "80", "--num-requests", "10", "--processes", "2"
    )
    assert [point["load"] for point in run["points"]] == ["40/s", "80/s"]
    assert [point["requests"]["ok"] for point in run["points"]] == [10, 10]
    assert [len(router.requests) for router in routers] == [10, 10]
    assert run["points"][0]["tokens"] | {"prompt_mean": 0} == {
        "prompt_mean": 0,
        "cached_mean": 0.0,
        "output_mean": 6.0,
        "per_message_mean": 3.0,
    }
    assert run["points"][0]["paths"] == {"REMOTE": 10}
    assert run["complete"]
    assert [target["address"] for target in run["targets"]] == targets


async def test_a_point_shares_no_cached_prefix_with_another_but_asks_the_same(serve, pdserve, tmp_path):
    router = TokenRouter()
    await measured(
        pdserve, tmp_path, "--router", await serve(router.add_to), "--rate", "50", "90", "--num-requests", "4"
    )
    first, second = router.requests[:4], router.requests[4:]
    assert len({request.cache_salt for request in router.requests}) == 2

    def asked(requests):
        return sorted(tuple(request.prompt_token_ids.ids) for request in requests)

    assert asked(first) == asked(second)
    assert all(request.stopping.ignore_eos for request in router.requests)


async def test_a_closed_loop_keeps_so_many_open(serve, pdserve, tmp_path):
    router = TokenRouter()
    run = await measured(
        pdserve, tmp_path, "--router", await serve(router.add_to), "--concurrency", "3", "--num-requests", "12"
    )
    assert run["points"][0]["requests"]["measured"] == 12
    assert router.most_open <= 3


async def test_refusals_are_counted_and_never_tried_again(serve, pdserve, tmp_path):
    full = errors.ResourceExhausted("the queue is full", reason="QUEUE_FULL", retry_after_s=0.01)
    router = TokenRouter(error=full, error_every=2)
    argv = ["--router", await serve(router.add_to), "--rate", "50", "--num-requests", "10"]
    exit_code, stdout, _ = await pdserve("bench", *SHORT, *argv, "--json", str(tmp_path / "run.json"))
    counts = json.loads((tmp_path / "run.json").read_text())["points"][0]["requests"]
    assert (counts["ok"], counts["refused"], counts["failed"], len(router.requests)) == (5, 5, 0, 10)
    assert "5 RESOURCE_EXHAUSTED QUEUE_FULL at 50/s" in stdout
    assert exit_code == 0


async def test_json_on_stdout_is_json_alone(serve, pdserve):
    argv = ["--router", await serve(TokenRouter().add_to), "--num-requests", "2", "--concurrency", "1"]
    _, stdout, _ = await pdserve("bench", *SHORT, *argv, "--json", "-")
    assert json.loads(stdout)["schema"] == "pdserve-bench/1"


async def test_callers_that_may_not_list_workers_measure_all_the_same(serve, pdserve, tmp_path):
    router = TokenRouter()
    router.workers = errors.PermissionDenied("for operators")
    run = await measured(pdserve, tmp_path, "--router", await serve(router.add_to), "--num-requests", "2")
    assert run["targets"][0]["workers"] is None
    assert "PERMISSION_DENIED" in run["targets"][0]["workers_unknown"]


@pytest.mark.parametrize("loads", [["--rate", "60"], ["--concurrency", "1", "2"]])
async def test_a_picture_is_a_png(serve, pdserve, tmp_path, loads):
    argv = ["--router", await serve(TokenRouter().add_to), "--num-requests", "6", *loads]
    exit_code, _, _ = await pdserve("bench", *SHORT, *argv, "--png", str(tmp_path / "run.png"))
    assert exit_code == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


async def test_without_matplotlib_a_picture_is_refused_before_anything_is_sent(serve, pdserve, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    router = TokenRouter()
    argv = ["--router", await serve(router.add_to), "--png", str(tmp_path / "run.png")]
    exit_code, _, stderr = await pdserve("bench", *argv)
    assert (exit_code, router.requests) == (2, [])
    assert "pip install 'pdserve[bench]'" in stderr


async def test_each_request_is_kept_as_a_line(serve, pdserve, tmp_path):
    argv = ["--router", await serve(TokenRouter(per_message=4).add_to), "--concurrency", "1", "--num-requests", "3"]
    await pdserve("bench", *SHORT, *argv, "--requests", str(tmp_path / "requests.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["OK"] * 3
    assert [count for _, count in rows[0]["messages"]] == [4, 2]


async def test_two_runs_are_compared(serve, pdserve, tmp_path):
    argv = [*SHORT, "--router", await serve(TokenRouter().add_to), "--concurrency", "2", "--num-requests", "4"]
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        await pdserve("bench", *argv, "--json", path)
    exit_code, stdout, _ = await pdserve("bench", "--compare", *paths)
    assert exit_code == 0
    assert "2 at a time" in stdout
    assert "differs" not in stdout


async def test_ctrl_c_keeps_the_points_that_were_finished(serve, spawn, tmp_path):
    router = TokenRouter(hang_after=2)
    argv = ["--concurrency", "1", "2", "--num-requests", "2", "--router", await serve(router.add_to)]
    process = spawn("-m", "pdserve", "bench", *SHORT, *argv, "--json", str(tmp_path / "run.json"))
    async with asyncio.timeout(60):
        await router.hangs.wait()
        process.send_signal(signal.SIGINT)
        stdout, stderr = await asyncio.to_thread(process.communicate)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (process.returncode, stderr) == (130, "")
    assert ([point["load"] for point in run["points"]], run["complete"]) == (["1 at a time"], False)
    assert "1 at a time" in stdout


async def test_a_process_that_dies_ends_the_run_with_a_failure(serve):
    router = TokenRouter(hang_after=0)
    lengths = Lengths(4, 4)
    job = Job(
        routers=(await serve(router.add_to),),
        access=Access(),
        point=Point(concurrency=2, num_requests=2),
        share=Share(),
        workload=Workload(seed=0, prompt_tokens=lengths, output_tokens=lengths, vocab_size=10),
    )
    async with asyncio.timeout(60), Fleet.running(2) as fleet:
        running = asyncio.create_task(fleet.run(job, lambda elapsed_s, progress: None))
        await router.hangs.wait()
        fleet.processes[1].kill()
        with pytest.raises(errors.Internal, match="ended before its time"):
            await running


async def test_a_router_that_goes_away_leaves_failures_and_the_points_before(serve, pdserve, tmp_path):
    lost = errors.Unavailable("gone", reason="WORKER_LOST")
    run = await measured(
        pdserve, tmp_path, "--router", await serve(TokenRouter(error=lost, error_every=1).add_to), "--num-requests", "3"
    )
    (point,) = run["points"]
    assert point["requests"]["by_status"] == {"UNAVAILABLE WORKER_LOST": 3}
    assert point["ttft_ms"] is None


async def test_a_router_that_is_not_there_is_one_line(pdserve, unused_address):
    exit_code, _, stderr = await pdserve("bench", "--router", unused_address)
    assert (exit_code, stderr.count("\n")) == (1, 1)
    assert "UNREACHABLE" in stderr


async def test_lengths_beyond_the_context_are_refused_before_anything_is_sent(serve, pdserve):
    router = TokenRouter()
    argv = ["--prompt-tokens", "2000", "--output-tokens", "100", "--router", await serve(router.add_to)]
    exit_code, _, stderr = await pdserve("bench", *argv)
    assert (exit_code, router.requests) == (1, [])
    assert "beyond the context of 2048" in stderr


@pytest.mark.parametrize(
    "argv",
    [["--rate", "0"], ["--rate", "1", "--concurrency", "1"], ["--prompt-tokens", "9-1"], ["--arrivals", "never"]],
)
def test_wrong_usage_is_said_in_words(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["bench", *argv])
    assert "pdserve bench: error:" in capsys.readouterr().err


def test_a_file_of_prompts_may_have_every_form(tmp_path):
    lines = [
        {"prompt": "Once", "max_tokens": 7},
        {"prompt_token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "Hello"}]},
        "plain",
    ]
    expected = (
        FilePrompt("Once", 7),
        FilePrompt([5, 6], None),
        FilePrompt(Chat([Message("user", "Hi")]), None),
        FilePrompt("Hello", None),
        FilePrompt("plain", None),
    )
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "list.json").write_text(json.dumps(lines, indent=2))
    assert read_prompts(str(tmp_path / "lines.jsonl")) == expected
    assert read_prompts(str(tmp_path / "list.json")) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [('"fine"\n{', "line 2"), ('"fine"\n{"x": 1}', "line 2: expected a string"), ("", "there is none")],
)
def test_a_file_that_cannot_be_used_is_told_where(tmp_path, text, words):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_prompts(str(tmp_path / "prompts.jsonl"))


async def test_prompts_of_a_file_are_sent_in_their_order_again_and_again(serve, pdserve, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "max_tokens": 2}\n{"prompt": "b"}\n')
    router = TokenRouter()
    argv = ["--prompts", str(tmp_path / "prompts.jsonl"), "--concurrency", "1", "--num-requests", "3"]
    await measured(pdserve, tmp_path, "--router", await serve(router.add_to), *argv)
    asked = [(request.prompt, request.stopping.max_tokens) for request in router.requests]
    assert asked == [("a", 2), ("b", 6), ("a", 2)]


async def test_the_real_services_are_measured(pdserve, tmp_path):
    cluster = RealCluster()
    async with cluster.running():
        run = await measured(
            pdserve, tmp_path, "--router", cluster.address, "--rate", "20", "--num-requests", "8", "--text"
        )
    (point,) = run["points"]
    assert (point["requests"]["ok"], point["paths"], point["tokens"]["output_mean"]) == (8, {"REMOTE": 8}, 6.0)
    assert point["workers"] == {"prefill-0 → decode-0": 8}
    assert 0 < point["ttft_ms"]["p50"] < point["e2e_ms"]["p50"]
    assert {worker["role"] for worker in run["targets"][0]["workers"]} == {"PREFILL", "DECODE"}
