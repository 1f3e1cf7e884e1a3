"""Conversions between protobuf messages and the values that the rest of the code works with.

Protobuf stops here: only servicers, clients and the two ends of a pair see messages. Fields left unset take the
defaults of the dataclasses in `common.params`; nothing is validated here.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.load import PressureReason
from common.params import SamplingParams, StoppingParams, TokenLogprob, TopLogprob
from pdserve.v1 import types_pb2

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_STOPPING_FIELDS = ("max_tokens", "min_tokens", "ignore_eos", "include_stop_in_output")
_PRESSURE_NUMBERS = {one: types_pb2.PressureReason.Value(f"PRESSURE_REASON_{one.name}") for one in PressureReason}
_PRESSURE_REASONS = {number: reason for reason, number in _PRESSURE_NUMBERS.items()}


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    given = {name: getattr(message, name) for name in _SAMPLING_FIELDS if message.HasField(name)}
    return SamplingParams(**given, logit_bias=dict(message.logit_bias))


def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    given = {name: getattr(params, name) for name in _SAMPLING_FIELDS}
    return types_pb2.SamplingParams(**given, logit_bias=dict(params.logit_bias))


def stopping_from_proto(message: types_pb2.StoppingParams) -> StoppingParams:
    given = {name: getattr(message, name) for name in _STOPPING_FIELDS if message.HasField(name)}
    return StoppingParams(**given, stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids))


def stopping_to_proto(params: StoppingParams) -> types_pb2.StoppingParams:
    given = {name: getattr(params, name) for name in _STOPPING_FIELDS}
    return types_pb2.StoppingParams(**given, stop=params.stop, stop_token_ids=params.stop_token_ids)


def logprob_from_proto(message: types_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple(TopLogprob(entry.token_id, entry.logprob) for entry in message.top)
    return TokenLogprob(message.token_id, message.logprob, message.rank, top)


def logprob_to_proto(value: TokenLogprob) -> types_pb2.TokenLogprob:
    top = [types_pb2.TopLogprob(token_id=entry.token_id, logprob=entry.logprob) for entry in value.top]
    return types_pb2.TokenLogprob(token_id=value.token_id, logprob=value.logprob, rank=value.rank, top=top)


def logprobs_to_proto(values: Iterable[TokenLogprob]) -> list[types_pb2.TokenLogprob]:
    return [logprob_to_proto(value) for value in values]


def pressure_from_proto(numbers: Iterable[int]) -> tuple[PressureReason, ...]:
    """A reason that this version does not know is pressure all the same."""
    return tuple(_PRESSURE_REASONS.get(number, PressureReason.UNSPECIFIED) for number in numbers)


def pressure_to_proto(reasons: Iterable[PressureReason]) -> list[types_pb2.PressureReason]:
    return [_PRESSURE_NUMBERS[reason] for reason in reasons]
