"""Services that play a script: messages to send, errors to raise, and HANG, which waits until the caller leaves."""

from __future__ import annotations

import asyncio
import math

from common.health import Health
from pdserve.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

HANG = object()

PATH = types_pb2.ServingPath(
    prefill_worker="prefill-a",
    decode_worker="decode-b",
    kv_path=types_pb2.KV_PATH_REMOTE,
    kv_bytes=245_760,
    kv_transport="gloo",
    queue_ms=0.25,
    prefill_ms=12.0,
    kv_transfer_ms=1.5,
    first_decode_ms=1234.0,
)


def chunk(text: str, *token_ids: int, request_id: str | None = None) -> router_pb2.GenerateResponse:
    made = router_pb2.TokenChunk(text=text, token_ids=token_ids)
    return router_pb2.GenerateResponse(request_id=request_id, chunk=made)


def completion(**fields) -> router_pb2.GenerateResponse:
    usage = router_pb2.Usage(prompt_tokens=4, completion_tokens=3, cached_prompt_tokens=0)
    made = router_pb2.Completion(
        **{"finish_reason": types_pb2.FINISH_REASON_LENGTH, "usage": usage, "path": PATH} | fields
    )
    return router_pb2.GenerateResponse(completion=made)


SCRIPT = [chunk("Once ", 11, request_id="r-1"), chunk("upon", 12, 13), completion()]

WORKERS = router_pb2.ListWorkersResponse(
    workers=[
        router_pb2.Worker(
            role=types_pb2.ROLE_PREFILL,
            address="127.0.0.1:50052",
            instance_id="prefill-a",
            boot_id="b0",
            state=types_pb2.WORKER_STATE_SERVING,
            num_free_blocks=1000,
            num_total_blocks=2048,
            num_cached_blocks=12,
            num_running=3,
            num_waiting=1,
            num_pairs=1,
            model_fingerprint="0123456789abcdef",
        ),
        router_pb2.Worker(role=types_pb2.ROLE_DECODE, address="[::1]:50053", state=types_pb2.WORKER_STATE_UNREACHABLE),
    ],
)

SEED_FIGURES = decode_pb2.GetPipelineStatsResponse(
    mode=decode_pb2.PIPELINE_MODE_STATIC,
    active=True,
    total_tokens=256,
    attention_ms=1.23,
    ffn_ms=0.98,
    total_ms=2.21,
    attention_sm_asked=16,
    attention_sm=16,
    ffn_sm_asked=16,
    ffn_sm=16,
    num_steps=64,
    num_profiled_steps=64,
    cut="layer",
    attention_stage_p50_ms=0.04,
    attention_stage_p99_ms=0.0512,
    ffn_stage_p50_ms=0.03,
    ffn_stage_p99_ms=0.0333,
    attention_occupancy=0.56,
    ffn_occupancy=0.44,
    bubble_share=0.5,
    attention_queue_depth=0.25,
    handoff_bytes=4096,
    num_pipelined_steps=60,
    num_switches=1,
    num_rebalances=2,
    gain=1.05,
)


EXPLANATION = router_pb2.ExplainResponse(
    placings=[
        router_pb2.Placing(
            role=types_pb2.ROLE_DECODE,
            chosen="10.0.0.2:50053",
            age_s=3.0,
            num_tokens=64,
            candidates=[
                router_pb2.Candidate(
                    address="10.0.0.2:50053", instance_id="decode-b", cost=12.5, pace_ms=11.0, num_free_blocks=900
                ),
                router_pb2.Candidate(
                    address="10.0.0.1:50053",
                    instance_id="decode-a",
                    refusal=router_pb2.REFUSAL_DRAINING,
                    detail="it is draining",
                ),
            ],
        ),
        router_pb2.Placing(
            role=types_pb2.ROLE_PREFILL,
            num_tokens=64,
            way=router_pb2.PrefillWay(
                is_local=True,
                reason=router_pb2.PREFILL_WAY_REASON_LESS_WAITING,
                local_ms=5.0,
                remote_ms=20.0,
                harm_ms=1.0,
                crossover_tokens=90.0,
            ),
        ),
    ],
    num_queued_requests=2,
    num_replacing_requests=1,
)


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Records `requests` and `deadlines_s`; sets `hangs` when a call comes to a HANG and `left` when it ends there.

    The first calls fail with `failures`, one each. Not ready until `health` is told so. `workers` may be an error,
    which ListWorkers raises.
    """

    def __init__(self, script=SCRIPT, *, failures=(), workers=WORKERS) -> None:
        self.script = script
        self.failures = list(failures)
        self.workers = workers
        self.requests: list[router_pb2.GenerateRequest] = []
        self.deadlines_s: list[float | None] = []
        self.explained: list[router_pb2.ExplainRequest] = []
        self.explanation = EXPLANATION
        self.hangs = asyncio.Event()
        self.left = asyncio.Event()
        self.health = Health()

    async def Generate(self, request, context):
        self.requests.append(request)
        self.deadlines_s.append(context.time_remaining())
        self._fail()
        for step in self.script:
            if step is HANG:
                self.hangs.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.left.set()
            if isinstance(step, Exception):
                raise step
            yield step

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def GetModel(self, request, context):
        self._fail()
        return router_pb2.GetModelResponse(
            model_id="tiny", context_length=2048, vocab_size=4096, has_tokenizer=True, model_fingerprints=["f"]
        )

    async def ListWorkers(self, request, context):
        if isinstance(self.workers, Exception):
            raise self.workers
        return self.workers

    async def Explain(self, request, context):
        self.explained.append(request)
        return self.explanation

    def add_to(self, server) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(self, server)
        self.health.add_to(server, ["pdserve.v1.RouterService"])


class FakeWorker(decode_pb2_grpc.DecodeServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """A decode worker. A drain shows the numbers `remaining`."""

    def __init__(self, *, stats=SEED_FIGURES, remaining=(3, 2, 1)) -> None:
        self.stats = stats
        self.remaining = remaining
        self.drain_deadlines_s: list[float | None] = []
        self.pipeline_requests: list[decode_pb2.SetPipelineRequest] = []

    async def GetPipelineStats(self, request, context):
        return self.stats

    async def SetPipeline(self, request, context):
        self.pipeline_requests.append(request)
        return decode_pb2.SetPipelineResponse(stats=self.stats)

    async def Drain(self, request, context):
        self.drain_deadlines_s.append(request.deadline_s if request.HasField("deadline_s") else None)
        for number in self.remaining:
            if number is HANG:
                await asyncio.Event().wait()
            yield worker_pb2.DrainResponse(num_remaining=number)
        yield worker_pb2.DrainResponse(done=True)

    def add_to(self, server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)


class TokenRouter(FakeRouter):
    """Puts out as many tokens as are asked for, `per_message` at once. Every `error_every`th request ends with `error`
    instead, and those after the first `hang_after` hang. Counts the requests that are open."""

    def __init__(
        self,
        *,
        per_message: int = 1,
        error: Exception | None = None,
        error_every: int = 0,
        hang_after: float = math.inf,
    ) -> None:
        super().__init__()
        self.hang_after = hang_after
        self.per_message = per_message
        self.error = error
        self.error_every = error_every
        self.num_open = 0
        self.most_open = 0

    async def Generate(self, request, context):
        self.requests.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if len(self.requests) > self.hang_after:
                self.hangs.set()
                await asyncio.Event().wait()
            if self.error is not None and len(self.requests) % self.error_every == 0:
                raise self.error
            left = request.stopping.max_tokens
            while left:
                number = min(left, self.per_message)
                left -= number
                yield chunk("", *range(number))
            usage = router_pb2.Usage(
                prompt_tokens=len(request.prompt_token_ids.ids) or 1, completion_tokens=request.stopping.max_tokens
            )
            yield completion(usage=usage)
        finally:
            self.num_open -= 1
