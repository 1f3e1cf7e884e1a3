"""Tokens that the fused kernel has been asked for, on their way to the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.engine.sampler import NonFiniteLogits, SampledBatch
from common.engine.streams import mark
from common.model.transfer import to_host
from common.params import TokenLogprob

if TYPE_CHECKING:
    from common.engine.special_rows import PackedLogprobs


class DrawnTokens:
    """One token for each row. Making it enqueues the copies to the host."""

    def __init__(self, drawn: Tensor, num_rows: int, logprobs: PackedLogprobs | None = None) -> None:
        """`drawn` is int32: token ids in its first half, float32 scores in its second, of `num_rows` rows or more."""
        self._num_rows = num_rows
        self._logprobs = logprobs
        self._host = to_host(drawn)
        self._host_logprobs = None if logprobs is None else to_host(logprobs.values)
        self._done = mark(drawn.device)

    def wait(self) -> None:
        """Blocks until the tokens are on the host; any thread may."""
        if self._done is not None:
            self._done.synchronize()

    def read(self) -> SampledBatch:
        """The tokens, row by row. Raises NonFiniteLogits."""
        self.wait()
        token_ids_S, scores_S = (half[: self._num_rows] for half in self._host.chunk(2))
        logprobs: list[TokenLogprob | None] = [None] * self._num_rows
        if self._logprobs is not None:
            assert self._host_logprobs is not None
            for row, logprob in self._logprobs.unpack(self._host_logprobs.tolist()).items():
                logprobs[row] = logprob
        sampled = SampledBatch(token_ids_S.tolist(), logprobs)
        scores = scores_S.view(torch.float32).tolist()
        # float32 values are too small for their sum to overflow.
        if not math.isfinite(sum(scores)):
            faulty = tuple(row for row, score in enumerate(scores) if not math.isfinite(score))
            raise NonFiniteLogits(faulty, sampled)
        return sampled
