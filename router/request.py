"""A validated request: what the rest of the router works with. Knows no protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.params import SamplingParams, StoppingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to make. Everything is within its limits, and nothing is unset that a worker needs."""

    request_id: str
    # Who asks: the peer's host.
    client: str
    prompt_token_ids: Sequence[int]
    # With a seed, drawn here when the user gave none.
    sampling: SamplingParams
    # max_tokens is bounded by the context.
    stopping: StoppingParams
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0
    # On the router's monotonic clock.
    deadline_s: float
    received_s: float

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Most tokens that this request can come to, prompt and output together."""
        return len(self.prompt_token_ids) + self.stopping.max_tokens
