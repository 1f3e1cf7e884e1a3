"""A decode worker's pairs in this process, prefill workers as processes, on GPUs: what tests of transports share."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping

import torch

from common.config import DecodeConfig
from common.transport.transports import Transports
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from tests.common.transport import child
from tests.common.transport.fakes import DECODE, WAIT_S, PairServicer, until_async
from tests.common.transport.test_faults import MODULE, read_line


class Decode:
    """Receives whatever prefill processes ship."""

    def __init__(self, device: str, transport: str) -> None:
        self.engine = child.engine(device)
        transports = Transports.of((transport,), self.engine.cache.device)
        self.pairs = PairServer(DECODE, self.engine, DecodeConfig(), transports=transports)
        self.endpoint = ""

    @classmethod
    async def start(cls, serve: Callable, device: str, transport: str) -> Decode:
        decode = cls(device, transport)
        decode.endpoint = await serve(
            lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(PairServicer(decode.pairs), server)
        )
        return decode

    def holds_what_was_shipped(self, device: str) -> bool:
        expected = child.cache(device, random=True)
        torch.cuda.synchronize(self.engine.cache.device)
        layers = zip(self.engine.cache.layers, expected.layers, strict=True)
        return all(torch.equal(here.cpu(), there.cpu()) for here, there in layers)

    async def close(self) -> None:
        await self.pairs.close()
        self.engine.close()


async def survive_a_fault(
    serve: Callable,
    spawn: Callable,
    fault: signal.Signals,
    transport: str,
    *,
    within_s: float,
    label: str | None = None,
    prefill_device: str = "cuda:0",
    decode_device: str = "cuda:0",
    environment: Mapping[str, str] | None = None,
) -> None:
    """KV arrives; prefill is struck in the middle of a transfer; decode notices, lets go of everything, and goes on."""
    decode = await Decode.start(serve, decode_device, transport)

    def start_prefill(boot_id: str):
        return spawn(*MODULE, "prefill", decode.endpoint, boot_id, prefill_device, transport, **(environment or {}))

    async def first_prompt(prefill) -> None:
        try:
            line = await read_line(prefill)
        except TimeoutError:
            prefill.kill()
            line = ""
        assert line == "shipping", line or prefill.communicate()[1]

    prefill = start_prefill("boot-1")
    await first_prompt(prefill)
    assert decode.holds_what_was_shipped(prefill_device)
    assert decode.pairs.transport_of(1) == (label or transport)
    pair = decode.pairs._pairs[1]

    struck_s = time.monotonic()
    prefill.send_signal(fault)
    async with asyncio.timeout(WAIT_S):
        await until_async(lambda: "lost" in decode.engine.words() and decode.pairs.num_pairs == 0)
    noticed_s = time.monotonic() - struck_s
    assert await asyncio.to_thread(pair.wait_released, WAIT_S), "something still holds on to the group"
    released_s = time.monotonic() - struck_s
    print(f"noticed after {noticed_s * 1e3:.0f} ms, released after {released_s * 1e3:.0f} ms")
    assert noticed_s < within_s

    for layer in decode.engine.cache.layers:
        layer.zero_()
    torch.cuda.synchronize(decode.engine.cache.device)
    if fault is signal.SIGSTOP:
        prefill.send_signal(signal.SIGCONT)
        assert await read_line(prefill) == "lost"
    else:
        prefill = start_prefill("boot-2")
    await first_prompt(prefill)
    assert decode.holds_what_was_shipped(prefill_device)
    prefill.kill()
    await until_async(lambda: decode.pairs.num_pairs == 0)
    await decode.close()
