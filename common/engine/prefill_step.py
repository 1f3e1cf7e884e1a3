"""A step over prompt chunks that has been enqueued, and the first tokens that it brings."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.engine.logprobs import unpack_logprobs
from common.engine.sampler import NonFiniteLogits, SampledBatch
from common.engine.streams import mark
from common.errors import Internal
from common.params import TokenLogprob
from common.sequence import Sequence


class FirstToken(NamedTuple):
    """What a finished prompt yields."""

    token_id: int
    logprob: TokenLogprob | None
    # One for each prompt token but the first, when asked for.
    prompt_logprobs: tuple[TokenLogprob, ...]


class Finished(NamedTuple):
    """A sequence whose last chunk is in the step, and its packed prompt log-probabilities on their way to the host."""

    sequence: Sequence
    prompt_logprobs: Seq[Tensor] = ()


class Drawn(Protocol):
    def read(self) -> SampledBatch:
        """One token for each row. Raises NonFiniteLogits."""


class PrefillStep:
    """Stands for all that was enqueued before it was made."""

    def __init__(self, finished: Seq[Finished], drawn: Drawn | None, device: torch.device) -> None:
        """`drawn` has a row for each finished sequence; None if there are none."""
        self._finished = finished
        self._drawn = drawn
        self._done = mark(device)

    def wait(self) -> None:
        """Blocks until the step is over and its tokens are on the host; any thread may."""
        if self._done is not None:
            self._done.synchronize()

    def read(self) -> dict[Sequence, FirstToken | Internal]:
        """Of the finished sequences; an error where a sequence's logits cannot be used. Waits if there are any."""
        if self._drawn is None:
            return {}
        self.wait()
        faulty: tuple[int, ...] = ()
        try:
            sampled = self._drawn.read()
        except NonFiniteLogits as error:
            sampled, faulty = error.sampled, error.rows
        first_tokens: dict[Sequence, FirstToken | Internal] = {
            one.sequence: FirstToken(token_id, logprob, _unpack(one))
            for one, token_id, logprob in zip(self._finished, sampled.token_ids, sampled.logprobs, strict=True)
        }
        for row in faulty:
            reason = "NON_FINITE_LOGITS"
            error_ = Internal("the model's logits hold NaN or infinity", reason=reason)
            first_tokens[self._finished[row].sequence] = error_
        return first_tokens


def _unpack(finished: Finished) -> tuple[TokenLogprob, ...]:
    num = finished.sequence.request.num_prompt_logprobs or 0
    return tuple(unpack_logprobs(row, num) for packed in finished.prompt_logprobs for row in packed.tolist())
