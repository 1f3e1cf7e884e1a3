"""The client for those without an event loop. The services live in the test's loop, the calls are made in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import textwrap

import pytest

from common import errors
from pdserve.request import Chat, Message
from pdserve.results import Chunk
from pdserve.sync_client import Client
from tests.pdserve.fakes import HANG, FakeRouter, chunk

PATIENCE_S = 20


@pytest.fixture
async def client_of(serve):
    """`client = await client_of(fake_router, ...)`"""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(*routers: FakeRouter, **settings) -> Client:
            client = Client([await serve(router.add_to) for router in routers], **settings)
            stack.push_async_callback(asyncio.to_thread, client.close)
            return client

        yield connect


async def test_a_completion_is_chunks_and_then_one_completion(client_of):
    client = await client_of(FakeRouter())
    *chunks, end = await asyncio.to_thread(lambda: list(client.generate("Once", max_tokens=3)))
    assert [(event.text, event.token_ids) for event in chunks] == [("Once ", (11,)), ("upon", (12, 13))]
    assert (end.finish_reason, end.path.kv_path) == ("LENGTH", "REMOTE")


async def test_whole_replies_and_lookups(client_of):
    router = FakeRouter()
    router.health.set_ready(True)
    client = await client_of(router)

    def ask():
        client.wait_until_ready(PATIENCE_S)
        assert client.complete([1, 2], temperature=0.0).text == "Once upon"
        assert client.chat([{"role": "user", "content": "Hi"}], max_tokens=2).text == "Once upon"
        assert next(client.generate(Chat([Message("user", "Hi")]))).text == "Once "
        assert client.get_model().model_id == "tiny"
        assert len(client.list_workers().workers) == 2
        assert client.explain("Once").num_queued_requests == client.explain_request("r-1").num_queued_requests == 2

    await asyncio.to_thread(ask)
    assert router.requests[0].prompt_token_ids.ids == [1, 2]
    assert router.requests[1].chat.messages[0].content == "Hi"


async def test_failures_are_raised_where_the_caller_is(client_of):
    client = await client_of(FakeRouter([chunk("a", 1), errors.DataLoss("broken")]))
    with pytest.raises(errors.DataLoss, match="broken"):
        await asyncio.to_thread(client.complete, "Once")
    with pytest.raises(errors.DataLoss, match="broken"):
        await asyncio.to_thread(lambda: list(client.generate("Once")))


async def test_another_router_is_asked_when_one_is_stopping(client_of):
    stopping = FakeRouter(failures=[errors.Unavailable("the router is stopping", reason="DRAINING")] * 9)
    client = await client_of(stopping, FakeRouter())
    assert (await asyncio.to_thread(client.complete, "Once")).text == "Once upon"
    assert (await asyncio.to_thread(client.complete, "Once")).text == "Once upon"


async def test_leaving_the_loop_early_cancels_the_work(client_of):
    router = FakeRouter([chunk("a", 1), HANG])
    client = await client_of(router)

    def read_one():
        for event in client.generate("Once"):
            return event

    assert isinstance(await asyncio.to_thread(read_one), Chunk)
    await asyncio.wait_for(router.left.wait(), PATIENCE_S)


async def test_threads_share_a_client(client_of):
    client = await client_of(FakeRouter())
    replies = await asyncio.gather(*(asyncio.to_thread(client.complete, "Once") for _ in range(8)))
    assert {reply.text for reply in replies} == {"Once upon"}


@pytest.mark.parametrize("call", ["list(client.generate('Once'))", "client.complete('Once')"])
async def test_ctrl_c_is_a_keyboard_interrupt_and_cancels_the_work(serve, spawn, call):
    router = FakeRouter([chunk("a", 1), HANG])
    address = await serve(router.add_to)
    process = spawn("-c", f"import pdserve\nclient = pdserve.Client({address!r})\n{call}")
    await asyncio.wait_for(router.hangs.wait(), PATIENCE_S)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(router.left.wait(), PATIENCE_S)
    _, stderr = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    assert stderr.endswith("KeyboardInterrupt\n")


def test_a_process_that_forked_says_that_it_cannot_use_the_client_it_inherited(spawn):
    code = """
        import os, pdserve
        client = pdserve.Client("127.0.0.1:1", retries=0)
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        client.get_model()
    """
    process = spawn("-c", textwrap.dedent(code))
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, "spawn" in stderr) == (1, True), stderr
