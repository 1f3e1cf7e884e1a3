"""Decodes of Qwen3-8B while a long prompt arrives: what its KV's arrival does to the gap between their tokens.

The decode side is real: engine, reservations, pair, transfer threads. The other side, a process on another GPU or, with
only one, on the same, replays a prefill without computing: it ships blocks of the right layout, chunk by chunk and
layer by layer, for the reservation that it is told, and commits; the sequence joins the batch. Beside it the same
prompt prefilled by the decode engine itself, in chunks between its steps.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence as Seq
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import uvloop

from benchmarks.kv_transport import Servicer
from benchmarks.offline import OfflineEngine, make_sequence, one_by_one, random_prompt
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, Shape
from common import rpc
from common.config import DecodeConfig, PrefillConfig
from common.engine.kv_cache import KvCache
from common.model.config import ModelConfig
from common.sequence import Sequence
from common.transport.checksum import warm_up
from common.transport.messages import AttemptKey, AttemptOutcome, Commit, PairIdentity, TransferStatus
from common.transport.sending import SendingPair
from common.transport.transports import Transports
from decode_service.events import Completed, Event, Lost, Reserved, Token
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc
from prefill_service.pairs import PairRegistry

WAIT_S = 60.0
# Largest gap in milliseconds of vLLM 0.26.0 on an NVIDIA H200 when the prompt is prefilled beside the decodes, at once
# and in chunks of 2,048 tokens, and what an arrival may make of the undisturbed step.
VLLM_MS, VLLM_CHUNKED_MS, TARGET_RATIO = 197, 61, 1.3


class Setting(NamedTuple):
    """What runs where."""

    shape: Shape
    device: str
    # Where the other process has its blocks.
    sender: str
    transport: str
    num_decodes: int = 64
    context: int = 512
    prompt: int = 8192
    chunk: int = 2048
    # Of the sequence that arrives: its first steps in the batch count as well.
    output: int = 8
    arrivals: int = 12
    local_prefills: int = 4
    quiet_s: float = 0.12


class Replay(NamedTuple):
    """How one shipment went."""

    status: TransferStatus
    detail: str
    seconds: float
    num_bytes: int


class WatchedEngine(OfflineEngine):
    """Runs in its own thread, as in a service, and tells the event loop what happens to sequences."""

    def watch(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[Sequence | None, object]] = asyncio.Queue()
        # Those whose gaps count.
        self.steady: set[Sequence] = set()
        # Of every turn that brought them tokens: when.
        self.moments: list[float] = []

    async def until(self, sequence: Sequence, kind: type[Reserved] | type[int] | type[Completed]) -> object:
        """The next event of that kind, `int` being a token; everything before it is forgotten."""
        async with asyncio.timeout(WAIT_S):
            while True:
                whose, event = await self.events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Lost):
                    raise RuntimeError(f"a sequence lost its KV: {event.detail}")
                if whose is sequence and isinstance(event, kind):
                    return event

    def _on_events(self, events: dict[Sequence, list[Event]]) -> None:
        now = time.perf_counter()
        entries = one_by_one(events)
        if any(sequence in self.steady and isinstance(event, int | Token) for sequence, event in entries):
            self.moments.append(now)
        # Steady tokens would keep the event loop busy, which takes the interpreter from the engine.
        told = [entry for entry in entries if entry[0] not in self.steady or not isinstance(entry[1], int | Token)]
        if told:
            self._loop.call_soon_threadsafe(self._tell, told)

    def _tell(self, events: Seq[tuple[Sequence | None, object]]) -> None:
        for entry in events:
            self.events.put_nowait(entry)

    def _crashed(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._tell, [(None, RuntimeError(f"the engine crashed: {error!r}"))])


def hear(connection: Connection) -> Any:
    """What the other process says next."""
    if not connection.poll(WAIT_S):
        raise TimeoutError(f"the process that replays said nothing for {WAIT_S:g} s")
    return connection.recv()


def gaps_within(moments: Seq[float], begin_s: float, end_s: float) -> list[float]:
    """Gaps between neighbouring moments that lie wholly within."""
    pairs = itertools.pairwise(moments)
    return [later - earlier for earlier, later in pairs if begin_s <= earlier and later <= end_s]


def gaps_touching(moments: Seq[float], begin_s: float, end_s: float) -> list[float]:
    """Gaps between neighbouring moments of which any part lies within."""
    pairs = itertools.pairwise(moments)
    return [later - earlier for earlier, later in pairs if begin_s <= later and earlier <= end_s]


# The process that replays.


def run_replay(connection: Connection, setting: Setting) -> None:
    uvloop.run(replay(connection, setting))


async def replay(connection: Connection, setting: Setting) -> None:
    """Ships what it is told to, until it is told None."""
    shape, device = setting.shape, torch.device(setting.sender)
    config = ModelConfig.from_folder(shape.folder)
    # The decode side first says where it is and what its blocks look like.
    port, fingerprint, layout, block_size, dtype = await asyncio.to_thread(connection.recv)
    num_blocks = -(-setting.prompt // block_size)
    cache = KvCache(config, 2 * num_blocks, block_size, dtype, device)
    for layer in cache.layers:
        layer.normal_()
    if device.type == "cuda":
        # Shipping reads them on other streams.
        torch.cuda.synchronize(device)
    if cache.layout != layout:
        raise RuntimeError(f"the blocks to replay are {cache.layout}, the decode worker's are {layout}")
    warm_up(device)
    registry = PairRegistry(
        PairIdentity("replay", "boot", fingerprint, layout),
        cache,
        PrefillConfig(pair_connect_s=WAIT_S),
        transports=Transports.of((setting.transport,), device),
    )
    pair = await registry.acquire(f"127.0.0.1:{port}", timeout_s=WAIT_S)
    blocks = random.Random(0).sample(range(cache.num_blocks), num_blocks)
    connection.send(pair.transport)
    while (key := await asyncio.to_thread(connection.recv)) is not None:
        connection.send(await ship(pair, cache, AttemptKey(*key), blocks, setting.chunk // block_size))
    await registry.close()


async def ship(pair: SendingPair, cache: KvCache, key: AttemptKey, blocks: Seq[int], chunk_blocks: int) -> Replay:
    """All layers of each chunk, as prefill computes them."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[AttemptOutcome] = loop.create_future()

    def on_done(result: AttemptOutcome) -> None:
        loop.call_soon_threadsafe(outcome.set_result, result)

    started_s = time.perf_counter()
    attempt = pair.begin(key, on_done)
    for first in range(0, len(blocks), chunk_blocks):
        for layer in range(cache.num_layers):
            attempt.ship(layer, first, blocks[first : first + chunk_blocks])
    attempt.commit(Commit(key, attempt.num_bytes, first_token_id=0))
    async with asyncio.timeout(WAIT_S):
        result = await outcome
    status = TransferStatus.INVALID if result.status is None else result.status
    return Replay(status, result.detail, time.perf_counter() - started_s, attempt.num_bytes)


# The decode side.


class Arrival(NamedTuple):
    """When the reservation was asked for, when its KV was complete and it joined the batch, when it was done."""

    begin_s: float
    joined_s: float
    end_s: float
    replay: Replay


async def arrival(engine: WatchedEngine, connection: Connection, sequence: Sequence) -> Arrival:
    """A reservation filled by the other process."""
    begin_s = time.perf_counter()
    engine.engine.open(sequence, local=False)
    reserved = await engine.until(sequence, Reserved)
    assert isinstance(reserved, Reserved)
    connection.send((reserved.reservation, reserved.attempt))
    replayed = await asyncio.to_thread(hear, connection)
    if replayed.status is not TransferStatus.OK:
        raise RuntimeError(f"decode did not take the KV: {replayed.status}: {replayed.detail}")
    joined_s = time.perf_counter()
    await engine.until(sequence, Completed)
    return Arrival(begin_s, joined_s, time.perf_counter(), replayed)


async def local_prefill(engine: WatchedEngine, sequence: Sequence) -> tuple[float, float]:
    begin_s = time.perf_counter()
    engine.engine.open(sequence, local=True)
    await engine.until(sequence, Completed)
    return begin_s, time.perf_counter()


async def measure(report: Report, engine: WatchedEngine, connection: Connection, setting: Setting) -> None:
    engine.watch()
    parts = engine.parts
    pairs = PairServer(parts.pair_identity, engine.engine, DecodeConfig(), transports=parts.transports)
    engine.engine.on_gone = pairs.reservation_gone
    engine.engine.transport_of = pairs.transport_of
    server = rpc.create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Servicer(pairs), server)
    port = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    identity, cache = parts.pair_identity, parts.cache
    dtype = cache.layers[0].dtype
    connection.send((port, identity.model_fingerprint, identity.kv_layout, cache.block_size, dtype))
    engine.engine.start()
    try:
        transport = await asyncio.to_thread(hear, connection)
        print(f"  a pair over {transport}", flush=True)
        await observe(report, engine, connection, setting, transport)
        connection.send(None)
    finally:
        await pairs.close()
        await server.stop(None)
        await asyncio.to_thread(engine.engine.stop)


async def observe(
    report: Report, engine: WatchedEngine, connection: Connection, setting: Setting, transport: str
) -> None:
    generator = random.Random(0)

    def new_sequence(num_tokens: int, output: int) -> Sequence:
        return make_sequence(random_prompt(generator, num_tokens, setting.shape.vocab_size), output)

    decodes = [new_sequence(setting.context, 16 * setting.context) for _ in range(setting.num_decodes)]
    for sequence in decodes:
        engine.engine.open(sequence, local=True)
    # In the order in which they came.
    for sequence in decodes:
        await engine.until(sequence, int)
    engine.steady.update(decodes)
    quiet: list[float] = []
    arriving: list[list[float]] = []
    on_the_way: list[list[float]] = []
    prefilling: list[list[float]] = []
    replays: list[Replay] = []
    # Made now: drawing so many tokens keeps the interpreter from the engine.
    arriving_now = [new_sequence(setting.prompt, setting.output) for _ in range(setting.arrivals)]
    prefilled_now = [new_sequence(setting.prompt, setting.output) for _ in range(setting.local_prefills)]
    for number in range(max(setting.arrivals, setting.local_prefills)):
        # Whatever is compiled, connected or allocated at first use is in the first of each.
        began_s = time.perf_counter()
        await asyncio.sleep(setting.quiet_s)
        if number:
            quiet += gaps_within(engine.moments, began_s + setting.quiet_s / 10, time.perf_counter())
        if number < setting.arrivals:
            one = await arrival(engine, connection, arriving_now[number])
            if number:
                arriving.append(gaps_touching(engine.moments, one.begin_s, one.end_s))
                on_the_way.append(gaps_within(engine.moments, one.begin_s, one.joined_s))
                replays.append(one.replay)
        if number < setting.local_prefills:
            await asyncio.sleep(setting.quiet_s / 4)
            begin_s, end_s = await local_prefill(engine, prefilled_now[number])
            if number:
                prefilling.append(gaps_touching(engine.moments, begin_s, end_s))
    context = min(sequence.num_tokens for sequence in decodes)
    for sequence in decodes:
        engine.engine.close(sequence)
    step_s = statistics.median(quiet)
    add(report, "undisturbed", [quiet], step_s)
    add(report, f"KV of {setting.prompt:,} tokens arrives over {transport}", arriving, step_s, target=TARGET_RATIO)
    add(report, "of these, until it joins the batch", on_the_way, step_s)
    chunks = f"in chunks of {setting.chunk:,}"
    add(report, f"{setting.prompt:,} tokens prefilled locally {chunks}", prefilling, step_s, vllm_ms=VLLM_CHUNKED_MS)
    shipping_ms = statistics.median(one.seconds for one in replays) * 1e3
    rate = statistics.median(one.num_bytes / one.seconds for one in replays) / 1e9
    report.notes += [
        f"- {setting.num_decodes} decodes, contexts of {setting.context} to {context} tokens; {len(arriving)} arrivals "
        f"of {replays[0].num_bytes / 2**20:,.0f} MiB at {rate:.3g} GB/s, a median of {shipping_ms:.3g} ms from the "
        f"first block shipped to the commit's acknowledgement; {len(prefilling)} local prefills.",
        "- Gaps are those between the turns of the decode engine that bring the decodes' tokens, from the reservation "
        f"until the sequence that arrived has had {setting.output} tokens. `largest_ms` is the largest of all, "
        "`usual_largest_ms` the median of each arrival's largest; `ratio` is the largest over the undisturbed median. "
        "Once it has joined, every step has one sequence more, and one of the prompt's length.",
        f"- vLLM 0.26.0, prompt prefilled at once beside the decodes: {VLLM_MS} ms.",
    ]
    if setting.sender == setting.device:
        report.notes.append(
            "- Both processes are on one GPU without MPS, so that the sender's gathering and checksums take turns with "
            "the decode steps."
        )


def add(
    report: Report,
    what: str,
    groups: Seq[Seq[float]],
    step_s: float,
    *,
    target: float | None = None,
    vllm_ms: float | None = None,
) -> None:
    """`groups`: gaps of each arrival, in seconds."""
    gaps = sorted(gap for group in groups for gap in group)
    largest_s = gaps[-1]
    report.add(
        what=what,
        num_gaps=len(gaps),
        median_ms=statistics.median(gaps) * 1e3,
        p99_ms=gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * 1e3,
        largest_ms=largest_s * 1e3,
        usual_largest_ms=statistics.median(max(group) for group in groups) * 1e3,
        ratio=largest_s / step_s,
        target_ratio=target,
        vllm_ms=vllm_ms,
    )


def measure_in_two_processes(report: Report, setting: Setting, **settings: object) -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=run_replay, args=(there, setting), daemon=True)
    process.start()
    there.close()
    try:
        engine = WatchedEngine(
            setting.shape,
            device=setting.device,
            max_num_seqs=setting.num_decodes + 8,
            max_batch_tokens=setting.chunk,
            **settings,
        )
        print(f"  ready after {engine.ready_s:.1f} s", flush=True)
        uvloop.run(measure(report, engine, here, setting))
    except EOFError:
        raise RuntimeError("the process that replays failed; see its traceback above") from None
    finally:
        process.join(5)
        process.kill()


def run() -> None:
    report = Report("interference", "64 decodes of Qwen3-8B at context 512 while a prompt of 8,192 tokens arrives")
    sender, transport = ("cuda:1", "nccl") if torch.cuda.device_count() > 1 else ("cuda:0", "cuda-ipc")
    setting = Setting(SHAPES["8B"], "cuda:0", sender, transport)
    measure_in_two_processes(report, setting, gpu_memory_fraction=0.6)
    report.save()


if __name__ == "__main__":
    run()
