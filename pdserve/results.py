"""What the services answer, as values. Enumerations are their names without the prefix: "STOP", "REMOTE", "DECODE".

Fields mean what the messages of the same names in `protos/pdserve/v1/` say.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import wire
from common.params import TokenLogprob
from pdserve.v1 import decode_pb2, router_pb2, types_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some more output. The texts of all chunks, joined, are the completion."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one completion."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ServingPath:
    """Which way a request went. Times in milliseconds."""

    prefill_worker: str
    decode_worker: str
    kv_path: str
    kv_bytes: int
    kv_transport: str
    queue_ms: float
    prefill_ms: float
    kv_transfer_ms: float
    first_decode_ms: float
    num_resumptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of the output. At most one of `stop_string` and `stop_token_id` is set, when the reason is "STOP"."""

    request_id: str
    finish_reason: str
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    path: ServingPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole completion; `reply["text"]` is `reply.text`.

    `logprobs` has one entry for each of `token_ids` when `num_logprobs` was asked for, `prompt_logprobs` one for each
    token of the prompt but the first when `num_prompt_logprobs` was.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    path: ServingPath
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], end: Completion) -> Reply:
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks)),
            logprobs=tuple(itertools.chain.from_iterable(chunk.logprobs for chunk in chunks)),
            prompt_logprobs=tuple(itertools.chain.from_iterable(chunk.prompt_logprobs for chunk in chunks)),
            **{field.name: getattr(end, field.name) for field in dataclasses.fields(end)},
        )

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a router serves."""

    model_id: str
    context_length: int
    vocab_size: int
    has_tokenizer: bool
    protocol_version: int
    model_fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as a router sees it."""

    role: str
    address: str
    instance_id: str
    boot_id: str
    state: str
    num_free_blocks: int
    num_total_blocks: int
    num_cached_blocks: int
    num_running: int
    num_waiting: int
    num_pairs: int
    model_fingerprint: str
    pressure: tuple[str, ...]
    num_reserved: int
    num_waiting_tokens: int
    step_ms: float
    num_output_tokens: int
    num_prompt_tokens: int
    told_s: float


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """What a router has to do, and what has ended there since it started; router.proto explains the fields."""

    instance_id: str
    boot_id: str
    num_running_requests: int
    num_queued_requests: int
    num_queued_clients: int
    num_queued_tokens: int
    num_held_requests: int
    ended_requests: Mapping[str, int]
    num_turned_away_requests: int


@dataclass(frozen=True, slots=True)
class Workers:
    """Every worker that a router knows; `degraded`: no prefill worker is alive, so decode workers prefill locally."""

    workers: tuple[Worker, ...]
    degraded: bool
    load: RouterLoad


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that was considered; router.proto explains the fields. `refusal` is empty if it would do."""

    address: str
    instance_id: str
    refusal: str
    detail: str
    cost: float
    pace_ms: float
    num_free_blocks: int
    num_sequences: int
    num_waiting_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillWay:
    """Where a prompt is computed, and why; times are None while too little is measured."""

    is_local: bool
    reason: str
    local_ms: float | None
    remote_ms: float | None
    harm_ms: float | None
    crossover_tokens: float | None


@dataclass(frozen=True, slots=True)
class Placing:
    """One choice of a worker. `chosen` is empty when none would do, and when decode computes the prompt itself."""

    role: str
    chosen: str
    age_s: float
    num_tokens: int
    candidates: tuple[Candidate, ...]
    num_more_candidates: int
    way: PrefillWay | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a request was placed, or would be; oldest choice first."""

    placings: tuple[Placing, ...]
    num_queued_requests: int
    # They have lost their decode worker and wait for one to go on at.
    num_replacing_requests: int = 0


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """The attention/FFN pipeline of a decode worker; decode.proto explains the fields."""

    mode: str
    active: bool
    fallback_reason: str
    total_tokens: int
    attention_ms: float
    ffn_ms: float
    total_ms: float
    attention_sm_asked: int
    attention_sm: int
    ffn_sm_asked: int
    ffn_sm: int
    num_steps: int
    num_profiled_steps: int
    cut: str
    attention_stage_p50_ms: float
    attention_stage_p99_ms: float
    ffn_stage_p50_ms: float
    ffn_stage_p99_ms: float
    attention_occupancy: float
    ffn_occupancy: float
    bubble_share: float
    attention_queue_depth: float
    ffn_queue_depth: float
    handoff_bytes: int
    fallback_detail: str
    num_pipelined_steps: int
    num_rebalances: int
    num_switches: int
    gain: float


def event_from_proto(message: router_pb2.GenerateResponse, request_id: str) -> Chunk | Completion | None:
    """None for an event that this version does not know."""
    match message.WhichOneof("event"):
        case "chunk":
            chunk = message.chunk
            return Chunk(
                request_id=request_id,
                token_ids=tuple(chunk.token_ids),
                text=chunk.text,
                logprobs=tuple(wire.logprob_from_proto(one) for one in chunk.logprobs),
                prompt_logprobs=tuple(wire.logprob_from_proto(one) for one in chunk.prompt_logprobs),
            )
        case "completion":
            end = message.completion
            return Completion(
                request_id=request_id,
                finish_reason=_name(types_pb2.FinishReason, end.finish_reason, "FINISH_REASON_"),
                stop_string=end.stop_string if end.HasField("stop_string") else None,
                stop_token_id=end.stop_token_id if end.HasField("stop_token_id") else None,
                usage=Usage(**_fields(Usage, end.usage)),
                path=_path_from_proto(end.path),
            )
    return None


def model_from_proto(message: router_pb2.GetModelResponse) -> Model:
    return Model(**_fields(Model, message) | {"model_fingerprints": tuple(message.model_fingerprints)})


def workers_from_proto(message: router_pb2.ListWorkersResponse) -> Workers:
    load = RouterLoad(**_fields(RouterLoad, message.load) | {"ended_requests": dict(message.load.ended_requests)})
    return Workers(tuple(_worker_from_proto(one) for one in message.workers), message.degraded, load)


def explanation_from_proto(message: router_pb2.ExplainResponse) -> Explanation:
    return Explanation(
        tuple(map(_placing_from_proto, message.placings)),
        message.num_queued_requests,
        message.num_replacing_requests,
    )


def pipeline_stats_from_proto(message: decode_pb2.GetPipelineStatsResponse) -> PipelineStats:
    mode = _name(decode_pb2.PipelineMode, message.mode, "PIPELINE_MODE_")
    return PipelineStats(**_fields(PipelineStats, message) | {"mode": mode})


def _path_from_proto(message: types_pb2.ServingPath) -> ServingPath:
    return ServingPath(
        **_fields(ServingPath, message) | {"kv_path": _name(types_pb2.KvPath, message.kv_path, "KV_PATH_")}
    )


def _worker_from_proto(message: router_pb2.Worker) -> Worker:
    role = _name(types_pb2.Role, message.role, "ROLE_")
    state = _name(types_pb2.WorkerState, message.state, "WORKER_STATE_")
    pressure = tuple(_name(types_pb2.PressureReason, one, "PRESSURE_REASON_") for one in message.pressure)
    return Worker(**_fields(Worker, message) | {"role": role, "state": state, "pressure": pressure})


def _placing_from_proto(message: router_pb2.Placing) -> Placing:
    return Placing(
        **_fields(Placing, message)
        | {
            "role": _name(types_pb2.Role, message.role, "ROLE_"),
            "candidates": tuple(map(_candidate_from_proto, message.candidates)),
            "way": _way_from_proto(message.way) if message.HasField("way") else None,
        }
    )


def _candidate_from_proto(message: router_pb2.Candidate) -> Candidate:
    refusal = _name(router_pb2.Refusal, message.refusal, "REFUSAL_") if message.refusal else ""
    return Candidate(**_fields(Candidate, message) | {"refusal": refusal})


def _way_from_proto(message: router_pb2.PrefillWay) -> PrefillWay:
    measured = ("local_ms", "remote_ms", "harm_ms", "crossover_tokens")
    unset = {name: None for name in measured if not message.HasField(name)}
    reason = _name(router_pb2.PrefillWayReason, message.reason, "PREFILL_WAY_REASON_")
    return PrefillWay(**_fields(PrefillWay, message) | {"reason": reason} | unset)


def _fields(cls: type, message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(cls)}


def _name(enum: Any, value: int, prefix: str) -> str:
    """The number itself when a newer service sends a value that this version does not know."""
    known = enum.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix(prefix) if known else str(value)
