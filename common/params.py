"""What a request asks of its tokens: how they are drawn, when they end, and the log-probabilities that come back.

Values alone, without torch and without protobuf. The meaning of each field is written in `pdserve/v1/types.proto`;
defaults and limits are the same here and there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from common.errors import InvalidArgument

MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_REQUEST_ID_BYTES = 128
MAX_CACHE_SALT_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn: penalties and bias, temperature, top_k, top_p, min_p, in this order."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """The most probable token is taken; no noise is drawn."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """The draw depends on which tokens prompt and output hold already."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidArgument, naming field and limit, for what can never be drawn from `vocab_size` tokens."""
        _require(0 <= self.temperature < math.inf, "sampling.temperature", self.temperature, "finite and >= 0")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "sampling.top_k", self.top_k, ">= 0 (0 keeps every token)")
        _require(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "in [0, 1]")
        _require(0 <= self.seed < 2**64, "sampling.seed", self.seed, "in [0, 2**64)")
        repetition = self.repetition_penalty
        _require(0 < repetition < math.inf, "sampling.repetition_penalty", repetition, "finite and > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(abs(value) <= MAX_PENALTY, f"sampling.{name}", value, "in [-2, 2]")
        bias = "sampling.logit_bias"
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS_ENTRIES,
            bias,
            f"{len(self.logit_bias):,} entries",
            f"at most {MAX_LOGIT_BIAS_ENTRIES:,} entries",
        )
        for token_id, value in self.logit_bias.items():
            _require_token(bias, token_id, vocab_size)
            _require(abs(value) <= MAX_LOGIT_BIAS, bias, f"{value} for token {token_id}", "finite and in [-100, 100]")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingParams:
    """When a completion ends."""

    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_in_output: bool = False

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidArgument, naming field and limit, for what can never be met with `vocab_size` tokens."""
        _require(self.max_tokens >= 1, "stopping.max_tokens", self.max_tokens, "at least 1")
        within = f"in [0, max_tokens = {self.max_tokens}]"
        _require(0 <= self.min_tokens <= self.max_tokens, "stopping.min_tokens", self.min_tokens, within)
        strings = f"{len(self.stop)} strings"
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stopping.stop", strings, f"at most {MAX_STOP_STRINGS} strings")
        _require(all(self.stop), "stopping.stop", "an empty string", "free of empty strings")
        ids = f"{len(self.stop_token_ids)} ids"
        limit = f"at most {MAX_STOP_TOKEN_IDS} ids"
        _require(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stopping.stop_token_ids", ids, limit)
        for token_id in self.stop_token_ids:
            _require_token("stopping.stop_token_ids", token_id, vocab_size)


class TopLogprob(NamedTuple):
    """One of the most probable tokens at a position."""

    token_id: int
    logprob: float


class TokenLogprob(NamedTuple):
    """The natural log-probability of one token under the raw logits; rank 1 is the most probable token."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...]


def _require(holds: bool, field: str, value: object, limit: str) -> None:
    """NaN fails every comparison, so conditions are written as what must hold."""
    if not holds:
        raise InvalidArgument(f"{field} must be {limit}, got {value}", field=field)


def _require_token(field: str, token_id: int, vocab_size: int) -> None:
    limit = f"token ids below the vocabulary size {vocab_size}"
    _require(0 <= token_id < vocab_size, field, token_id, limit)


def is_special(params: SamplingParams, min_tokens: int, num_logprobs: int | None) -> bool:
    """More is asked than temperature and truncation: edited logits, or log-probabilities."""
    return bool(params.has_penalties or params.logit_bias or min_tokens) or num_logprobs is not None
