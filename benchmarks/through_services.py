"""The decode benchmark's work through router and decode processes, beside the engine alone, on one GPU.

No prefill worker is alive, so decode prefills itself, as the engine alone does. First the engine alone, in a process
that then ends; then a decode process with the same settings, routers, and clients in processes of their own.

Steady: so many streams are open all the time, another begins whenever one ends, and what counts lies between the first
ends and the last beginnings. All at once: every stream is opened in the same moment, and a step is what the decode
worker says of the time in which all were open; what it takes more than the engine alone is time in which the GPU waits
for the services.

    python -m benchmarks.through_services [--stream-interval-ms 10]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc

from benchmarks.decode_step import OUTPUT, PROMPT
from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.processes import in_new_process
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, Shape
from benchmarks.streams import ClientProcess, Job, Stream, client_processes, together
from pdserve.v1 import decode_pb2, decode_pb2_grpc
from tests.support.processes import Service, free_port

# Concurrent streams, and how many requests follow each other in each of them.
STREAMS = {1: 30, 64: 5, 256: 3, 512: 3}
ROUTERS = (1, 4)
MOST_CLIENTS = 4
STREAMS_PER_CLIENT = 128
# Of the decode worker and of the engine alone.
SETTINGS = {"max_batch_tokens": 16384, "gpu_memory_fraction": 0.9}
READY_S = 240.0
# Seldom: an answer takes the interpreter from the engine.
POLL_S = 0.04


class Round(NamedTuple):
    """What was seen of so many streams."""

    # Steady.
    tokens_per_s: float
    # Medians over the streams, steady and all at once.
    first_token_s: float
    first_token_at_once_s: float
    # While all were open; None where that was too short to tell.
    step_s: float | None


class Poll(NamedTuple):
    """The decode worker's books at some moment between two."""

    asked_s: float
    answered_s: float
    num_steps: int
    steps_s: float


def output_lengths(count: int, each: int) -> list[int]:
    """Of `each` requests a stream: around the decode benchmark's, so that streams do not end together."""
    generator = random.Random(count)
    return [generator.randint(OUTPUT // 2, OUTPUT + OUTPUT // 2) for _ in range(count * each)]


def steady(streams: Sequence[Stream], count: int) -> tuple[float, float]:
    """(tokens a second, median time to first token) while `count` streams were open and none was among the first.

    A stream's tokens are taken to come evenly between its first and its last.
    """
    begin_s = sorted(stream.ended_s for stream in streams)[count - 1]
    end_s = sorted(stream.opened_s for stream in streams)[-1]
    if end_s <= begin_s:
        raise ValueError(f"{len(streams)} requests are too few for {count} streams")
    num_tokens = 0.0
    for stream in streams:
        inside_s = min(stream.ended_s, end_s) - max(stream.first_token_s, begin_s)
        num_tokens += stream.num_tokens * max(0.0, inside_s) / (stream.ended_s - stream.first_token_s)
    first_tokens_s = [stream.first_token_s - stream.opened_s for stream in streams if stream.opened_s >= begin_s]
    return num_tokens / (end_s - begin_s), statistics.median(first_tokens_s)


def engine_alone(shape: Shape, device: str, streams: Mapping[int, int]) -> dict[int, Round]:
    """For each number of streams that the KV cache holds."""
    engine = OfflineEngine(shape, device=device, max_num_seqs=max(streams), **SETTINGS)
    print(f"  engine alone: ready after {engine.ready_s:.1f} s", flush=True)
    results: dict[int, Round] = {}
    for count, each in streams.items():
        if engine.holds(count, PROMPT + 2 * OUTPUT):
            results[count] = engine_round(engine, count, each)
    return results


def engine_round(engine: OfflineEngine, count: int, each: int) -> Round:
    generator = random.Random(count)

    def requests(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
        return [(random_prompt(generator, PROMPT, engine.shape.vocab_size), length) for length in lengths]

    for _ in range(2):
        # Whatever is compiled or allocated at first use is in the first.
        engine.run(requests([OUTPUT] * count))
    first_token_at_once_s = statistics.median(engine.first_tokens_s)
    full = [moment for moment, num_tokens in engine.arrivals if num_tokens == count]
    gaps = [later - earlier for earlier, later in itertools.pairwise(full)]
    engine.run(requests(output_lengths(count, each)), concurrency=count)
    return Round(*steady(engine.streams, count), first_token_at_once_s, statistics.median(gaps) if gaps else None)


@contextlib.contextmanager
def services(
    folder: str, device: str, max_num_seqs: int, decode_args: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """A decode worker's address, and those of its routers."""
    settings = {"model": folder, "load_format": "dummy", "device": device, "max_num_seqs": max_num_seqs, **SETTINGS}
    flags = [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
    decode = f"127.0.0.1:{free_port()}"
    # No prefix is shared, and the engine alone does not look for one either; nor is it ever idle and calibrates.
    decode_flags = [*flags, "--no-prefix-cache", "--decode-pipeline", "disabled", *decode_args]
    # Nothing listens on port 1: no prefill worker, and nobody waits for one.
    router_flags = ["--model", folder, "--decode", decode, "--prefill", "127.0.0.1:1", "--startup-grace-s", "0"]
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:

        def started(name: str, address: str, arguments: Sequence[str], log: str) -> Service:
            arguments = ["--listen", address, "--metrics-listen", "", *arguments]
            service = Service(name, arguments, address, Path(logs) / log, {})
            service.start()
            stack.callback(service.stop)
            return service

        started_s = time.monotonic()
        started("decode_service", decode, decode_flags, "decode.log").wait_ready(READY_S)
        print(f"  decode worker: ready after {time.monotonic() - started_s:.1f} s", flush=True)
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(max(ROUTERS))]
        routers = [started("router", address, router_flags, f"{address}.log") for address in addresses]
        for router in routers:
            router.wait_ready(READY_S)
        try:
            yield decode, addresses
        except BaseException:
            for path in sorted(Path(logs).iterdir()):
                print(f"--- {path.name}\n{path.read_text()[-2000:]}", file=sys.stderr, flush=True)
            raise


@contextlib.contextmanager
def polling(address: str) -> Iterator[list[Poll]]:
    """Asks the decode worker for its books meanwhile."""
    polls: list[Poll] = []
    done = threading.Event()

    def poll() -> None:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            while not done.wait(POLL_S):
                asked_s = time.monotonic()
                with contextlib.suppress(grpc.RpcError):
                    stats = stub.GetPipelineStats(decode_pb2.GetPipelineStatsRequest(), timeout=5)
                    steps_s = stats.total_ms * stats.num_steps / 1e3
                    polls.append(Poll(asked_s, time.monotonic(), stats.num_steps, steps_s))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield polls
    finally:
        done.set()
        thread.join(10)


def step_between(polls: Sequence[Poll], begin_s: float, end_s: float) -> float | None:
    """Mean step of the worker between two moments; None without two polls in between."""
    inside = [poll for poll in polls if begin_s <= poll.asked_s and poll.answered_s <= end_s]
    if len(inside) < 2 or inside[-1].num_steps == inside[0].num_steps:
        return None
    return (inside[-1].steps_s - inside[0].steps_s) / (inside[-1].num_steps - inside[0].num_steps)


def run_jobs(
    clients: Sequence[ClientProcess], routers: Sequence[str], lengths: Sequence[int], count: int, vocab_size: int
) -> list[Stream]:
    """Shares requests and concurrent streams out to the clients; a client talks to one router."""
    jobs = [
        Job(
            address=routers[index % len(routers)],
            seed=random.randrange(2**32),
            concurrency=count // len(clients) + (index < count % len(clients)),
            prompt_tokens=PROMPT,
            output_tokens=list(lengths[index :: len(clients)]),
            vocab_size=vocab_size,
        )
        for index in range(len(clients))
    ]
    return together(clients, jobs)


def services_round(
    clients: Sequence[ClientProcess],
    routers: Sequence[str],
    decode: str,
    count: int,
    each: int,
    vocab_size: int,
) -> Round:
    run_jobs(clients, routers, [OUTPUT] * count, count, vocab_size)
    with polling(decode) as polls:
        at_once = run_jobs(clients, routers, [OUTPUT] * count, count, vocab_size)
    first_token_at_once_s = statistics.median(stream.first_token_s - stream.opened_s for stream in at_once)
    all_open_s = max(stream.first_token_s for stream in at_once), min(stream.ended_s for stream in at_once)
    streams = run_jobs(clients, routers, output_lengths(count, each), count, vocab_size)
    return Round(*steady(streams, count), first_token_at_once_s, step_between(polls, *all_open_s))


def add(report: Report, count: int, alone: Round, round_: Round, *, routers: int, clients: int) -> None:
    """A row; without routers, that of the engine alone."""
    idle_share = None
    if routers and alone.step_s and round_.step_s:
        idle_share = max(0.0, 1 - alone.step_s / round_.step_s)
    report.add(
        streams=count,
        how="through the services" if routers else "engine alone",
        routers=routers,
        clients=clients,
        tokens_per_s=round_.tokens_per_s,
        ratio=round_.tokens_per_s / alone.tokens_per_s,
        first_token_ms=round_.first_token_s * 1e3,
        first_token_added_ms=(round_.first_token_s - alone.first_token_s) * 1e3,
        target=">= 0.95, <= 3 ms" if routers else "",
        step_ms=None if round_.step_s is None else round_.step_s * 1e3,
        idle_share=idle_share,
        first_token_at_once_ms=round_.first_token_at_once_s * 1e3,
    )


def measure(
    report: Report, shape: Shape, device: str, streams: Mapping[int, int], decode_args: Sequence[str] = ()
) -> None:
    alone = in_new_process(engine_alone, shape, device, streams)
    for count in streams.keys() - alone.keys():
        report.notes.append(f"- {count} streams: not run, their KV does not fit.")
    for count, round_ in alone.items():
        add(report, count, round_, round_, routers=0, clients=0)
    with (
        services(shape.folder, device, max(streams), decode_args) as (decode, routers),
        client_processes(MOST_CLIENTS) as clients,
    ):
        for count in alone:
            for num_routers in ROUTERS if count > 1 else (1,):
                used = clients[: max(num_routers, -(-count // STREAMS_PER_CLIENT))]
                round_ = services_round(used, routers[:num_routers], decode, count, streams[count], shape.vocab_size)
                add(report, count, alone[count], round_, routers=num_routers, clients=len(used))


def run(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream-interval-ms", help="of the decode worker; its default where it is not given")
    options = parser.parse_args(arguments)
    interval = options.stream_interval_ms
    report = Report(
        "through-services", "Decode work through router and decode processes, Qwen3-0.6B, no prefill worker"
    )
    measure(report, SHAPES["0.6B"], "cuda", STREAMS, ["--stream-interval-ms", interval] if interval else ())
    report.notes += [
        f"- Prompts of {PROMPT} tokens, greedy. Steady (`tokens_per_s`, `first_token_ms`): {OUTPUT // 2} to "
        f"{OUTPUT + OUTPUT // 2} tokens out, {', '.join(f'{each} requests' for each in STREAMS.values())} in a row in "
        f"each of {', '.join(map(str, STREAMS))} streams. All at once (`step_ms`, `first_token_at_once_ms`): {OUTPUT} "
        "tokens out.",
        "- One decode process, in which engine and front end share an interpreter; tokens of a stream gather there for "
        f"{interval or 'the default of 10'} ms; {len(os.sched_getaffinity(0))} cores for all processes.",
        "- `step_ms` is the decode worker's mean while all streams were open, `idle_share` what it has more than the "
        "engine alone; times to the first token are medians over streams.",
    ]
    report.save()


if __name__ == "__main__":
    run(sys.argv[1:])
