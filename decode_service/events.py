"""What an engine tells of a sequence, from its reservation to its end. Plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.errors import PdserveError
from common.params import TokenLogprob
from common.sequence import Sequence
from decode_service.reservations import Verdict


class Reserved(NamedTuple):
    reservation: int
    attempt: int
    num_cached_tokens: int
    queue_ms: float


class Lost(NamedTuple):
    """The attempt is over; `preempted` or else its pair broke."""

    attempt: int
    preempted: bool
    detail: str


class Token(NamedTuple):
    """A token and what is told with it. Most come as their id alone: one is made for every row of every step.

    `at_s`: when it was known, of the first token of an attempt and of the first that was decoded; 0 of all others.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    at_s: float = 0.0


class Completed(NamedTuple):
    """The last event. `stop_token_id` is set when a stop token ended it, `by_length` when a limit did."""

    by_length: bool
    stop_token_id: int | None
    num_output_tokens: int
    kv_path: Verdict
    kv_bytes: int
    kv_transport: str
    first_decode_ms: float
    num_cached_tokens: int
    local_prefill_ms: float


Event = Reserved | Lost | int | Token | Completed | PdserveError
# Called from the engine thread, at most once a turn, with what is due; the events of a sequence in order.
OnEvents = Callable[[dict[Sequence, list[Event]]], None]
