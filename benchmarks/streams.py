"""A process of concurrent clients, and the hand of the process that measures on several of them.

`python -m benchmarks.streams` reads a job a line from stdin. It says that it is ready, waits for a line more, opens as
many of the job's streams at once as it is told and another whenever one ends, and says when each was opened, had its
first token and ended, on the monotonic clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import uvloop

from common import rpc
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2

TIMEOUT_S = 60.0
READY = "ready"


class Job(NamedTuple):
    """Random prompts, greedy, without end tokens: one stream for each number of output tokens."""

    address: str
    seed: int
    concurrency: int
    prompt_tokens: int
    output_tokens: list[int]
    vocab_size: int


class Stream(NamedTuple):
    """When things happened to one request, in seconds on one clock."""

    opened_s: float
    first_token_s: float
    ended_s: float
    num_tokens: int


def request_of(generator: random.Random, job: Job, output_tokens: int) -> router_pb2.GenerateRequest:
    token_ids = [generator.randrange(job.vocab_size) for _ in range(job.prompt_tokens)]
    request = router_pb2.GenerateRequest(
        prompt_token_ids=types_pb2.TokenIds(ids=token_ids), sampling=types_pb2.SamplingParams(temperature=0)
    )
    request.stopping.max_tokens = output_tokens
    request.stopping.ignore_eos = True
    return request


async def follow(stub: router_pb2_grpc.RouterServiceStub, request: router_pb2.GenerateRequest) -> Stream:
    opened_s = time.monotonic()
    first_token_s, num_tokens = 0.0, 0
    async for response in stub.Generate(request, timeout=TIMEOUT_S):
        if response.chunk.token_ids:
            first_token_s = first_token_s or time.monotonic()
            num_tokens += len(response.chunk.token_ids)
    wanted = request.stopping.max_tokens
    if num_tokens != wanted:
        raise RuntimeError(f"a stream brought {num_tokens} tokens, {wanted} were asked for")
    return Stream(opened_s, first_token_s, time.monotonic(), num_tokens)


async def follow_all(
    stub: router_pb2_grpc.RouterServiceStub, requests: Sequence[router_pb2.GenerateRequest], concurrency: int
) -> list[Stream]:
    waiting = iter(requests)
    streams: list[Stream] = []

    async def one_after_another() -> None:
        for request in waiting:
            streams.append(await follow(stub, request))

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return streams


async def serve() -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = Job(*json.loads(line))
        generator = random.Random(job.seed)
        requests = [request_of(generator, job, output_tokens) for output_tokens in job.output_tokens]
        async with rpc.connect(job.address) as channel:
            await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
            stub = router_pb2_grpc.RouterServiceStub(channel)
            print(READY, flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            streams = await follow_all(stub, requests, job.concurrency)
        print(json.dumps(streams), flush=True)


class ClientProcess:
    """One of them, told what to do."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.streams"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def prepare(self, job: Job) -> None:
        self._say(json.dumps(job))

    def wait_ready(self) -> None:
        if (line := self._hear()) != READY:
            raise RuntimeError(f"a client process said {line!r} instead of being ready")

    def go(self) -> None:
        self._say("go")

    def streams(self) -> list[Stream]:
        return [Stream(*times) for times in json.loads(self._hear())]

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client process ended with exit code {self._process.wait()}; see its traceback above")
        return line.strip()


@contextlib.contextmanager
def client_processes(count: int) -> Iterator[list[ClientProcess]]:
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(ClientProcess())
            stack.callback(clients[-1].stop)
        yield clients


def together(clients: Sequence[ClientProcess], jobs: Sequence[Job]) -> list[Stream]:
    """Runs one job on each client, all at once."""
    for client, job in zip(clients, jobs, strict=True):
        client.prepare(job)
    for client in clients:
        client.wait_ready()
    for client in clients:
        client.go()
    return [stream for client in clients for stream in client.streams()]


if __name__ == "__main__":
    uvloop.run(serve())
