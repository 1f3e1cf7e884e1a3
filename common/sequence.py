"""A request's state inside one worker. Knows token and block ids, never tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from common.params import SamplingParams, StoppingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a worker was asked to work on.

    `token_ids` is the prompt and, on a resumption, the output so far; the first `num_prompt_tokens` are the user's.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    stopping: StoppingParams
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0
    # On the worker's monotonic clock; infinite when nobody set one.
    deadline_s: float = float("inf")


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, blocks and progress of one request.

    `num_computed` positions have their KV in the cache. In decode that is every token but the last one.
    """

    request: Request
    stop_token_ids: frozenset[int]
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    # Hashes of whole blocks; grows with the tokens.
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def output_ids(self) -> Seq[int]:
        return self.token_ids[self.request.num_prompt_tokens :]

    @property
    def prompt_ids(self) -> Seq[int]:
        return self.token_ids[: self.request.num_prompt_tokens]

    @property
    def prefilled(self) -> bool:
        """All tokens have their KV: the next token can be drawn from the last one's logits."""
        return self.num_computed == len(self.token_ids)
