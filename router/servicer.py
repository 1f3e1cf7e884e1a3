"""RouterService: protobuf in, one session a request, protobuf out."""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Sequence

import grpc.aio

from common.config import RouterConfig
from common.errors import InvalidArgument
from common.identities import CALLER
from common.metrics import totals
from common.wire import pressure_to_proto
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from router.decode_stream import KvPath
from router.explanation import Candidate, Placing, explain
from router.generation import Generations
from router.local_prefill import Reason, Way
from router.output import FinishReason, Piece
from router.parts import Parts
from router.placement import Demand, Refusal
from router.request import Arrival
from router.session import Completed
from router.workers import Role, Worker, WorkerState

_REASONS = {FinishReason.STOP: types_pb2.FINISH_REASON_STOP, FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH}
_KV_PATHS = {
    KvPath.REMOTE: types_pb2.KV_PATH_REMOTE,
    KvPath.LOCAL: types_pb2.KV_PATH_LOCAL,
    KvPath.RECOMPUTED: types_pb2.KV_PATH_RECOMPUTED,
    KvPath.CACHED: types_pb2.KV_PATH_CACHED,
}
_REFUSALS = {one: router_pb2.Refusal.Value(f"REFUSAL_{one.name}") for one in Refusal}
_WAY_REASONS = {one: router_pb2.PrefillWayReason.Value(f"PREFILL_WAY_REASON_{one.name}") for one in Reason}
_ROLES = {Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}
_STATES = {
    WorkerState.SERVING: types_pb2.WORKER_STATE_SERVING,
    WorkerState.DRAINING: types_pb2.WORKER_STATE_DRAINING,
    WorkerState.UNREACHABLE: types_pb2.WORKER_STATE_UNREACHABLE,
}


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """One handler a request; its end, for whatever reason, ends the work on every worker."""

    def __init__(self, config: RouterConfig, parts: Parts, generations: Generations) -> None:
        self._config = config
        self._parts = parts
        self._fleet = parts.fleet
        self._boot_id = uuid.uuid4().hex
        self._generations = generations

    async def Generate(self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._generations.admitted(request, self._arrival(context)) as generation:
            request_id: str | None = generation.request.request_id

            async def write(response: router_pb2.GenerateResponse) -> None:
                nonlocal request_id
                if request_id is not None:
                    response.request_id, request_id = request_id, None
                await context.write(response)

            completed = await generation.run(lambda piece: write(_chunk(piece)))
            await write(router_pb2.GenerateResponse(completion=_completion(completed)))

    async def GetModel(
        self, request: router_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.GetModelResponse:
        model = self._generations.model
        return router_pb2.GetModelResponse(
            model_id=self._config.model_id,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            has_tokenizer=self._parts.tokenizer is not None,
            protocol_version=model.protocol_version,
            model_fingerprints=model.fingerprints,
        )

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ListWorkersResponse:
        workers = [
            worker
            for role in (self._fleet.prefill, self._fleet.decode)
            for worker in sorted(role, key=lambda worker: worker.address)
        ]
        now_s = self._parts.clock()
        return router_pb2.ListWorkersResponse(
            workers=[_worker(worker, now_s) for worker in workers], degraded=self._fleet.is_degraded, load=self._load()
        )

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ExplainResponse:
        match request.WhichOneof("subject"):
            case "request_id":
                placings = self._parts.placings.of(request.request_id)
            case "prompt":
                placings = await self._explain(request.prompt, self._arrival(context))
            case _:
                raise InvalidArgument("one of prompt and request_id must be set", field="subject")
        now_s = self._parts.clock()
        return router_pb2.ExplainResponse(
            placings=[_placing(placing, now_s) for placing in placings],
            num_queued_requests=len(self._parts.dispatcher.queue),
            num_replacing_requests=self._parts.dispatcher.num_replacing,
        )

    async def _explain(self, message: router_pb2.GenerateRequest, arrival: Arrival) -> Sequence[Placing]:
        parts = self._parts
        generations = self._generations
        request_id = generations.intake.check(message)
        request = await generations.intake.admit(message, generations.model, request_id, arrival)
        demand = Demand(request.prompt_token_ids, cache_salt=request.cache_salt)
        reads_cache = request.num_prompt_logprobs is None
        return list(explain(demand, self._fleet, parts.local_prefill, parts.placings, reads_cache=reads_cache))

    def _arrival(self, context: grpc.aio.ServicerContext) -> Arrival:
        return self._generations.arrival(
            client_of(context.peer()),
            CALLER.get(),
            timeout_s=context.time_remaining(),
            metadata=context.invocation_metadata() or (),
        )

    def _load(self) -> router_pb2.RouterLoad:
        dispatcher, metrics = self._parts.dispatcher, self._parts.metrics
        ended = {code: number for (code,), number in totals(metrics.requests).items()}
        return router_pb2.RouterLoad(
            instance_id=self._config.instance_id,
            boot_id=self._boot_id,
            num_running_requests=self._generations.num_in_flight - len(dispatcher.queue),
            num_queued_requests=len(dispatcher.queue),
            num_queued_clients=dispatcher.queue.num_clients,
            num_queued_tokens=dispatcher.queue.num_tokens,
            num_held_requests=dispatcher.num_held,
            ended_requests=ended,
            num_turned_away_requests=sum(totals(metrics.turned_away).values()),
        )


def client_of(peer: str) -> str:
    """The host of a gRPC peer: 10.0.0.7 of ipv4:10.0.0.7:40112, ::1 of ipv6:%5B::1%5D:40112."""
    scheme, _, address = urllib.parse.unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if scheme in ("ipv4", "ipv6") else address


def _chunk(piece: Piece) -> router_pb2.GenerateResponse:
    # Filling a message in place takes a third of the time of constructing it; there is one for each few tokens.
    response = router_pb2.GenerateResponse()
    chunk = response.chunk
    chunk.token_ids.extend(piece.token_ids)
    chunk.text = piece.text
    if piece.logprobs:
        chunk.logprobs.extend(piece.logprobs)
    if piece.prompt_logprobs:
        chunk.prompt_logprobs.extend(piece.prompt_logprobs)
    return response


def _completion(completed: Completed) -> router_pb2.Completion:
    ending, path = completed.ending, completed.path
    return router_pb2.Completion(
        finish_reason=_REASONS[ending.reason],
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
        usage=router_pb2.Usage(**completed.usage._asdict()),
        path=types_pb2.ServingPath(**{**path._asdict(), "kv_path": _KV_PATHS[path.kv_path]}),
    )


def _worker(worker: Worker, now_s: float) -> router_pb2.Worker:
    identity, load = worker.identity, worker.load
    return router_pb2.Worker(
        role=_ROLES[worker.role],
        address=worker.address,
        instance_id=identity.instance_id if identity else "",
        boot_id=identity.boot_id if identity else "",
        state=_STATES[worker.state],
        num_free_blocks=load.num_free_blocks,
        num_total_blocks=identity.num_total_blocks if identity else 0,
        num_cached_blocks=load.num_cached_blocks,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_pairs=worker.num_pairs,
        model_fingerprint=identity.model_fingerprint if identity else "",
        pressure=pressure_to_proto(load.pressure),
        num_reserved=load.num_reserved,
        num_waiting_tokens=load.num_waiting_tokens,
        step_ms=load.step_ms,
        num_output_tokens=worker.num_output_tokens,
        num_prompt_tokens=worker.num_prompt_tokens,
        told_s=0.0 if worker.heard_s is None else now_s - worker.heard_s,
    )


def _placing(placing: Placing, now_s: float) -> router_pb2.Placing:
    return router_pb2.Placing(
        role=_ROLES[placing.role],
        chosen=placing.chosen,
        age_s=now_s - placing.made_s,
        num_tokens=placing.num_tokens,
        candidates=map(_candidate, placing.candidates),
        num_more_candidates=placing.num_more_candidates,
        way=None if placing.way is None else _way(placing.way),
    )


def _candidate(candidate: Candidate) -> router_pb2.Candidate:
    refusal = candidate.refusal and _REFUSALS[candidate.refusal]
    return router_pb2.Candidate(**{**candidate._asdict(), "refusal": refusal})


def _way(way: Way) -> router_pb2.PrefillWay:
    return router_pb2.PrefillWay(**{**way._asdict(), "reason": _WAY_REASONS[way.reason]})
