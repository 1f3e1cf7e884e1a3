from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal

import grpc
import grpc.aio
import pytest

from common import errors, rpc
from pdserve.v1 import types_pb2

Ids = types_pb2.TokenIds
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
LEAVES = errors.PdserveError.__subclasses__()


class Failing:
    """One method of each kind, each failing with what `fail` raises."""

    def __init__(self, fail):
        self.fail = fail

    async def unary_unary(self, request, context):
        await self.fail()

    async def unary_stream(self, request, context):
        await self.fail()
        yield request

    async def stream_unary(self, requests, context):
        async for _ in requests:
            pass
        await self.fail()

    async def stream_stream(self, requests, context):
        async for request in requests:
            yield request
        await self.fail()

    async def writer(self, request, context):
        await context.write(request)
        await self.fail()

    def add_to(self, server):
        methods = {name: self._handler(name, name) for name in KINDS} | {
            "writer": self._handler("unary_stream", "writer")
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))

    def _handler(self, kind, name):
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(getattr(self, name), Ids.FromString, Ids.SerializeToString)


def raising(error):
    async def fail():
        raise error

    return fail


async def call(channel, kind, payload=b"", *, method=None, timeout=5):
    """Calls a method of test.Service with raw bytes and returns its raw responses."""
    stub = getattr(channel, kind)(f"/test.Service/{method or kind}")

    async def payloads():
        yield payload

    running = stub(payloads() if kind.startswith("stream") else payload, timeout=timeout)
    return [raw async for raw in running] if kind.endswith("stream") else [await running]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
async def test_every_error_arrives_as_its_own_class_from_every_kind_of_handler(serve, channel_to, leaf, kind):
    channel = channel_to(await serve(Failing(raising(leaf("too much", field="a.b", retry_after_s=2.5))).add_to))
    with pytest.raises(leaf) as caught, rpc.translate():
        await call(channel, kind)
    received = caught.value
    assert (received.message, received.field, received.retry_after_s) == ("too much", "a.b", 2.5)
    assert received.reason == leaf.default_reason


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_is_internal_and_logged_with_its_traceback(serve, channel_to, caplog, kind):
    channel = channel_to(await serve(Failing(raising(ZeroDivisionError("oops"))).add_to))
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(errors.Internal, match="ZeroDivisionError: oops"),
        rpc.translate(),
    ):
        await call(channel, kind)
    assert f"/test.Service/{kind}" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_bytes_that_do_not_parse_are_an_invalid_argument(serve, channel_to, kind):
    channel = channel_to(await serve(Failing(raising(AssertionError("reached the handler"))).add_to))
    with pytest.raises(errors.InvalidArgument, match="does not parse"), rpc.translate():
        await call(channel, kind, b"\xff\xff\xff")


@pytest.mark.parametrize("method", ["unary_stream", "writer"])
async def test_an_error_after_responses_follows_them(serve, channel_to, method):
    class Late(Failing):
        async def unary_stream(self, request, context):
            yield request
            await self.fail()

    channel = channel_to(await serve(Late(raising(errors.Unavailable("gone"))).add_to))
    running = channel.unary_stream(f"/test.Service/{method}")(b"", timeout=5)
    assert await running.read() == b""
    with pytest.raises(errors.Unavailable), rpc.translate():
        await running.read()


async def test_the_error_of_a_task_group_is_its_first_domain_error(serve, channel_to):
    async def fail():
        async with asyncio.TaskGroup() as group:
            group.create_task(raising(errors.NotFound("no such model"))())

    channel = channel_to(await serve(Failing(fail).add_to))
    with pytest.raises(errors.NotFound), rpc.translate():
        await call(channel, "unary_unary")


async def test_a_bug_beside_a_domain_error_stays_a_bug(serve, channel_to):
    async def fail():
        raise ExceptionGroup("both", [errors.NotFound("no such model"), KeyError("x")])

    channel = channel_to(await serve(Failing(fail).add_to))
    with pytest.raises(errors.Internal), rpc.translate():
        await call(channel, "unary_unary")


async def test_a_cancelled_inner_task_does_not_leave_the_caller_waiting(serve, channel_to):
    async def fail():
        inner = asyncio.create_task(asyncio.Event().wait())
        inner.cancel()
        await inner

    channel = channel_to(await serve(Failing(fail).add_to))
    with pytest.raises(errors.Internal, match="CancelledError"), rpc.translate():
        await call(channel, "unary_unary")


async def test_a_response_of_the_wrong_type_is_internal(serve, channel_to):
    async def fail():
        return None

    channel = channel_to(await serve(Failing(fail).add_to))
    with pytest.raises(errors.Internal), rpc.translate():
        await call(channel, "unary_unary")


async def test_an_abort_by_the_handler_keeps_its_status(serve, channel_to):
    class Aborting(Failing):
        async def unary_unary(self, request, context):
            await context.abort(grpc.StatusCode.NOT_FOUND, "not here")

    channel = channel_to(await serve(Aborting(None).add_to))
    with pytest.raises(errors.NotFound, match="not here"), rpc.translate():
        await call(channel, "unary_unary")


async def test_a_very_long_message_does_not_cost_the_status(serve, channel_to):
    channel = channel_to(await serve(Failing(raising(errors.InvalidArgument("ü" * 100_000, field="prompt"))).add_to))
    with pytest.raises(errors.InvalidArgument, match=r"^ü+ …$") as caught, rpc.translate():
        await call(channel, "unary_unary")
    assert caught.value.field == "prompt"


async def test_a_call_cancelled_by_the_other_side_does_not_look_like_the_callers_own_cancellation(serve, channel_to):
    channel = channel_to(await serve(Failing(raising(errors.Cancelled("stopped"))).add_to))
    running = channel.stream_stream("/test.Service/stream_stream")(timeout=5)
    await running.done_writing()
    await running.code()
    with pytest.raises(errors.Cancelled), rpc.translate():
        await running.wait_for_connection()


async def test_the_callers_own_cancellation_passes_through_translate(serve, channel_to):
    async def call_for_ever():
        with rpc.translate():
            await call(channel, "unary_unary")

    channel = channel_to(await serve(Failing(asyncio.Event().wait).add_to))
    caller = asyncio.create_task(call_for_ever())
    await asyncio.wait([caller], timeout=0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
async def test_a_caller_who_leaves_runs_the_handlers_finally(serve, channel_to, kind):
    started, ended = asyncio.Event(), asyncio.Event()

    async def fail():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    channel = channel_to(await serve(Failing(fail).add_to))
    caller = asyncio.create_task(call(channel, kind))
    await asyncio.wait_for(started.wait(), 5)
    caller.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    # gRPC may be quicker to end the call than asyncio to cancel who waits for it.
    (outcome,) = await asyncio.wait_for(asyncio.gather(caller, return_exceptions=True), 5)
    assert isinstance(outcome, asyncio.CancelledError) or outcome.code() is grpc.StatusCode.CANCELLED


async def test_a_generator_blocked_on_a_slow_reader_is_closed_when_the_reader_leaves(serve, channel_to):
    closed = asyncio.Event()

    class Endless(Failing):
        async def unary_stream(self, request, context):
            try:
                while True:
                    yield Ids(ids=range(100_000))
            finally:
                closed.set()

    channel = channel_to(await serve(Endless(None).add_to))
    running = channel.unary_stream("/test.Service/unary_stream")(b"", timeout=5)
    await running.read()
    running.cancel()
    await asyncio.wait_for(closed.wait(), 5)


@pytest.mark.parametrize(
    ("timeout", "expected"), [(None, lambda left: left is None), (30, lambda left: 29 < left < 31)]
)
async def test_a_handler_knows_what_is_left_of_the_deadline(serve, channel_to, timeout, expected):
    seen = []

    class Asking(Failing):
        async def unary_unary(self, request, context):
            seen.append(rpc.time_remaining(context))
            return request

    channel = channel_to(await serve(Asking(None).add_to))
    await call(channel, "unary_unary", timeout=timeout)
    assert expected(seen[0])


async def test_a_refused_connection_is_unavailable(unused_address, channel_to):
    with pytest.raises(errors.Unavailable), rpc.translate():
        await call(channel_to(unused_address), "unary_unary")


async def test_a_port_in_use_is_refused_by_name(serve):
    address = await serve(Failing(None).add_to)
    with pytest.raises(OSError, match=f"cannot listen on {address}: Address already in use"):
        rpc.bind(rpc.create_server(), address)


async def test_routers_may_share_a_port_when_both_ask_to():
    first, second = rpc.create_server(reuse_port=True), rpc.create_server(reuse_port=True)
    port = rpc.bind(first, "127.0.0.1:0", reuse_port=True)
    assert rpc.bind(second, f"127.0.0.1:{port}", reuse_port=True) == port


SERVER = """
import asyncio, grpc
from common import rpc
async def forever(request, context):
    yield request
    await asyncio.Event().wait()
async def main():
    handler = grpc.unary_stream_rpc_method_handler(forever, bytes, bytes)
    server = rpc.create_server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"unary_stream": handler}),))
    print(rpc.bind(server, "127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""

CLIENT = """
import asyncio, sys
from common import rpc
async def main():
    async with rpc.connect(sys.argv[1]) as channel:
        async for _ in channel.unary_stream("/test.Service/unary_stream")(b""):
            print("reading", flush=True)
asyncio.run(main())
"""


async def test_a_stopped_server_is_noticed_within_two_seconds(spawn, channel_to):
    server = spawn("-c", SERVER)
    port = await asyncio.to_thread(server.stdout.readline)
    channel = channel_to(f"127.0.0.1:{port.strip()}")
    running = channel.unary_stream("/test.Service/unary_stream")(b"")
    await running.read()
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(errors.Unavailable), rpc.translate():
        await asyncio.wait_for(running.read(), 2.5)


async def test_a_stopped_client_is_noticed_within_two_seconds(serve, spawn):
    left = asyncio.Event()

    class Endless(Failing):
        async def unary_stream(self, request, context):
            try:
                yield request
                await asyncio.Event().wait()
            finally:
                left.set()

    client = spawn("-c", CLIENT, await serve(Endless(None).add_to))
    assert await asyncio.to_thread(client.stdout.readline) == "reading\n"
    client.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(left.wait(), 2.5)


@pytest.mark.slow
async def test_an_idle_stream_lives(serve, channel_to):
    class Idle(Failing):
        async def unary_stream(self, request, context):
            yield request
            await asyncio.Event().wait()

    channel = channel_to(await serve(Idle(None).add_to))
    running = channel.unary_stream("/test.Service/unary_stream")(b"")
    await running.read()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(running.read(), 8)


async def test_a_peer_that_comes_back_is_met_again(serve, channel_to):
    class Echo(Failing):
        async def unary_unary(self, request, context):
            return request

    first = rpc.create_server()
    Echo(None).add_to(first)
    port = rpc.bind(first, "127.0.0.1:0")
    await first.start()
    channel = channel_to(f"127.0.0.1:{port}")
    await call(channel, "unary_unary")
    await first.stop(None)
    with pytest.raises(errors.Unavailable), rpc.translate():
        await call(channel, "unary_unary")
    second = rpc.create_server()
    Echo(None).add_to(second)
    rpc.bind(second, f"127.0.0.1:{port}")
    await second.start()
    await asyncio.wait_for(channel.channel_ready(), 5)
    await call(channel, "unary_unary")
    await second.stop(None)


async def test_metadata_beyond_8_kib_is_exhaustion_said_by_grpc(serve, channel_to):
    async def nothing():
        return None

    channel = channel_to(await serve(Failing(nothing).add_to))
    stub = channel.stream_unary("/test.Service/stream_unary")
    with pytest.raises(errors.ResourceExhausted), rpc.translate():
        await stub(iter([b""]), timeout=5, metadata=(("long", "x" * 9000),))


async def test_a_message_beyond_16_mib_is_exhaustion_said_by_grpc(serve, channel_to):
    channel = channel_to(await serve(Failing(raising(AssertionError("reached the handler"))).add_to))
    with pytest.raises(errors.ResourceExhausted), rpc.translate():
        await call(channel, "unary_unary", bytes(rpc.MAX_MESSAGE_BYTES + 1))


async def test_a_connection_of_age_is_left_for_another_and_no_call_is_lost():
    async def told(request, context):
        return types_pb2.TokenIds(ids=[int(context.peer().rpartition(":")[2])])

    async def count(request, context):
        for number in itertools.count():
            yield types_pb2.TokenIds(ids=[number])
            if await request_to_end(number):
                return

    ended = asyncio.Event()

    async def request_to_end(number):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), 0.01)
        return ended.is_set()

    server = rpc.create_server(max_connection_age_s=0.2)
    methods = {
        "port": grpc.unary_unary_rpc_method_handler(told, Ids.FromString, Ids.SerializeToString),
        "count": grpc.unary_stream_rpc_method_handler(count, Ids.FromString, Ids.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))
    port = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    async with rpc.connect(f"127.0.0.1:{port}") as channel:
        running = channel.unary_stream("/test.Service/count", Ids.SerializeToString, Ids.FromString)(Ids(), timeout=60)
        reading = asyncio.ensure_future(collected(running))
        client_ports = set()
        while len(client_ports) < 3:
            call = channel.unary_unary("/test.Service/port", Ids.SerializeToString, Ids.FromString)
            client_ports.update((await call(Ids(), timeout=30)).ids)
        ended.set()
        # What was running when its connection came of age has not missed anything.
        numbers = await reading
    assert numbers == list(range(len(numbers)))
    await server.stop(0)


async def collected(messages):
    return [message.ids[0] async for message in messages]
