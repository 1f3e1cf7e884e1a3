"""PairServer against a client that speaks the protocol by hand, and badly."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest

from common import errors
from common.config import DecodeConfig
from common.errors import FailedPrecondition, InvalidArgument, Unavailable
from common.transport import wire
from common.transport.authentication import Credentials, authenticate
from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import PREFILL_RANK, PairBroken
from common.transport.messages import (
    AttemptBegin,
    AttemptKey,
    ChunkHeader,
    Goodbye,
    PairHello,
    PairWelcome,
    ReservationGone,
)
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2, decode_pb2_grpc
from tests.common.transport.fakes import (
    DECODE,
    GLOO,
    PREFILL,
    WAIT_S,
    FakeEngine,
    FakeReservation,
    PairServicer,
    small_cache,
    until_async,
)

A = AttemptKey(7, 1)


class Client:
    """Prefill's end of one stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = decode_pb2_grpc.DecodeServiceStub(channel).ConnectPair(timeout=WAIT_S)
        self.joining: GlooJoining | None = None
        self.group: GlooGroup | None = None

    async def say(self, message) -> None:
        await self.call.write(wire.request_to_proto(message))

    async def hear(self):
        response = await self.call.read()
        return None if response is grpc.aio.EOF else wire.response_from_proto(response)

    async def hello(self, *, transports=("gloo",), rendezvous: bytes | None = None, **identity) -> PairWelcome:
        self.joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=WAIT_S)
        own = await self.joining.rendezvous()
        identity = dataclasses.replace(PREFILL, **identity)
        await self.say(PairHello(identity, transports, own if rendezvous is None else rendezvous))
        welcome = await self.hear()
        assert isinstance(welcome, PairWelcome)
        return welcome

    async def join(self, welcome: PairWelcome, **credentials) -> None:
        """Meets decode on the process group."""
        self.group = await self.joining.connect(welcome.rendezvous)
        own = Credentials(welcome.token, PREFILL.boot_id, welcome.boot_id)._replace(**credentials)
        await asyncio.to_thread(authenticate, self.group, PREFILL_RANK, own, timeout_s=WAIT_S)

    async def last_words(self) -> str:
        """The reason of decode's goodbye, after which the stream ends well."""
        while not isinstance(message := await self.hear(), Goodbye):
            assert message is not None
        assert await self.hear() is None
        return message.reason


class Server:
    def __init__(self, engine: FakeEngine, pairs: PairServer) -> None:
        self.engine = engine
        self.pairs = pairs


@pytest.fixture
async def decode(serve, channel_to) -> AsyncIterator:
    """A decode worker as far as pairs go, and `client()` to talk to it."""
    engine = FakeEngine(small_cache())
    engine.reservations[7] = FakeReservation(1, [0, 1])
    config = DecodeConfig(staging_chunks=2, max_chunk_bytes=4096)
    server = Server(engine, PairServer(DECODE, engine, config, transports=GLOO))
    engine.on_gone = server.pairs.reservation_gone
    address = await serve(
        lambda made: decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(server.pairs), made)
    )
    clients: list[Client] = []

    def client() -> Client:
        clients.append(Client(channel_to(address)))
        return clients[-1]

    server.client = client
    yield server
    for made in clients:
        made.call.cancel()
        if made.joining is not None:
            made.joining.cancel()
        if made.group is not None:
            await asyncio.to_thread(made.group.close)
    await server.pairs.close()
    engine.close()


async def refusal(awaitable) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return errors.from_rpc_error(caught.value)


async def paired(decode) -> Client:
    client = decode.client()
    await client.join(await client.hello())
    await until_async(lambda: decode.pairs.num_pairs == 1)
    return client


async def test_the_welcome_names_the_window_and_the_address(decode) -> None:
    welcome = await decode.client().hello()
    assert (welcome.worker, welcome.boot_id, welcome.transport) == ("decode-0", "decode-boot", "gloo")
    assert (welcome.num_credits, welcome.max_chunk_bytes) == (2, 4096)
    assert welcome.rendezvous.startswith(b"127.0.0.1:")
    assert len(welcome.token) == 32


async def test_every_pair_has_a_token_of_its_own(decode) -> None:
    tokens = [(await decode.client().hello(worker=f"prefill-{number}")).token for number in range(2)]
    assert len(set(tokens)) == 2


@pytest.mark.parametrize("first", [Goodbye("hi"), None])
async def test_a_stream_begins_with_a_hello(decode, first) -> None:
    client = decode.client()
    if first is not None:
        await client.say(first)
    await client.call.done_writing()
    error = await refusal(client.hear())
    assert isinstance(error, InvalidArgument)
    assert error.field == "hello"


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"worker": ""}, "names its worker and boot id"),
        ({"boot_id": ""}, "names its worker and boot id"),
        ({"rendezvous": b""}, "0 bytes of rendezvous, allowed are 1 to 4096"),
        ({"rendezvous": bytes(5000)}, "5000 bytes of rendezvous, allowed are 1 to 4096"),
    ],
)
async def test_an_unusable_hello_is_refused(decode, hello, message) -> None:
    error = await refusal(decode.client().hello(**hello))
    assert isinstance(error, InvalidArgument)
    assert message in str(error)


async def test_no_common_transport_names_both_lists(decode) -> None:
    error = await refusal(decode.client().hello(transports=("nccl", "nixl")))
    assert isinstance(error, FailedPrecondition)
    assert str(error) == (
        "no common transport: prefill worker prefill-0 has nccl, nixl, decode worker decode-0 has gloo"
    )


async def test_a_rendezvous_that_leads_nowhere_is_unavailable(decode) -> None:
    client = decode.client()
    await client.hello(rendezvous=b"not an address")
    assert isinstance(await refusal(client.hear()), Unavailable)
    assert decode.pairs.num_pairs == 0


@pytest.mark.promise(20)
async def test_a_peer_without_the_token_is_refused_and_the_engine_never_hears_of_it(decode) -> None:
    client = decode.client()
    welcome = await client.hello()
    with pytest.raises(PairBroken):
        await client.join(welcome, token=b"guess")
    assert isinstance(await refusal(client.hear()), Unavailable)
    assert decode.pairs.num_pairs == 0
    assert decode.engine.heard == []


async def test_a_client_that_leaves_during_the_handshake_leaves_nothing_behind(decode) -> None:
    client = decode.client()
    await client.hello()
    client.call.cancel()
    await until_async(lambda: not decode.pairs._members)
    assert decode.engine.heard == []
    assert (await paired(decode)).group is not None


async def test_the_newer_of_two_hellos_wins_though_the_older_joins_later(decode) -> None:
    older = decode.client()
    welcome = await older.hello()
    newer = await paired(decode)
    await older.join(welcome)
    assert "a newer hello of prefill-0 came" in str(await refusal(older.hear()))
    assert decode.pairs.num_pairs == 1
    assert not newer.call.done()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ChunkHeader(0, A, 0, 1, 0, 1, 2048, 0)] * 1, "prefill announced a chunk of AttemptKey(reservation=7"),
        (
            [AttemptBegin(A), *(ChunkHeader(number, A, 0, 1, 0, 1, 2048, 0) for number in range(3))],
            "prefill announced chunk 2 without a credit",
        ),
        ([AttemptBegin(A), ChunkHeader(0, A, 0, 9, 0, 1, 4097, 0)], "prefill announced 4097 bytes, allowed are 1 to"),
        ([AttemptBegin(A), ChunkHeader(1, A, 0, 1, 0, 1, 2048, 0)], "prefill announced chunk 1 where 0 was due"),
        ([PairHello(PREFILL, ("gloo",), b"1")], "a second hello on one stream"),
        ([Goodbye("enough")], "enough"),
    ],
)
async def test_whoever_breaks_the_rules_is_told_which_and_the_pair_ends(decode, messages, reason) -> None:
    client = await paired(decode)
    for message in messages:
        await client.say(message)
    said = await client.last_words()
    assert said.startswith(reason)
    assert decode.engine.heard[-1] == ("lost", said)
    await until_async(lambda: decode.pairs.num_pairs == 0)


async def test_a_message_that_means_nothing_ends_the_pair(decode) -> None:
    client = await paired(decode)
    await client.call.write(decode_pb2.ConnectPairRequest())
    assert "without content" in await client.last_words()


@pytest.mark.parametrize("how", ["cancel", "half-close", "group"])
async def test_the_end_of_stream_or_group_is_the_end_of_the_pair(decode, how) -> None:
    client = await paired(decode)
    await client.say(AttemptBegin(A))
    await until_async(lambda: decode.engine.heard)
    match how:
        case "cancel":
            client.call.cancel()
        case "half-close":
            await client.call.done_writing()
        case "group":
            await asyncio.to_thread(client.group.close)
    await until_async(lambda: decode.pairs.num_pairs == 0)
    assert decode.engine.words() == ["begun", "lost"]
    decode.pairs.reservation_gone(1, A)
    assert decode.pairs.transport_of(1) == ""


async def test_prefill_hears_when_the_reservation_is_gone(decode) -> None:
    client = await paired(decode)
    await client.say(AttemptBegin(A))
    await until_async(lambda: decode.engine.heard)
    await asyncio.to_thread(decode.pairs.reservation_gone, 1, A)
    assert await client.hear() == ReservationGone(A)


async def test_prefill_hears_at_once_that_its_reservation_is_unknown(decode) -> None:
    client = await paired(decode)
    await client.say(AttemptBegin(AttemptKey(99, 1)))
    assert await client.hear() == ReservationGone(AttemptKey(99, 1))


@pytest.mark.parametrize("field", ["worker", "boot_id", "kv_layout", "model_fingerprint"])
async def test_no_word_of_a_hello_is_endless(decode, field) -> None:
    error = await refusal(decode.client().hello(**{field: "x" * 1025}))
    assert isinstance(error, InvalidArgument)
    error = await refusal(decode.client().hello(transports=("gloo@" + "x" * 1020,)))
    assert isinstance(error, InvalidArgument)


async def test_no_hello_offers_without_end(decode) -> None:
    error = await refusal(decode.client().hello(transports=("gloo",) * 17))
    assert (type(error), error.field) == (InvalidArgument, "hello.transports")
