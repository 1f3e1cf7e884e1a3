"""One side of a pair as a process of its own, for tests that kill or stop it.

`python -m tests.common.transport.child prefill ENDPOINT BOOT_ID [DEVICE TRANSPORT]` ships prompts one after the other,
for ever; it prints "shipping" after the first of each pair, "lost" when one breaks, and on stderr why there is none.
`... child decode ADDRESS` prints where it listens. `... child leaver ENDPOINT` exits in its second prompt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys

import torch

from common import rpc
from common.config import DecodeConfig, PrefillConfig
from common.engine.kv_cache import KvCache
from common.errors import PdserveError
from common.transport.messages import AttemptKey, AttemptOutcome, Commit
from common.transport.transports import Transports
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from prefill_service.pairs import PairRegistry
from tests.common.transport.fakes import (
    DECODE,
    GLOO,
    PREFILL,
    WAIT_S,
    FakeEngine,
    FakeReservation,
    PairServicer,
    small_cache,
)

NUM_BLOCKS = 256
BLOCK_IDS = list(range(NUM_BLOCKS - 1, -1, -1))
# As small as the time that a test has to kill somebody in the middle of a message is short.
CHUNKS = {"max_chunk_bytes": 2**20}


def cache(device: str = "cpu", *, random: bool = False) -> KvCache:
    """12 MiB. What is random is the same in every process."""
    torch.manual_seed(5)
    return small_cache(NUM_BLOCKS, head_dim=64, device=device, random=random)


def engine(device: str = "cpu") -> FakeEngine:
    """Knows reservations 0 to 3."""
    engine = FakeEngine(cache(device))
    engine.reservations.update({number: FakeReservation(1, BLOCK_IDS) for number in range(4)})
    return engine


async def ship(registry: PairRegistry, endpoint: str, reservation: int) -> AttemptOutcome:
    """One prompt of 12 MiB."""
    pair = await registry.acquire(endpoint, timeout_s=WAIT_S)
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    outcomes: list[AttemptOutcome] = []

    def on_done(outcome: AttemptOutcome) -> None:
        outcomes.append(outcome)
        loop.call_soon_threadsafe(done.set)

    attempt = pair.begin(AttemptKey(reservation, 1), on_done)
    for layer in range(3):
        attempt.ship(layer, 0, BLOCK_IDS)
    attempt.commit(Commit(attempt.key, attempt.num_bytes, first_token_id=1))
    await done.wait()
    return outcomes[0]


async def ship_until_lost(registry: PairRegistry, endpoint: str) -> None:
    """Prints "shipping" once the pair works, and returns when it does not any more."""
    for number in itertools.count():
        outcome = await ship(registry, endpoint, number % 4)
        if outcome.status is None:
            return
        if number == 0:
            print("shipping", flush=True)


async def run_prefill(endpoint: str, boot_id: str, device: str = "cpu", transport: str = "gloo") -> None:
    source = cache(device, random=True)
    transports = Transports.of((transport,), source.device)
    identity = dataclasses.replace(PREFILL, boot_id=boot_id)
    registry = PairRegistry(identity, source, PrefillConfig(), transports=transports)
    reason = ""
    while True:
        try:
            await ship_until_lost(registry, endpoint)
            print("lost", flush=True)
        except PdserveError as error:
            if str(error) != reason:
                reason = str(error)
                print(reason, file=sys.stderr, flush=True)
            await asyncio.sleep(0.05)


async def run_decode(address: str) -> None:
    sink = engine()
    pairs = PairServer(DECODE, sink, DecodeConfig(**CHUNKS), transports=GLOO)
    sink.on_gone = pairs.reservation_gone
    server = rpc.create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(pairs), server)
    port = rpc.bind(server, address)
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def run_leaver(endpoint: str) -> None:
    registry = PairRegistry(PREFILL, cache(), PrefillConfig(), transports=GLOO)
    await ship(registry, endpoint, 0)
    pair = await registry.acquire(endpoint, timeout_s=WAIT_S)
    attempt = pair.begin(AttemptKey(1, 1), lambda outcome: None)
    for layer in range(3):
        attempt.ship(layer, 0, BLOCK_IDS)


if __name__ == "__main__":
    asyncio.run({"prefill": run_prefill, "decode": run_decode, "leaver": run_leaver}[sys.argv[1]](*sys.argv[2:]))
