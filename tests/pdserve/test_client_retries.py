"""What a client does when routers fail it, over real channels, with time in the tests' hands."""

from __future__ import annotations

import contextlib

import pytest

from common import errors
from common.clock import FakeClock
from pdserve.client import AsyncClient
from pdserve.connection import Connection
from pdserve.results import Chunk
from pdserve.retrying import RetryPolicy
from pdserve.v1 import router_pb2, router_pb2_grpc
from tests.pdserve.fakes import SCRIPT, FakeRouter, chunk, completion

STOPPING = errors.Unavailable("the router is stopping", reason="DRAINING")
FULL = errors.ResourceExhausted("the queue is full", retry_after_s=2.0, reason="QUEUE_FULL")
LOST = errors.Unavailable("lost", reason="WORKER_LOST")


class Naps:
    """A clock, and the sleep that moves it; `naps` is what was slept."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.naps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.clock.advance(seconds)


@pytest.fixture
def time() -> Naps:
    return Naps()


@pytest.fixture
async def client_of(serve, time):
    """`client = await client_of(router, ...)`: of these routers, and the addresses that are given as text."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(*routers: FakeRouter | str, retries: int = 5) -> AsyncClient:
            targets = [one if isinstance(one, str) else await serve(one.add_to) for one in routers]
            policy = RetryPolicy(retries=retries, chance=lambda: 0.0)
            client = AsyncClient(targets, retries=policy, clock=time.clock, sleep=time.sleep)
            return await stack.enter_async_context(client)

        yield connect


async def texts_of(events) -> list[str]:
    return [event.text async for event in events if isinstance(event, Chunk)]


async def test_a_router_that_is_stopping_sends_the_client_to_another(client_of, time):
    stopping, other = FakeRouter(failures=[STOPPING] * 9), FakeRouter()
    client = await client_of(stopping, other)
    for _ in range(3):
        assert await texts_of(client.generate("Once")) == ["Once ", "upon"]
    assert (len(stopping.requests), len(other.requests), time.naps) == (1, 3, [0.0])


async def test_where_nothing_listens_another_router_answers(client_of, unused_address):
    client = await client_of(unused_address, FakeRouter())
    assert (await client.complete("Once")).text == "Once upon"
    assert (await client.get_model()).model_id == "tiny"


async def test_calls_take_turns_over_the_routers(client_of):
    routers = [FakeRouter(), FakeRouter()]
    client = await client_of(*routers)
    for _ in range(4):
        await client.complete("Once")
    assert [len(router.requests) for router in routers] == [2, 2]


async def test_a_full_queue_is_waited_for_as_long_as_the_router_says(client_of, time):
    client = await client_of(FakeRouter(failures=[FULL, FULL]))
    assert (await client.complete("Once")).text == "Once upon"
    assert time.naps == [2.0, 2.0]


async def test_a_deadline_that_leaves_no_time_to_wait_gives_the_error_at_once(client_of, time):
    client = await client_of(FakeRouter(failures=[FULL]))
    with pytest.raises(errors.ResourceExhausted, match="the queue is full"):
        await client.complete("Once", timeout_s=1.5)
    assert time.naps == []


async def test_a_later_try_has_what_is_left_of_the_deadline(client_of):
    router = FakeRouter(failures=[errors.ResourceExhausted("full", retry_after_s=200.0)] * 2)
    await (await client_of(router)).complete("Once", timeout_s=600.0)
    # gRPC rounds what it sends.
    assert router.deadlines_s == pytest.approx([600, 400, 200], rel=0.1)


async def test_the_last_error_is_raised_when_the_retries_are_used_up(client_of, time):
    router = FakeRouter(failures=[FULL, LOST, STOPPING])
    with pytest.raises(errors.Unavailable, match="the router is stopping"):
        await (await client_of(router, retries=2)).complete("Once")
    assert (len(router.requests), time.naps) == (3, [2.0, 0.2])


async def test_without_retries_the_first_error_is_raised(client_of):
    router = FakeRouter(failures=[FULL])
    with pytest.raises(errors.ResourceExhausted):
        await (await client_of(router, retries=0)).complete("Once")
    assert len(router.requests) == 1


async def test_an_error_that_trying_again_cannot_help_is_raised_at_once(client_of, time):
    routers = FakeRouter(failures=[errors.InvalidArgument("bad", field="prompt")]), FakeRouter()
    with pytest.raises(errors.InvalidArgument):
        await (await client_of(*routers)).complete("Once")
    assert (len(routers[1].requests), time.naps) == (0, [])


async def test_once_text_is_out_a_stream_is_not_begun_again(client_of):
    broken, other = FakeRouter([SCRIPT[0], LOST]), FakeRouter()
    events = (await client_of(broken, other)).generate("Once")
    assert (await anext(events)).text == "Once "
    with pytest.raises(errors.Unavailable, match="lost"):
        await anext(events)
    assert other.requests == []


async def test_a_whole_completion_that_is_lost_in_the_middle_is_made_again(client_of):
    broken, other = FakeRouter([chunk("lost ", 9), LOST]), FakeRouter()
    assert (await (await client_of(broken, other)).complete("Once")).text == "Once upon"


async def test_a_request_id_that_a_lost_call_still_holds_is_waited_for(client_of, time):
    router = FakeRouter(failures=[LOST, errors.AlreadyExists("in flight")])
    await (await client_of(router)).complete("Once", request_id="mine")
    assert ([request.request_id for request in router.requests], time.naps) == (["mine"] * 3, [0.1, 0.2])


async def test_lookups_are_tried_again(client_of, time):
    client = await client_of(FakeRouter(failures=[STOPPING]))
    assert (await client.get_model()).model_id == "tiny"
    assert time.naps == [0.1]


async def test_waiting_ends_when_one_of_the_routers_is_ready(client_of, unused_address):
    ready = FakeRouter()
    ready.health.set_ready(True)
    await (await client_of(unused_address, FakeRouter(), ready)).wait_until_ready(30)


async def test_a_router_that_starts_again_is_met_again(serve, unused_address):
    """With real time: the connection comes back by itself."""
    async with AsyncClient(unused_address, retries=RetryPolicy(retries=100, max_wait_s=0.1)) as client:
        with pytest.raises(errors.Unavailable):
            await client.get_model(timeout_s=0.3)
        router = FakeRouter()
        await serve(router.add_to, unused_address)
        assert (await client.complete("Once", timeout_s=30)).text == "Once upon"


async def test_a_name_that_leads_to_several_routers_is_all_of_them(serve):
    routers = FakeRouter([completion()]), FakeRouter([completion()])
    addresses = [await serve(router.add_to) for router in routers]
    # What gRPC makes of a name with several addresses.
    async with Connection("ipv4:" + ",".join(addresses)) as connection:
        generate = router_pb2_grpc.RouterServiceStub(connection.channel).Generate
        while not all(router.requests for router in routers):
            async for _ in generate(router_pb2.GenerateRequest(prompt="Once"), timeout=30, wait_for_ready=True):
                pass
