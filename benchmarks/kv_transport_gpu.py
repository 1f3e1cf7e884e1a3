"""KV of Qwen3-8B from one GPU process to another, by every transport that works here.

Everything is on: gather, checksum, announcement, transfer, check, scatter, acknowledgement, credit. Beside it the same
bytes in the same chunks through the bare process group, and a plain copy within the device. With two GPUs the workers
have one each; with one they share it, and NCCL, which takes them for two machines, goes through loopback sockets: that
shows what the path costs, not what NVLink gives.

    python -m benchmarks.kv_transport_gpu [--prompt-tokens 4096] [--slots 8] [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection

import torch
import uvloop

from benchmarks.kv_transport import WAIT_S, Engine, Servicer, make_cache, run_bare, ship
from benchmarks.report import Report
from benchmarks.shapes import SHAPES
from common import rpc
from common.config import KV_TRANSPORTS, DecodeConfig, PrefillConfig
from common.engine.streams import beside_computation
from common.transport.authentication import Credentials
from common.transport.checksum import warm_up
from common.transport.group import DECODE_RANK, PREFILL_RANK, PairGroup
from common.transport.limits import chunk_bytes
from common.transport.meeting import Meeting
from common.transport.messages import PairIdentity
from common.transport.transports import Transports, name_of
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from prefill_service.pairs import PairRegistry

SHAPE = SHAPES["8B"]
BLOCK_KIB = 64
NUM_LAYERS = SHAPE.num_layers


async def meet(rank: int, transports: Transports, connection: Connection) -> PairGroup:
    """A bare group between the two processes."""
    meeting = Meeting(rank, transports, interface="127.0.0.1", timeout_s=WAIT_S)
    connection.send((transports.offers, await meeting.rendezvous()))
    offers, rendezvous = await asyncio.to_thread(connection.recv)
    if rank == DECODE_RANK:
        choice = transports.choose(offers)
        assert choice is not None, offers
        connection.send(choice.label)
        label = choice.label
    else:
        label = await asyncio.to_thread(connection.recv)
    return await meeting.connect(rendezvous, label, Credentials(b"benchmark", "prefill", "decode"))


def bare(group: PairGroup, rank: int, options: argparse.Namespace) -> float:
    """Seconds for the bytes of a prompt."""
    with beside_computation(group.device):
        size = chunk_bytes(name_of(group.transport), 0)
        return run_bare(group, rank, options.prompt_bytes, size, options.slots)


@contextlib.asynccontextmanager
async def receiving(
    connection: Connection, device: str, prompt_mib: int, transports: Sequence[str], num_slots: int
) -> AsyncIterator[Transports]:
    """A decode worker as far as KV goes; the other side is told its port."""
    cache = make_cache(BLOCK_KIB, prompt_mib, NUM_LAYERS, device)
    warm_up(cache.device)
    own = Transports.of(transports, cache.device)
    identity = PairIdentity("decode", "boot", "same", "same")
    pairs = PairServer(identity, Engine(cache), DecodeConfig(staging_chunks=num_slots), transports=own)
    server = rpc.create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Servicer(pairs), server)
    connection.send(rpc.bind(server, "127.0.0.1:0"))
    await server.start()
    yield own
    await pairs.close()
    await server.stop(None)


async def decode(connection: Connection, transport: str, device: str, options: argparse.Namespace) -> None:
    async with receiving(connection, device, options.prompt_mib, (transport,), options.slots) as transports:
        group = await meet(DECODE_RANK, transports, connection)
        while await asyncio.to_thread(connection.recv) == "bare":
            await asyncio.to_thread(bare, group, DECODE_RANK, options)
        await asyncio.to_thread(group.close)


async def prefill(
    connection: Connection, results: Connection, transport: str, device: str, options: argparse.Namespace
) -> None:
    cache = make_cache(BLOCK_KIB, options.prompt_mib, NUM_LAYERS, device)
    warm_up(cache.device)
    transports = Transports.of((transport,), cache.device)
    identity = PairIdentity("prefill", "boot", "same", "same")
    registry = PairRegistry(identity, cache, PrefillConfig(pair_connect_s=WAIT_S), transports=transports)
    endpoint = f"127.0.0.1:{await asyncio.to_thread(connection.recv)}"
    group = await meet(PREFILL_RANK, transports, connection)
    seconds: dict[str, list[float]] = {"bare": [], "whole": []}
    for round_ in range(options.rounds + 1):
        connection.send("bare")
        bare_s = await asyncio.to_thread(bare, group, PREFILL_RANK, options)
        whole_s = await ship(registry, endpoint, cache, "scattered")
        # Whatever is compiled, connected or allocated at first use is in the first round.
        if round_:
            seconds["bare"].append(bare_s)
            seconds["whole"].append(whole_s)
    connection.send("end")
    results.send((group.transport, seconds))
    await registry.close()
    await asyncio.to_thread(group.close)


def decode_sink(connection: Connection, device: str, prompt_mib: int) -> None:
    """Takes what is shipped, by whatever transport, until it is told to end."""

    async def serve() -> None:
        async with receiving(connection, device, prompt_mib, KV_TRANSPORTS, num_slots=8):
            await asyncio.to_thread(connection.recv)

    uvloop.run(serve())


def run_decode(connection: Connection, environment: dict[str, str], *arguments: object) -> None:
    os.environ.update(environment)
    uvloop.run(decode(connection, *arguments))  # type: ignore[arg-type]


def run_prefill(connection: Connection, results: Connection, environment: dict[str, str], *arguments: object) -> None:
    os.environ.update(environment)
    uvloop.run(prefill(connection, results, *arguments))  # type: ignore[arg-type]


def measure(
    transport: str, devices: tuple[str, str], environments: tuple[dict[str, str], dict[str, str]], options
) -> tuple[str, dict[str, list[float]]]:
    """Its label, and seconds of every round."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    results, told = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=run_prefill, args=(here, told, environments[0], transport, devices[0], options)),
        spawn.Process(target=run_decode, args=(there, environments[1], transport, devices[1], options)),
    ]
    for process in processes:
        process.start()
    told.close()
    try:
        return results.recv()
    except EOFError:
        raise RuntimeError(f"{transport}: the prefill process failed") from None
    finally:
        for process in processes:
            process.join(WAIT_S / 6)
            process.kill()


def device_copy_s(num_bytes: int) -> float:
    """A plain copy within the device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source)
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started_s)
    return statistics.median(took)


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=8, help="chunks under way")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments or [])
    options.prompt_bytes = options.prompt_tokens * SHAPE.kv_bytes_per_token
    options.prompt_mib = options.prompt_bytes // 2**20
    two = torch.cuda.device_count() > 1
    devices = ("cuda:0", "cuda:1") if two else ("cuda:0", "cuda:0")
    as_machines = {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
    nccl = ({}, {}) if two else (as_machines | {"NCCL_HOSTID": "prefill"}, as_machines | {"NCCL_HOSTID": "decode"})
    report = Report("kv-transport-gpu", "KV of Qwen3-8B from one GPU process to another, checksums on")
    copy_s = device_copy_s(options.prompt_bytes)
    report.add(what="plain copy within the device", gb_per_s=options.prompt_bytes / copy_s / 1e9)
    for transport, places, environments in (
        ("cuda-ipc", ("cuda:0", "cuda:0"), ({}, {})),
        ("nccl", devices, nccl),
        ("gloo", devices, ({}, {})),
    ):
        label, seconds = measure(transport, places, environments, options)
        for what, took in seconds.items():
            share = statistics.median(b / s for b, s in zip(seconds["bare"], took, strict=True))
            rate = options.prompt_bytes / statistics.median(took) / 1e9
            report.add(what=f"{label}, {what}", gb_per_s=rate, ms=statistics.median(took) * 1e3, share_of_bare=share)
    report.notes = [
        f"{options.prompt_tokens:,} tokens, {options.prompt_mib} MiB, scattered blocks of {BLOCK_KIB} KiB a layer, "
        f"{options.slots} chunks under way; medians of {options.rounds} rounds, shares round by round. "
        + ("Workers on two GPUs." if two else "Both workers on one GPU: NCCL goes through loopback sockets.")
    ]
    report.save()


if __name__ == "__main__":
    run(sys.argv[1:])
