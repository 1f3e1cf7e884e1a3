"""What `LLM` is asked of one prompt: how tokens are drawn, when they end, and what comes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pdserve.request import Options


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Fields, ranges and defaults as in `protos/pdserve/v1/types.proto` and `router.proto`; None is the default there:
    temperature 1, 256 tokens, an end at the model's end tokens. Without a `seed` each prompt draws its own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    include_stop_in_output: bool | None = None

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None

    def options(self) -> Options:
        """As keywords of a client's calls."""
        return cast(Options, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
