"""A peer that is killed or stopped while payload is under way, as a real process."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from common.config import DecodeConfig, PrefillConfig
from common.errors import Unavailable
from common.transport.messages import AttemptOutcome, TransferStatus
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from prefill_service.pairs import PairRegistry
from tests.common.transport import child
from tests.common.transport.fakes import DECODE, GLOO, PREFILL, WAIT_S, PairServicer, until_async

MODULE = ("-m", "tests.common.transport.child")
# Keepalive takes 2 s at most; the transfer itself would time out after 10.
DETECT_S = 5.0


async def read_line(process) -> str:
    return (await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 4 * WAIT_S)).strip()


async def ship_once_it_is_back(registry: PairRegistry, endpoint: str) -> AttemptOutcome:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await child.ship(registry, endpoint, 0)
            except Unavailable:
                await asyncio.sleep(0.05)


FAULTS = [
    pytest.param(signal.SIGKILL, id="SIGKILL"),
    pytest.param(signal.SIGSTOP, id="SIGSTOP", marks=pytest.mark.slow),
]


@pytest.mark.promise(9, 16)
@pytest.mark.parametrize("fault", FAULTS)
async def test_decode_survives_its_prefill_worker(serve, spawn, fault) -> None:
    engine = child.engine()
    pairs = PairServer(DECODE, engine, DecodeConfig(**child.CHUNKS), transports=GLOO)
    endpoint = await serve(
        lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(pairs), server)
    )
    prefill = spawn(*MODULE, "prefill", endpoint, "boot-1")
    assert await read_line(prefill) == "shipping"

    struck_s = time.monotonic()
    prefill.send_signal(fault)
    async with asyncio.timeout(DETECT_S):
        await until_async(lambda: "lost" in engine.words() and pairs.num_pairs == 0)
    print(f"noticed after {(time.monotonic() - struck_s) * 1e3:.0f} ms")

    if fault is signal.SIGSTOP:
        prefill.send_signal(signal.SIGCONT)
        assert await read_line(prefill) == "lost"
    else:
        prefill = spawn(*MODULE, "prefill", endpoint, "boot-2")
    assert await read_line(prefill) == "shipping"
    assert engine.words().count("lost") == 1
    prefill.kill()
    await until_async(lambda: pairs.num_pairs == 0)
    engine.close()


async def test_a_process_that_ends_without_closing_its_pairs_ends_well(serve, spawn) -> None:
    engine = child.engine()
    pairs = PairServer(DECODE, engine, DecodeConfig(**child.CHUNKS), transports=GLOO)
    endpoint = await serve(
        lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(pairs), server)
    )
    leaver = spawn(*MODULE, "leaver", endpoint)
    _, stderr = await asyncio.to_thread(leaver.communicate, timeout=4 * WAIT_S)
    assert "terminate called" not in stderr
    assert leaver.returncode == 0
    await until_async(lambda: pairs.num_pairs == 0)
    engine.close()


@pytest.mark.promise(3, 9)
@pytest.mark.parametrize("fault", FAULTS)
async def test_prefill_survives_its_decode_worker(spawn, fault) -> None:
    registry = PairRegistry(PREFILL, child.cache(), PrefillConfig(), transports=GLOO)
    decode = spawn(*MODULE, "decode", "127.0.0.1:0")
    endpoint = await read_line(decode)
    shipping = asyncio.create_task(child.ship_until_lost(registry, endpoint))
    await until_async(lambda: registry.num_pairs == 1)

    struck_s = time.monotonic()
    decode.send_signal(fault)
    await asyncio.wait_for(shipping, DETECT_S)
    print(f"noticed after {(time.monotonic() - struck_s) * 1e3:.0f} ms")

    if fault is signal.SIGSTOP:
        decode.send_signal(signal.SIGCONT)
    else:
        with pytest.raises(Unavailable):
            await registry.acquire(endpoint, timeout_s=WAIT_S)
        decode = spawn(*MODULE, "decode", endpoint)
        assert await read_line(decode) == endpoint
    assert (await ship_once_it_is_back(registry, endpoint)).status is TransferStatus.OK
    await registry.close()
