"""The hand-over between two processes on one GPU: prefill's first token known until the second token is at the client.

Less one decode step, as in `benchmarks.handover`. Once at a client that opens Decode and calls Prefill itself, once at
one of the router: there it includes the way of the request through the router and the opening of the Decode stream.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from benchmarks.handover import WARM_UP, measure, token_ids
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, Shape
from common import rpc
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import running_services

REPEATS = 80
LENGTHS = (512, 2048)
NUM_TOKENS = 64
TIMEOUT_S = 60.0
READY_S = 240.0


async def through_router(address: str, length: int, repeats: int) -> list[float]:
    """Milliseconds of every request."""
    values = []
    async with rpc.connect(address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        for index in range(repeats + WARM_UP):
            # Other prompts than those before, which decode may have cached.
            request = router_pb2.GenerateRequest(
                prompt_token_ids=types_pb2.TokenIds(ids=token_ids(500 + index, length)),
                sampling=types_pb2.SamplingParams(temperature=0),
            )
            request.stopping.max_tokens = NUM_TOKENS
            request.stopping.ignore_eos = True
            called_s = time.monotonic()
            times: list[float] = []
            path = None
            async for response in stub.Generate(request, timeout=TIMEOUT_S):
                times += [time.monotonic()] * len(response.chunk.token_ids)
                if response.HasField("completion"):
                    path = response.completion.path
            assert path is not None
            if path.kv_path != types_pb2.KV_PATH_REMOTE:
                raise RuntimeError(f"the KV came by {types_pb2.KvPath.Name(path.kv_path)}, not from the prefill worker")
            step_s = (times[-1] - times[2]) / (len(times) - 3)
            values.append((times[1] - called_s - step_s) * 1e3 - path.queue_ms - path.prefill_ms)
    return values[WARM_UP:]


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def measure_all(
    report: Report, shape: Shape, device: str, transport: str, lengths: Sequence[int], repeats: int
) -> None:
    model = ["--model", shape.folder]
    router = [*model, "--local-prefill", "never"]
    worker = [*model, "--load-format", "dummy", "--device", device, "--kv-transports", transport]
    worker += ["--max-num-seqs", "16", "--gpu-memory-fraction", "0.3"]
    started_s = time.monotonic()
    with running_services(
        prefill_args=worker, decode_args=[*worker, "--decode-pipeline", "disabled"], router_args=router, ready_s=READY_S
    ) as services:
        print(f"  ready after {time.monotonic() - started_s:.1f} s", flush=True)
        for length in lengths:
            values, timelines = asyncio.run(
                measure(
                    services.prefill.address, services.decode.address, length, repeats=repeats, num_tokens=NUM_TOKENS
                )
            )
            routed = asyncio.run(through_router(services.router.address, length, repeats))
            report.add(
                prompt_tokens=length,
                transport=timelines[0].prefill.kv_transport,
                p50_ms=statistics.median(values),
                p99_ms=p99(values),
                of_which_transfer_ms=statistics.median(timeline.prefill.kv_transfer_ms for timeline in timelines),
                router_p50_ms=statistics.median(routed),
                router_p99_ms=p99(routed),
                prefill_ms=statistics.median(timeline.prefill.prefill_ms for timeline in timelines),
                kv_mib=timelines[0].prefill.kv_bytes / 2**20,
            )


def run() -> None:
    report = Report("handover-gpu", "Hand-over from prefill to decode, two processes on one GPU, Qwen3-0.6B")
    measure_all(report, SHAPES["0.6B"], "cuda:0", "cuda-ipc", LENGTHS, REPEATS)
    report.notes = [
        f"{REPEATS} requests one after the other, {NUM_TOKENS} tokens out; no prefix is cached on either side. "
        "`router_`: at a client of the router, from its call on, less queue, prefill and one step."
    ]
    report.save()


if __name__ == "__main__":
    run()
