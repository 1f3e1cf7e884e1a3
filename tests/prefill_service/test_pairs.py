"""PairRegistry against a real PairServer behind a real gRPC server."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import AsyncIterator

import pytest

from common.clock import Clock, FakeClock, monotonic
from common.config import DecodeConfig, PrefillConfig
from common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from common.transport.messages import AttemptKey, Commit, TransferStatus
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2, decode_pb2_grpc
from prefill_service.pairs import PairRegistry
from tests.common.transport.fakes import (
    DECODE,
    GLOO,
    NUM_LAYERS,
    PREFILL,
    WAIT_S,
    FakeEngine,
    FakeReservation,
    Outcomes,
    PairServicer,
    small_cache,
    until_async,
)

A = AttemptKey(7, 1)


class Side:
    """A decode worker as far as pairs go."""

    def __init__(self, clock: Clock = monotonic, **config) -> None:
        self.engine = FakeEngine(small_cache())
        self.pairs = PairServer(DECODE, self.engine, DecodeConfig(**config), transports=GLOO, clock=clock)
        self.engine.on_gone = self.pairs.reservation_gone
        self.endpoint = ""


@pytest.fixture
async def start_decode(serve) -> AsyncIterator:
    sides = []

    async def start(clock: Clock = monotonic, **config) -> Side:
        side = Side(clock, **config)
        side.endpoint = await serve(
            lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(side.pairs), server)
        )
        sides.append(side)
        return side

    yield start
    for side in sides:
        await side.pairs.close()
        side.engine.close()


@pytest.fixture
async def make_registry() -> AsyncIterator:
    registries = []

    def make(identity=PREFILL, clock: Clock = monotonic, **config) -> PairRegistry:
        cache, settings = small_cache(random=True), PrefillConfig(**config)
        registries.append(PairRegistry(identity, cache, settings, transports=GLOO, clock=clock))
        return registries[-1]

    yield make
    for registry in registries:
        await registry.close()


def add_silent(server) -> None:
    """A decode worker that never answers a hello."""

    class Silent(decode_pb2_grpc.DecodeServiceServicer):
        async def ConnectPair(self, request_iterator, context):
            await asyncio.sleep(WAIT_S)
            yield decode_pb2.ConnectPairResponse()

    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Silent(), server)


async def ship_one(registry: PairRegistry, decode: Side, key: AttemptKey = A) -> tuple[TransferStatus | None, str]:
    """One prompt of two blocks, from begin to its outcome."""
    decode.engine.reservations[key.reservation] = FakeReservation(key.attempt, [3, 1])
    pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    outcomes = Outcomes()
    attempt = pair.begin(key, outcomes.of(key))
    for layer in range(NUM_LAYERS):
        attempt.ship(layer, 0, [5, 2])
    attempt.commit(Commit(key, attempt.num_bytes, first_token_id=1))
    outcome = await asyncio.to_thread(outcomes.wait, key)
    return outcome.status, outcome.detail


async def test_the_first_use_makes_a_pair_and_the_next_finds_it(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()
    assert registry.num_pairs == decode.pairs.num_pairs == 0
    assert await ship_one(registry, decode) == (TransferStatus.OK, "")
    pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert pair is await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert registry.num_pairs == decode.pairs.num_pairs == 1
    assert pair.transport == decode.pairs.transport_of(1) == "gloo"


async def test_all_who_ask_at_once_share_one_connection(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()
    pairs = await asyncio.gather(*(registry.acquire(decode.endpoint, timeout_s=WAIT_S) for _ in range(8)))
    assert len(set(pairs)) == 1
    assert decode.pairs.num_pairs == 1


async def test_one_waiter_that_leaves_does_not_hurt_the_others(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()
    waiters = [asyncio.create_task(registry.acquire(decode.endpoint, timeout_s=WAIT_S)) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    assert not (await waiters[1]).ended


@pytest.mark.promise(14)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_fingerprint": "other"},
            "model fingerprint of prefill worker prefill-0 is 'other', of decode worker dec",
        ),
        (
            {"kv_layout": "layers=9"},
            "KV layout of prefill worker prefill-0 is 'layers=9', of decode worker decode-0 'lay",
        ),
        (
            {"protocol_version": 99},
            "pair protocol version of prefill worker prefill-0 is 99, of decode worker decode-0 1",
        ),
    ],
)
async def test_decode_refuses_what_it_would_misunderstand_and_names_both_values(
    start_decode, make_registry, change, message
) -> None:
    decode, registry = await start_decode(), make_registry(dataclasses.replace(PREFILL, **change))
    with pytest.raises(FailedPrecondition, match=message) as caught:
        await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert caught.value.field == f"hello.{next(iter(change))}"
    assert registry.num_pairs == decode.pairs.num_pairs == 0


async def test_a_block_that_fits_no_chunk_is_refused_with_the_remedy(start_decode, make_registry) -> None:
    decode, registry = await start_decode(max_chunk_bytes=4096), make_registry()
    registry._connect.keywords["source"].block_bytes = 5000
    with pytest.raises(FailedPrecondition, match=r"of which decode takes 4096 .* raise max_chunk_bytes"):
        await registry.acquire(decode.endpoint, timeout_s=WAIT_S)


async def test_an_endpoint_of_another_role_is_named(serve, make_registry) -> None:
    endpoint = await serve(lambda server: None)
    with pytest.raises(FailedPrecondition, match=f"{endpoint} is no decode worker"):
        await make_registry().acquire(endpoint, timeout_s=WAIT_S)


async def test_nobody_listening_is_unavailable_and_a_later_start_is_found(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()
    with pytest.raises(Unavailable):
        await registry.acquire("127.0.0.1:1", timeout_s=WAIT_S)
    assert await ship_one(registry, decode) == (TransferStatus.OK, "")


@pytest.mark.promise(7)
async def test_a_silent_decode_worker_is_given_up_in_time(serve, make_registry) -> None:
    endpoint, registry = await serve(add_silent), make_registry(pair_connect_s=0.3)
    with pytest.raises(Unavailable, match=r"no pair with decode worker .* within 0\.05 s"):
        await registry.acquire(endpoint, timeout_s=0.05)
    with pytest.raises(Unavailable, match=r"connecting to .* took more than 0\.3 s"):
        await registry.acquire(endpoint, timeout_s=WAIT_S)


@pytest.mark.promise(9)
@pytest.mark.parametrize("breaking", ["prefill", "decode", "group"])
async def test_a_pair_is_remade_after_any_failure(start_decode, make_registry, breaking: str) -> None:
    decode, registry = await start_decode(), make_registry()
    assert (await ship_one(registry, decode))[0] is TransferStatus.OK
    pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    outcomes = Outcomes()
    pair.begin(AttemptKey(8, 1), outcomes.of(AttemptKey(8, 1)))
    decode.engine.reservations[8] = FakeReservation(1, [0])
    match breaking:
        case "prefill":
            pair.end("pulled the plug")
        case "decode":
            decode.pairs._pairs[1].end("pulled the plug")
        case "group":
            pair._watch.group.close()
    assert (await asyncio.to_thread(outcomes.wait, AttemptKey(8, 1))).status is None
    assert (await ship_one(registry, decode, AttemptKey(7, 2)))[0] is TransferStatus.OK
    await until_async(lambda: decode.engine.words().count("lost") == 1)
    assert registry.num_pairs == decode.pairs.num_pairs == 1


async def test_an_idle_pair_is_closed_and_a_busy_one_is_not(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry(pair_idle_s=0.1)
    pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    decode.engine.reservations[7] = FakeReservation(1, [0])
    outcomes = Outcomes()
    attempt = pair.begin(A, outcomes.of(A))
    await asyncio.sleep(0.3)
    assert registry.num_pairs == 1
    attempt.abandon()
    await until_async(lambda: registry.num_pairs == decode.pairs.num_pairs == 0)
    assert decode.engine.heard[-1] == ("lost", "idle for 0.1 s")
    assert outcomes.wait(A).detail == "abandoned by prefill"


async def test_one_pair_too_many_ends_the_one_unused_for_longest_at_prefill(start_decode, make_registry) -> None:
    decodes, clock = [await start_decode() for _ in range(3)], FakeClock()
    registry = make_registry(max_pairs=2, clock=clock)
    pairs = []
    for decode in decodes:
        assert (await ship_one(registry, decode))[0] is TransferStatus.OK
        pairs.append(await registry.acquire(decode.endpoint, timeout_s=WAIT_S))
        clock.now_s += 2.0
    assert [pair.ended for pair in pairs] == [True, False, False]
    assert registry.num_pairs == 2
    await until_async(lambda: decodes[0].pairs.num_pairs == 0)
    assert "max_pairs" in decodes[0].engine.heard[-1][1]
    assert (await ship_one(registry, decodes[0], AttemptKey(7, 2)))[0] is TransferStatus.OK
    assert [pair.ended for pair in pairs] == [True, True, False]


async def test_prefill_refuses_a_pair_while_all_it_may_hold_are_in_use(start_decode, make_registry) -> None:
    decodes, clock = [await start_decode() for _ in range(2)], FakeClock()
    registry = make_registry(max_pairs=1, clock=clock)
    pair = await registry.acquire(decodes[0].endpoint, timeout_s=WAIT_S)
    decodes[0].engine.reservations[7] = FakeReservation(1, [0])
    outcomes = Outcomes()
    attempt = pair.begin(A, outcomes.of(A))
    clock.now_s += 60.0
    with pytest.raises(ResourceExhausted, match=r"holds 1 pairs \(max_pairs\), and each is in use") as caught:
        await registry.acquire(decodes[1].endpoint, timeout_s=WAIT_S)
    assert caught.value.reason == "PAIR_LIMIT"
    attempt.abandon()
    outcomes.wait(A)
    clock.now_s += 2.0
    assert (await ship_one(registry, decodes[1]))[0] is TransferStatus.OK
    assert pair.ended


async def test_one_pair_too_many_ends_the_one_unused_for_longest_at_decode(start_decode, make_registry) -> None:
    clock = FakeClock()
    decode = await start_decode(clock, max_pairs=2)
    registries = [make_registry(dataclasses.replace(PREFILL, worker=f"prefill-{number}")) for number in range(3)]
    pairs = []
    for number, registry in enumerate(registries):
        assert (await ship_one(registry, decode, AttemptKey(number, 1)))[0] is TransferStatus.OK
        pairs.append(await registry.acquire(decode.endpoint, timeout_s=WAIT_S))
        clock.now_s += 2.0
    await until_async(lambda: [pair.ended for pair in pairs] == [True, False, False])
    await until_async(lambda: decode.pairs.num_pairs == 2)


async def test_decode_refuses_a_pair_while_all_it_may_hold_are_in_use(start_decode, make_registry) -> None:
    clock = FakeClock()
    decode = await start_decode(clock, max_pairs=1)
    first, second = make_registry(), make_registry(dataclasses.replace(PREFILL, worker="prefill-1"))
    pair = await first.acquire(decode.endpoint, timeout_s=WAIT_S)
    decode.engine.reservations[7] = FakeReservation(1, [0])
    outcomes = Outcomes()
    pair.begin(A, outcomes.of(A))
    await until_async(lambda: decode.engine.heard)
    clock.now_s += 60.0
    with pytest.raises(ResourceExhausted, match="max_pairs") as caught:
        await second.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert caught.value.reason == "PAIR_LIMIT"
    assert not pair.ended
    assert decode.pairs.num_pairs == 1


async def test_a_worker_that_connects_again_needs_no_room(start_decode, make_registry) -> None:
    decode = await start_decode(max_pairs=1)
    old = await make_registry().acquire(decode.endpoint, timeout_s=WAIT_S)
    assert (await ship_one(make_registry(), decode))[0] is TransferStatus.OK
    await until_async(lambda: old.ended)


@pytest.mark.promise(8)
async def test_a_restarted_prefill_worker_ends_the_pair_of_its_former_self(start_decode, make_registry) -> None:
    decode, former = await start_decode(), make_registry()
    reborn = make_registry(dataclasses.replace(PREFILL, boot_id="another-boot"))
    old = await former.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert (await ship_one(reborn, decode))[0] is TransferStatus.OK
    await until_async(lambda: old.ended)
    assert decode.pairs.num_pairs == 1
    with pytest.raises(FailedPrecondition, match="give each its own instance_id"):
        await former.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert (await ship_one(reborn, decode, AttemptKey(7, 2)))[0] is TransferStatus.OK


async def test_a_second_hello_of_the_same_boot_replaces_the_first(start_decode, make_registry) -> None:
    decode, first, second = await start_decode(), make_registry(), make_registry()
    old = await first.acquire(decode.endpoint, timeout_s=WAIT_S)
    assert (await ship_one(second, decode))[0] is TransferStatus.OK
    await until_async(lambda: old.ended)
    assert decode.pairs.num_pairs == 1


async def test_several_prefill_workers_share_a_decode_worker(start_decode, make_registry) -> None:
    decode = await start_decode()
    registries = [make_registry(dataclasses.replace(PREFILL, worker=f"prefill-{number}")) for number in range(3)]
    keys = [AttemptKey(number, 1) for number in range(3)]
    shipped = await asyncio.gather(*(ship_one(*one) for one in zip(registries, [decode] * 3, keys, strict=True)))
    assert [status for status, _ in shipped] == [TransferStatus.OK] * 3
    assert decode.pairs.num_pairs == 3


async def test_a_decode_worker_that_shuts_down_says_so(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()
    decode.engine.reservations[7] = FakeReservation(1, [0])
    pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
    outcomes = Outcomes()
    pair.begin(A, outcomes.of(A))
    await decode.pairs.close()
    assert (await asyncio.to_thread(outcomes.wait, A)).status is None
    with pytest.raises(Unavailable, match="the decode worker is shutting down"):
        await registry.acquire(decode.endpoint, timeout_s=WAIT_S)


async def test_close_ends_a_connection_that_is_still_being_made(serve, make_registry) -> None:
    endpoint, registry = await serve(add_silent), make_registry()
    waiting = asyncio.create_task(registry.acquire(endpoint, timeout_s=WAIT_S))
    await asyncio.sleep(0)
    await registry.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting


async def test_thirty_pairings_leave_nothing_behind(start_decode, make_registry) -> None:
    decode, registry = await start_decode(), make_registry()

    async def pair_and_part(number: int) -> None:
        assert (await ship_one(registry, decode, AttemptKey(7, number)))[0] is TransferStatus.OK
        pair = await registry.acquire(decode.endpoint, timeout_s=WAIT_S)
        pair.end("enough")
        assert await asyncio.to_thread(pair.wait_released, WAIT_S)
        await until_async(lambda: registry.num_pairs == decode.pairs.num_pairs == 0)

    def in_use() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    for number in range(1, 11):
        await pair_and_part(number)
    before = in_use()
    for number in range(11, 41):
        await pair_and_part(number)
    await until_async(lambda: all(after <= earlier + 3 for after, earlier in zip(in_use(), before, strict=True)))
