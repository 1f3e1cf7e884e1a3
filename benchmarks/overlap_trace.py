"""How much of KV shipping hides behind the computation: one prompt of Qwen3-8B, prefilled in the real engine.

A trace of the prefill process shows, by stream, what computes and what gathers, checks and sends. Beside it the time
from the first token to decode's last acknowledgement, and the time of shipping the same blocks when nothing computes.
The trace is kept for chrome://tracing or Perfetto.

    python -m benchmarks.overlap_trace [--prompt-tokens 4096] [--trace FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import uvloop

from benchmarks.kv_transport import WAIT_S, ship
from benchmarks.kv_transport_gpu import SHAPE, decode_sink
from benchmarks.offline import make_sequence, random_prompt
from benchmarks.report import Report
from common.clock import monotonic
from common.config import PrefillConfig
from common.engine.loop import on_device
from common.engine.setup import WorkerParts, build
from common.metrics import PrefillMetrics
from common.transport.messages import AttemptKey, PairIdentity
from common.transport.sending import SendingPair
from prefill_service.engine import PrefillEngine, PrefillResult, Task
from prefill_service.pairs import PairRegistry
from prefill_service.scheduler import Job, PrefillScheduler

Interval = tuple[float, float]


def busy(trace: dict) -> dict[int, list[Interval]]:
    """When each stream worked, in microseconds."""
    streams: dict[int, list[Interval]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            interval = event["ts"], event["ts"] + event["dur"]
            streams.setdefault(event["args"]["stream"], []).append(interval)
    return {stream: merged(intervals) for stream, intervals in streams.items()}


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def shared(some: list[Interval], others: list[Interval]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)


def make_engine(options: argparse.Namespace) -> tuple[PrefillEngine, WorkerParts, PrefillConfig]:
    config = PrefillConfig(
        model=SHAPE.folder,
        load_format="dummy",
        device="cuda:0",
        gpu_memory_fraction=0.5,
        prefix_cache=False,
        max_batch_tokens=options.prompt_tokens,
        pair_connect_s=WAIT_S,
    )
    parts = build(config)
    with on_device(parts.device):
        parts.prefiller.warm_up(options.prompt_tokens)
    scheduler = PrefillScheduler(
        parts.pool,
        parts.prefix,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting_requests,
        clock=monotonic,
    )
    engine = PrefillEngine(
        scheduler,
        parts.prefiller,
        clock=monotonic,
        metrics=PrefillMetrics(),
        on_load=lambda load: None,
        on_crash=lambda error: None,
    )
    return engine, parts, config


async def prefill_once(engine: PrefillEngine, pair: SendingPair, prompt: list[int]) -> PrefillResult:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[PrefillResult] = loop.create_future()
    job = Job(make_sequence(prompt, 1), num_remote_cached_tokens=0)
    task = Task(job, AttemptKey(0, 1), pair, lambda result: loop.call_soon_threadsafe(done.set_result, result))
    engine.submit_task(task)
    async with asyncio.timeout(WAIT_S):
        result = await done
    if not isinstance(result, PrefillResult):
        raise result
    return result


async def measure(connection: Connection, options: argparse.Namespace) -> None:
    engine, parts, config = make_engine(options)
    identity = PairIdentity("prefill", "boot", "same", "same")
    registry = PairRegistry(identity, parts.cache, config, transports=parts.transports)
    endpoint = f"127.0.0.1:{await asyncio.to_thread(connection.recv)}"
    pair = await registry.acquire(endpoint, timeout_s=WAIT_S)
    engine.start()
    prompt = random_prompt(random.Random(0), options.prompt_tokens, SHAPE.vocab_size)
    for _ in range(3):
        await prefill_once(engine, pair, prompt)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = await prefill_once(engine, pair, prompt)
        torch.cuda.synchronize()
    blocks = random.Random(1).sample(range(parts.cache.num_blocks), options.prompt_tokens // config.block_size)
    afterwards_s = min([await ship(registry, endpoint, parts.cache, "scattered", blocks) for _ in range(3)])
    profile.export_chrome_trace(options.trace)
    print(f"the trace is in {options.trace}", flush=True)
    report_on(Path(options.trace), result, afterwards_s, pair.transport, options)
    connection.send("end")
    await registry.close()
    engine.stop()


def report_on(
    path: Path, result: PrefillResult, afterwards_s: float, transport: str, options: argparse.Namespace
) -> None:
    streams = busy(json.loads(path.read_text()))
    compute = max(streams, key=lambda stream: length(streams[stream]))
    transfer = merged(interval for stream, intervals in streams.items() if stream != compute for interval in intervals)
    report = Report("overlap-trace", "KV shipping behind the computation of a prompt, Qwen3-8B")
    report.add(what="computation, ms", value=length(streams[compute]) / 1e3)
    report.add(what="gather, check and send on the device, ms", value=length(transfer) / 1e3)
    report.add(what="of it while something computes", value=shared(transfer, streams[compute]) / length(transfer))
    report.add(what="from the first token to the last acknowledgement, ms", value=result.kv_transfer_ms)
    report.add(what="shipping everything when nothing computes, ms", value=afterwards_s * 1e3)
    report.notes = [
        f"{options.prompt_tokens:,} tokens, {result.kv_bytes / 2**20:.0f} MiB over {transport}; the device part of the "
        "receiving process is in another trace."
    ]
    report.save()


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--trace", default=str(Path(tempfile.gettempdir()) / "pdserve-overlap-trace.json"))
    options = parser.parse_args(arguments or [])
    options.prompt_mib = options.prompt_tokens * SHAPE.kv_bytes_per_token // 2**20
    device = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=decode_sink, args=(there, device, options.prompt_mib), daemon=True)
    process.start()
    uvloop.run(measure(here, options))
    process.join(WAIT_S / 6)


if __name__ == "__main__":
    run(sys.argv[1:])
