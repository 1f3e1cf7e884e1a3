from __future__ import annotations

import asyncio
import contextlib

import pytest

from common import errors, rpc
from pdserve.client import AsyncClient
from pdserve.request import Chat, Message
from pdserve.results import Chunk, Completion, Usage
from pdserve.v1 import router_pb2, types_pb2
from tests.pdserve.fakes import HANG, FakeRouter, chunk, completion


@pytest.fixture
async def client_of(serve):
    """`client = await client_of(fake_router)`"""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(router: FakeRouter, **settings) -> AsyncClient:
            return await stack.enter_async_context(AsyncClient(await serve(router.add_to), **settings))

        yield connect


@contextlib.asynccontextmanager
async def listening(address, add_servicers):
    server = rpc.create_server()
    add_servicers(server)
    rpc.bind(server, address)
    await server.start()
    yield
    await server.stop(None)


async def events_of(client, prompt="Once", **options):
    return [event async for event in client.generate(prompt, **options)]


async def request_of(client_of, prompt="Once", **options) -> router_pb2.GenerateRequest:
    router = FakeRouter()
    await events_of(await client_of(router), prompt, **options)
    return router.requests[0]


async def test_a_completion_is_chunks_and_then_one_completion(client_of):
    *chunks, end = await events_of(await client_of(FakeRouter()))
    assert [(event.text, event.token_ids) for event in chunks] == [("Once ", (11,)), ("upon", (12, 13))]
    assert {event.request_id for event in (*chunks, end)} == {"r-1"}
    assert (end.finish_reason, end.stop_string, end.stop_token_id) == ("LENGTH", None, None)
    assert end.usage == Usage(prompt_tokens=4, completion_tokens=3, cached_prompt_tokens=0)
    assert (end.path.prefill_worker, end.path.kv_path, end.path.kv_bytes) == ("prefill-a", "REMOTE", 245_760)


async def test_options_reach_the_router_and_those_left_out_stay_unset(client_of):
    request = await request_of(client_of, temperature=0.0, seed=7, top_p=None, stop=["a", "b"], request_id="mine")
    assert request == router_pb2.GenerateRequest(
        request_id="mine",
        prompt="Once",
        sampling=types_pb2.SamplingParams(temperature=0.0, seed=7),
        stopping=types_pb2.StoppingParams(stop=["a", "b"]),
    )


async def test_token_ids_are_a_prompt(client_of):
    assert (await request_of(client_of, [1, 2])).prompt_token_ids.ids == [1, 2]


async def test_a_chat_is_a_prompt_and_its_template_variables_are_json(client_of):
    chat = (await request_of(client_of, Chat([Message("user", "Hi")], {"enable_thinking": False}))).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("user", "Hi")]
    assert dict(chat.template_kwargs) == {"enable_thinking": "false"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"max_tokens": 2**40}, "stopping.max_tokens"),
        ({"stop": [1]}, "stopping.stop"),
    ],
)
async def test_a_value_that_no_field_can_hold_is_an_invalid_argument_of_that_field(client_of, options, field):
    router = FakeRouter()
    with pytest.raises(errors.InvalidArgument) as caught:
        await events_of(await client_of(router), **options)
    assert caught.value.field == field
    assert router.requests == []


async def test_a_prompt_that_is_not_unicode_is_an_invalid_argument(client_of):
    with pytest.raises(errors.InvalidArgument, match="prompt"):
        await events_of(await client_of(FakeRouter()), "\udcff")


async def test_log_probabilities_are_values(client_of):
    logprob = types_pb2.TokenLogprob(token_id=11, logprob=-0.5, rank=2, top=[{"token_id": 9, "logprob": -0.25}])
    message = router_pb2.GenerateResponse(chunk=router_pb2.TokenChunk(token_ids=[11], logprobs=[logprob]))
    first, _ = await events_of(await client_of(FakeRouter([message, completion()])))
    assert first.logprobs == ((11, -0.5, 2, ((9, -0.25),)),)


async def test_an_event_and_a_name_of_a_newer_router_do_no_harm(client_of):
    events = await events_of(await client_of(FakeRouter([router_pb2.GenerateResponse(), completion(finish_reason=99)])))
    assert [event.finish_reason for event in events] == ["99"]


async def test_the_deadline_travels_with_the_call(client_of):
    router = FakeRouter()
    client = await client_of(router)
    await events_of(client)
    await events_of(client, timeout_s=30)
    assert [round(deadline_s, -1) for deadline_s in router.deadlines_s] == [600, 30]


async def test_a_deadline_that_passes_is_deadline_exceeded(client_of):
    with pytest.raises(errors.DeadlineExceeded):
        await events_of(await client_of(FakeRouter([HANG])), timeout_s=0.05)


async def test_closing_the_iterator_cancels_the_work(client_of):
    router = FakeRouter([chunk("a", 1), HANG])
    client = await client_of(router)
    async with contextlib.aclosing(client.generate("Once")) as events:
        assert isinstance(await anext(events), Chunk)
    await asyncio.wait_for(router.left.wait(), 5)


async def test_cancelling_the_reader_cancels_the_work(client_of):
    router = FakeRouter([chunk("a", 1), HANG])
    reading = asyncio.create_task(events_of(await client_of(router)))
    await asyncio.wait_for(router.hangs.wait(), 5)
    reading.cancel()
    await asyncio.wait_for(router.left.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize("leaf", errors.PdserveError.__subclasses__())
async def test_every_error_of_the_router_is_its_own_class(client_of, leaf):
    router = FakeRouter([chunk("a", 1), leaf("too much", field="a.b", retry_after_s=2.0, reason="WHY")])
    with pytest.raises(leaf, match="too much") as caught:
        await events_of(await client_of(router))
    assert (caught.value.field, caught.value.retry_after_s, caught.value.reason) == ("a.b", 2.0, "WHY")


async def test_an_address_where_nothing_listens_is_named(unused_address):
    async with AsyncClient(unused_address, retries=0) as client:
        with pytest.raises(errors.Unavailable, match=rf"no connection to {unused_address}: .*refused") as caught:
            await client.get_model()
    assert caught.value.reason == "UNREACHABLE"


async def test_a_router_that_is_unavailable_itself_is_not_called_unreachable(client_of):
    with pytest.raises(errors.Unavailable, match=r"^no worker$") as caught:
        await events_of(await client_of(FakeRouter([errors.Unavailable("no worker")]), retries=0))
    assert caught.value.reason == "UNAVAILABLE"


async def test_another_service_at_that_address_is_a_failed_precondition(serve):
    async with AsyncClient(await serve(lambda server: None)) as client:
        with pytest.raises(errors.FailedPrecondition, match="another service"):
            await client.get_model()


async def test_a_stream_that_just_ends_is_an_error(client_of):
    with pytest.raises(errors.Internal, match="without a completion"):
        await events_of(await client_of(FakeRouter([chunk("a", 1)])))


async def test_get_model_and_list_workers(client_of):
    client = await client_of(FakeRouter())
    model, known = await client.get_model(), await client.list_workers()
    assert (model.model_id, model.has_tokenizer, model.model_fingerprints) == ("tiny", True, ("f",))
    assert [(one.role, one.state) for one in known.workers] == [("PREFILL", "SERVING"), ("DECODE", "UNREACHABLE")]
    assert not known.degraded


async def test_waiting_ends_when_the_router_becomes_ready(client_of):
    router = FakeRouter()
    waiting = asyncio.create_task((await client_of(router)).wait_until_ready(10))
    router.health.set_ready(True)
    await asyncio.wait_for(waiting, 5)


async def test_waiting_in_vain_for_a_router_that_is_up_says_so(client_of):
    client = await client_of(FakeRouter())
    await client.get_model()
    with pytest.raises(errors.Unavailable, match="it is up, but not ready"):
        await client.wait_until_ready(0.5)


async def test_waiting_in_vain_where_nothing_listens_says_so(unused_address):
    async with AsyncClient(unused_address) as client:
        with pytest.raises(errors.Unavailable, match="nothing answered"):
            await client.wait_until_ready(0.2)


async def test_waiting_starts_before_the_router_does(unused_address):
    router = FakeRouter()
    router.health.set_ready(True)
    async with AsyncClient(unused_address) as client:
        waiting = asyncio.create_task(client.wait_until_ready(10))
        async with listening(unused_address, router.add_to):
            await asyncio.wait_for(waiting, 5)


async def test_events_are_values(client_of):
    first = await events_of(await client_of(FakeRouter()))
    second = await events_of(await client_of(FakeRouter()))
    assert first == second
    assert isinstance(first[-1], Completion)


async def test_a_whole_completion_is_one_reply(client_of):
    logprob = types_pb2.TokenLogprob(token_id=11, logprob=-0.5, rank=1)
    first = router_pb2.GenerateResponse(
        request_id="r-1", chunk=router_pb2.TokenChunk(token_ids=[11], text="Once ", logprobs=[logprob])
    )
    end = completion(finish_reason=types_pb2.FINISH_REASON_STOP, stop_token_id=2)
    reply = await (await client_of(FakeRouter([first, chunk("upon", 12, 13), end]))).complete("Once", num_logprobs=0)
    assert (reply.request_id, reply.text, reply.token_ids) == ("r-1", "Once upon", (11, 12, 13))
    assert (reply.finish_reason, reply.stop_string, reply.stop_token_id) == ("STOP", None, 2)
    assert (reply.logprobs, reply.prompt_logprobs) == (((11, -0.5, 1, ()),), ())
    assert (reply.usage.prompt_tokens, reply.path.kv_path) == (4, "REMOTE")
    assert (reply["text"], reply["token_ids"]) == (reply.text, reply.token_ids)
    with pytest.raises(KeyError, match="txt"):
        reply["txt"]


async def test_a_conversation_is_messages_or_dictionaries(client_of):
    router = FakeRouter()
    client = await client_of(router)
    turns = [Message("system", "Be brief."), {"role": "user", "content": "Hi"}]
    reply = await client.chat(turns, template_kwargs={"enable_thinking": False}, max_tokens=3)
    assert reply.text == "Once upon"
    (request,) = router.requests
    assert [(turn.role, turn.content) for turn in request.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert dict(request.chat.template_kwargs) == {"enable_thinking": "false"}
    assert request.stopping.max_tokens == 3


async def test_a_message_without_its_fields_is_an_invalid_argument(client_of):
    with pytest.raises(errors.InvalidArgument, match="chat"):
        await (await client_of(FakeRouter())).chat([{"role": "user", "text": "Hi"}])


async def test_leaving_the_loop_early_cancels_the_work(client_of):
    router = FakeRouter([chunk("a", 1), HANG])
    client = await client_of(router)
    async for _ in client.generate("Once"):
        break
    await asyncio.wait_for(router.left.wait(), 5)


async def test_cancelling_a_whole_completion_cancels_the_work(client_of):
    router = FakeRouter([chunk("a", 1), HANG])
    client = await client_of(router)
    waiting = asyncio.create_task(client.complete("Once"))
    await asyncio.wait_for(router.hangs.wait(), 5)
    waiting.cancel()
    await asyncio.wait_for(router.left.wait(), 5)


async def test_a_client_that_was_never_used_closes():
    async with AsyncClient() as client:
        assert client.targets == ("127.0.0.1:50051",)
