"""KV over a pair between two processes on loopback, beside bare gloo send and receive of the same bytes.

Everything is on: gather, checksum, announcement, send, receive, check, scatter, acknowledgement, credit. Reports GB/s
and the share of the bare rate, for blocks that lie scattered and for runs.

    python -m benchmarks.kv_transport [--block-kib 64] [--chunk-mib 4] [--slots 8] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import queue
import random
import statistics
import sys
import threading
import time
from collections import deque
from multiprocessing.connection import Connection

import torch
import uvloop

from benchmarks.report import Report
from common import rpc
from common.config import DecodeConfig, PrefillConfig
from common.engine.kv_cache import KvCache
from common.engine.kv_writer import KvWriter
from common.engine.streams import sleep_until_done
from common.model.config import ModelConfig
from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import DECODE_RANK, PREFILL_RANK, PairGroup
from common.transport.messages import AttemptKey, AttemptOutcome, Commit, PairIdentity, TransferStatus
from common.transport.transports import Transports
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from prefill_service.pairs import PairRegistry

NUM_LAYERS = 16
WAIT_S = 60.0
LAYOUTS = ("scattered", "runs")
GLOO = Transports.of(("gloo",), torch.device("cpu"))


def make_cache(block_kib: int, prompt_mib: int, num_layers: int = NUM_LAYERS, device: str = "cpu") -> KvCache:
    """Twice the blocks that a prompt of `prompt_mib` needs."""
    head_dim = 128
    num_kv_heads = block_kib * 1024 // (2 * 16 * head_dim * 2)
    config = ModelConfig(
        model_id="kv-only",
        num_layers=num_layers,
        hidden_size=1,
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=1,
        vocab_size=1,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        context_length=1,
        dtype="bfloat16",
        eos_token_ids=(),
    )
    num_blocks = prompt_mib * 1024 // block_kib // num_layers
    return KvCache(config, 2 * num_blocks, 16, torch.bfloat16, device)


def block_table(layout: str, cache: KvCache, seed: int) -> list[int]:
    """Half of the cache's blocks."""
    ids = list(range(cache.num_blocks))
    if layout == "scattered":
        random.Random(seed).shuffle(ids)
    return ids[: cache.num_blocks // 2]


class Engine:
    """A KvSink that scatters in a thread of its own and believes everything."""

    def __init__(self, cache: KvCache) -> None:
        self._device = cache.device
        self._writer = KvWriter(cache)
        self._tables = [block_table(layout, cache, seed=2) for layout in LAYOUTS]
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def attempt_begun(self, pair_id, key):
        pass

    def chunk_landed(self, pair_id, header, payload, done):
        self._inbox.put((header, payload, done))

    def commit_received(self, pair_id, commit, done):
        self._inbox.put((None, None, done))

    def attempt_abandoned(self, pair_id, key):
        pass

    def pair_lost(self, pair_id, reason):
        pass

    def _run(self) -> None:
        while True:
            header, payload, done = self._inbox.get()
            still_read = None
            if header is not None:
                table = self._tables[header.key.reservation]
                blocks = table[header.first_block : header.first_block + header.num_blocks]
                still_read = self._writer.write(header.first_layer, header.num_layers, blocks, payload)
            else:
                # What is measured ends when everything has been written.
                self._writer.join()
                sleep_until_done(self._device)
            done(TransferStatus.OK, "", still_read)


class Servicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, pairs: PairServer) -> None:
        self._pairs = pairs

    async def ConnectPair(self, request_iterator, context):
        async with contextlib.aclosing(self._pairs.connect(request_iterator, context)) as responses:
            async for response in responses:
                yield response


async def meet(rank: int, connection: Connection) -> GlooGroup:
    """A bare group between the two processes."""
    joining = GlooJoining(rank, interface="127.0.0.1", timeout_s=WAIT_S)
    connection.send(await joining.rendezvous())
    return await joining.connect(await asyncio.to_thread(connection.recv))


def run_bare(group: PairGroup, rank: int, num_bytes: int, chunk_bytes: int, depth: int) -> float:
    """Seconds to move `num_bytes` in chunks, `depth` under way."""
    begin = group.send if rank == PREFILL_RANK else group.receive
    allocate = group.send_buffer if rank == PREFILL_RANK else group.receive_buffer
    buffers = [allocate(chunk_bytes).zero_() for _ in range(depth)]
    in_flight: deque = deque()
    started_s = time.perf_counter()
    for number in range(num_bytes // chunk_bytes):
        if len(in_flight) == depth:
            in_flight.popleft().wait(WAIT_S)
        in_flight.append(begin(buffers[number % depth]))
    for transfer in in_flight:
        transfer.wait(WAIT_S)
    return time.perf_counter() - started_s


async def decode(connection: Connection, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    pairs = PairServer(
        PairIdentity("decode", "boot", "same", "same"),
        Engine(make_cache(options.block_kib, options.prompt_mib)),
        DecodeConfig(max_chunk_bytes=options.chunk_bytes, staging_chunks=options.slots),
        transports=GLOO,
    )
    server = rpc.create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Servicer(pairs), server)
    connection.send(rpc.bind(server, "127.0.0.1:0"))
    await server.start()
    group = await meet(DECODE_RANK, connection)
    while await asyncio.to_thread(connection.recv) == "bare":
        total, depth = options.prompt_mib * 2**20, options.slots
        await asyncio.to_thread(run_bare, group, DECODE_RANK, total, options.chunk_bytes, depth)
    await server.stop(None)


async def ship(
    registry: PairRegistry, endpoint: str, cache: KvCache, layout: str, blocks: list[int] | None = None
) -> float:
    """Seconds from the first layer shipped until decode has acknowledged the commit."""
    pair = await registry.acquire(endpoint, timeout_s=WAIT_S)
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    outcomes: list[AttemptOutcome] = []

    def on_done(outcome: AttemptOutcome) -> None:
        outcomes.append(outcome)
        loop.call_soon_threadsafe(done.set)

    blocks = blocks or block_table(layout, cache, seed=1)
    started_s = time.perf_counter()
    attempt = pair.begin(AttemptKey(LAYOUTS.index(layout), 1), on_done)
    for layer in range(cache.num_layers):
        attempt.ship(layer, 0, blocks)
    attempt.commit(Commit(attempt.key, attempt.num_bytes, first_token_id=0))
    await done.wait()
    assert outcomes[0].status is TransferStatus.OK, outcomes[0]
    return time.perf_counter() - started_s


async def prefill(connection: Connection, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    cache = make_cache(options.block_kib, options.prompt_mib)
    identity = PairIdentity("prefill", "boot", "same", "same")
    registry = PairRegistry(identity, cache, PrefillConfig(), transports=GLOO)
    endpoint = f"127.0.0.1:{connection.recv()}"
    group = await meet(PREFILL_RANK, connection)
    total = options.prompt_mib * 2**20
    seconds: dict[str, list[float]] = {"bare": [], **{layout: [] for layout in LAYOUTS}}
    for round_ in range(options.rounds + 1):
        connection.send("bare")
        results = {
            "bare": await asyncio.to_thread(run_bare, group, PREFILL_RANK, total, options.chunk_bytes, options.slots)
        }
        for layout in LAYOUTS:
            results[layout] = await ship(registry, endpoint, cache, layout)
        if round_:
            for name, took_s in results.items():
                seconds[name].append(took_s)
    connection.send("end")
    await registry.close()
    report = Report("kv-transport", "KV shipping over gloo, checksums on, against bare send and receive")
    targets = {"bare": "", "scattered": ">= 0.5", "runs": ">= 0.7"}
    for name, took in seconds.items():
        share = statistics.median(b / s for b, s in zip(seconds["bare"], took, strict=True))
        rate = total / statistics.median(took) / 1e9
        report.add(what=name, gb_per_s=rate, share_of_bare=share, target=targets[name])
    staging_mib = options.slots * options.chunk_bytes / 2**20
    report.notes = [
        f"{options.prompt_mib} MiB a prompt, blocks of {options.block_kib} KiB a layer, chunks of "
        f"{options.chunk_bytes / 2**20:g} MiB, {options.slots} of them under way ({staging_mib:g} MiB of staging at "
        f"decode), {options.threads} torch threads; medians of {options.rounds} rounds, shares round by round."
    ]
    report.save()


def decode_process(connection: Connection, options: argparse.Namespace) -> None:
    uvloop.run(decode(connection, options))


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-kib", type=int, default=64, help="one layer of one block; a multiple of 8")
    parser.add_argument("--chunk-mib", type=float, default=4.0)
    parser.add_argument("--slots", type=int, default=8, help="chunks under way")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--prompt-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments or [])
    options.chunk_bytes = int(options.chunk_mib * 2**20)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=decode_process, args=(there, options), daemon=True)
    process.start()
    uvloop.run(prefill(here, options))
    process.join(WAIT_S)


if __name__ == "__main__":
    run(sys.argv[1:])
