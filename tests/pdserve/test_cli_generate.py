from __future__ import annotations

import asyncio
import io
import json
import signal
import sys

import pytest

from common import errors
from common.clock import FakeClock
from pdserve.cli.summary import Stopwatch
from pdserve.v1 import router_pb2, types_pb2
from tests.pdserve.fakes import HANG, PATH, SCRIPT, FakeRouter, chunk, completion


@pytest.fixture
def generate(serve, pdserve):
    """`exit_code, stdout, stderr = await generate(fake_router, "Once", "--json", ...)`"""

    async def run(router, *argv):
        return await pdserve("generate", "--router", await serve(router.add_to), *argv)

    return run


def path(**fields):
    changed = types_pb2.ServingPath()
    changed.CopyFrom(PATH)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


async def test_stdout_is_the_text_alone(generate):
    exit_code, stdout, _ = await generate(FakeRouter(), "Once")
    assert (exit_code, stdout) == (0, "Once upon\n")


async def test_a_text_that_ends_its_line_gets_no_second_line_end(generate):
    _, stdout, _ = await generate(FakeRouter([chunk("a\n", 1), chunk("", 2), completion()]), "Once")
    assert stdout == "a\n"


async def test_stderr_tells_how_it_was_served(generate):
    _, _, stderr = await generate(FakeRouter(), "Once")
    lines = [line.split(maxsplit=1) for line in stderr.splitlines() if line]
    told = {label: value for label, value in lines if label not in ("first",)}
    assert told == {
        "tokens": "3 from 4 prompt tokens (0 cached)",
        "finished": "LENGTH: max_tokens, or the end of the context",
        "path": "prefill-a → decode-b",
        "KV": "REMOTE: computed by prefill, 245,760 bytes over gloo",
        "times": "queue 0.2 ms · prefill 12.0 ms · transfer 1.5 ms · first decode 1.23 s",
    }
    assert "first token" in stderr
    assert "tokens/s" in stderr


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_path": types_pb2.KV_PATH_LOCAL, "kv_bytes": 0}, "LOCAL: computed by the decode worker itself, no bytes"),
        ({"kv_path": types_pb2.KV_PATH_CACHED, "kv_bytes": 0}, "CACHED: decode held all of it already, no bytes"),
        ({"kv_path": types_pb2.KV_PATH_RECOMPUTED}, "RECOMPUTED: lost on the way and computed again, 245,760 bytes"),
        ({"prefill_worker": "decode-b"}, "path        decode-b alone"),
        ({"num_resumptions": 1}, "decode-b, 1 resumption"),
    ],
)
async def test_every_serving_path_has_its_words(generate, fields, words):
    _, _, stderr = await generate(FakeRouter([completion(path=path(**fields))]), "Once")
    assert words in stderr


@pytest.mark.parametrize(
    ("match", "words"),
    [({"stop_string": "\n\n"}, r"the string '\n\n' came"), ({"stop_token_id": 0}, "the end token 0 came")],
)
async def test_what_stopped_it_is_told(generate, match, words):
    end = completion(finish_reason=types_pb2.FINISH_REASON_STOP, **match)
    assert f"STOP: {words}" in (await generate(FakeRouter([end]), "Once"))[2]


async def test_json_is_one_object_a_line(generate):
    exit_code, stdout, stderr = await generate(FakeRouter(), "--json", "Once")
    first, second, last = map(json.loads, stdout.splitlines())
    assert (exit_code, stderr) == (0, "")
    assert first == {"request_id": "r-1", "chunk": {"token_ids": [11], "text": "Once "}}
    assert second["chunk"]["token_ids"] == [12, 13]
    assert last["completion"]["path"]["kv_path"] == "REMOTE"
    assert last["completion"]["usage"]["completion_tokens"] == 3
    assert last["client"]["first_token_ms"] > 0


async def test_every_flag_reaches_the_router(generate):
    router = FakeRouter()
    flags = "--max-tokens 5 --temperature 0 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 7 --stop a --stop b --timeout 30"
    await generate(router, *flags.split(), "Once")
    assert router.requests == [
        router_pb2.GenerateRequest(
            prompt="Once",
            sampling=types_pb2.SamplingParams(temperature=0, top_p=0.9, top_k=40, min_p=0.1, seed=7),
            stopping=types_pb2.StoppingParams(max_tokens=5, stop=["a", "b"]),
        )
    ]
    assert router.deadlines_s[0] < 31


async def test_without_flags_every_knob_stays_unset(generate):
    router = FakeRouter()
    await generate(router, "Once")
    assert router.requests == [router_pb2.GenerateRequest(prompt="Once")]


async def test_chat_is_a_turn_of_the_user(generate):
    router = FakeRouter()
    await generate(router, "--chat", "Hi")
    assert [(turn.role, turn.content) for turn in router.requests[0].chat.messages] == [("user", "Hi")]


async def test_a_dash_reads_standard_input_without_its_last_newline(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Es war\neinmal ü\n".encode())))
    router = FakeRouter()
    await generate(router, "-")
    assert router.requests[0].prompt == "Es war\neinmal ü"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.InvalidArgument("sampling.top_p must be in (0, 1], got 2.0", field="sampling.top_p"),
            "INVALID_ARGUMENT: sampling.top_p must be in (0, 1], got 2.0",
        ),
        (errors.InvalidArgument("too\nlong", field="prompt"), "INVALID_ARGUMENT, prompt: too long"),
        (
            errors.ResourceExhausted("the queue is full", retry_after_s=2.5, reason="QUEUE_FULL"),
            "RESOURCE_EXHAUSTED (QUEUE_FULL): the queue is full; try again in 2.5 s",
        ),
        (errors.DeadlineExceeded("too late"), "DEADLINE_EXCEEDED: too late; a longer --timeout may help"),
    ],
)
async def test_an_error_is_one_line_and_exit_code_1(generate, error, line):
    exit_code, stdout, stderr = await generate(FakeRouter([error]), "Once")
    assert (exit_code, stdout, stderr) == (1, "", f"pdserve: {line}\n")


async def test_an_error_in_the_middle_ends_the_line_first(generate):
    exit_code, stdout, stderr = await generate(FakeRouter([SCRIPT[0], errors.Unavailable("gone")]), "Once")
    assert (exit_code, stdout, stderr) == (1, "Once \n", "pdserve: UNAVAILABLE: gone\n")


async def test_an_unreachable_router_is_one_line(pdserve, unused_address):
    exit_code, _, stderr = await pdserve("generate", "--router", unused_address, "Once")
    assert exit_code == 1
    assert stderr.startswith(f"pdserve: UNAVAILABLE (UNREACHABLE): no connection to {unused_address}: ")
    assert stderr.count("\n") == 1


async def test_wait_gives_up_when_the_router_never_becomes_ready(generate):
    exit_code, stdout, stderr = await generate(FakeRouter(), "--wait", "0.2", "Once")
    assert (exit_code, stdout) == (1, "")
    assert "NOT_READY" in stderr


async def test_wait_goes_on_when_the_router_is_ready(generate):
    router = FakeRouter()
    router.health.set_ready(True)
    exit_code, stdout, _ = await generate(router, "--wait", "10", "Once")
    assert (exit_code, stdout) == (0, "Once upon\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["generate"],
        ["generate", "--router", "nowhere", "Once"],
        ["generate", "--router", "127.0.0.1:0", "Once"],
        ["generate", "--timeout", "-1", "Once"],
        ["generate", "--wait", "nan", "Once"],
        ["generate", "--max-tokens", "many", "Once"],
        ["generate", "--tempature", "1", "Once"],
        ["genrate", "Once"],
    ],
)
async def test_wrong_usage_is_exit_code_2(pdserve, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        await pdserve(*argv)
    assert caught.value.code == 2
    assert "usage: pdserve" in capsys.readouterr().err


async def read(process, num_characters):
    return await asyncio.wait_for(asyncio.to_thread(process.stdout.read, num_characters), 20)


async def ended(process):
    return await asyncio.wait_for(asyncio.to_thread(process.communicate), 20)


async def test_text_comes_as_it_is_made_and_ctrl_c_cancels_the_call(serve, spawn):
    router = FakeRouter([SCRIPT[0], HANG])
    process = spawn("-m", "pdserve", "generate", "--router", await serve(router.add_to), "Once")
    assert await read(process, 5) == "Once "
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(router.left.wait(), 20)
    stdout, stderr = await ended(process)
    assert (process.returncode, stdout, stderr) == (130, "\n", "pdserve: cancelled after 1 token\n")


async def test_a_reader_that_leaves_cancels_the_call(serve, spawn):
    router = FakeRouter([SCRIPT[0], *[chunk("x" * 1000, 1)] * 1000, HANG])
    process = spawn("-m", "pdserve", "generate", "--router", await serve(router.add_to), "Once")
    assert await read(process, 5) == "Once "
    process.stdout.close()
    stderr = await asyncio.wait_for(asyncio.to_thread(process.stderr.read), 20)
    assert await asyncio.wait_for(asyncio.to_thread(process.wait), 20) == 141
    assert stderr == ""


def test_pace_is_that_of_the_tokens_after_the_first_chunk():
    clock = FakeClock()
    stopwatch = Stopwatch(clock)
    assert (stopwatch.first_token_ms, stopwatch.tokens_per_s) == (None, None)
    clock.advance(0.5)
    stopwatch.count(2)
    assert (stopwatch.first_token_ms, stopwatch.tokens_per_s) == (500.0, None)
    clock.advance(2.0)
    stopwatch.count(10)
    clock.advance(1.0)
    stopwatch.count(0)
    assert (stopwatch.num_tokens, stopwatch.tokens_per_s) == (12, 5.0)
