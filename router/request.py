"""A validated request: what the rest of the router works with. Knows no protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.identities import Caller
from common.params import SamplingParams, StoppingParams
from common.tracing import Metadata


class Arrival(NamedTuple):
    """Who asks, and when; times on the router's monotonic clock."""

    # Its name where callers are told apart, else the peer's host.
    client: str
    received_s: float
    deadline_s: float
    # None: callers are not told apart.
    caller: Caller | None = None
    # `TRACE_FIELDS` of what was sent along.
    trace: Metadata = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to make. Everything is within its limits, and nothing is unset that a worker needs."""

    request_id: str
    prompt_token_ids: Sequence[int]
    # With a seed, drawn here when the user gave none.
    sampling: SamplingParams
    # max_tokens is bounded by the context.
    stopping: StoppingParams
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0
    arrival: Arrival

    @property
    def deadline_s(self) -> float:
        return self.arrival.deadline_s

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)
