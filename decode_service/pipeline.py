"""Runs one decode step of a batch: the attention and FFN stages of every layer, in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.engine.kv_cache import KvCache
from common.errors import FailedPrecondition
from common.model.batch import ForwardBatch
from common.model.qwen3 import Activations, Qwen3ForCausalLM
from decode_service.decisions import Mode
from decode_service.graphs import StepGraphs

# Takes a step's logits: draws the tokens, where that belongs to the step.
Finish = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """What `GetPipelineStats` shows. Times are means; stage times cover profiled steps alone."""

    mode: Mode
    active: bool
    fallback_reason: str
    total_tokens: int
    attention_ms: float
    ffn_ms: float
    total_ms: float
    attention_sm_asked: int
    ffn_sm_asked: int
    attention_sm: int
    ffn_sm: int
    num_steps: int
    num_profiled_steps: int


class PipelineScheduler:
    """The one entry to a decode step.

    Attention and FFN run one after the other on the whole device; `PipelineStats.fallback_reason` names why.
    """

    def __init__(
        self, model: Qwen3ForCausalLM, cache: KvCache, *, mode: Mode, attention_sm: int, ffn_sm: int, profiling: bool
    ) -> None:
        self._model = model
        self._cache = cache
        self._mode = mode
        self._attention_sm = attention_sm
        self._ffn_sm = ffn_sm
        self.profiling = profiling
        self._total_tokens = 0
        self._num_steps = 0
        self._total_s = 0.0
        self._num_profiled = 0
        self._attention_s = 0.0
        self._ffn_s = 0.0
        self._graphs: StepGraphs | None = None

    def decode_token(self, batch: ForwardBatch, finish: Finish | None = None) -> torch.Tensor:
        """Logits (fp32, [sequences, vocab]) of the next token of every sequence in the batch, and `finish` on them.

        Replays the graph that `capture` made for a batch of this size, if there is one. On a GPU this enqueues.
        """
        if self._graphs is not None and not self.profiling:
            logits_SV = self._graphs.replay(batch.num_seqs)
            if logits_SV is not None:
                return logits_SV
        logits_SV = self._profiled_step(batch) if self.profiling else self._model.forward(batch, self._cache)
        if finish is not None:
            finish(logits_SV)
        return logits_SV

    def capture(self, new_batch: Callable[[], ForwardBatch], finish: Finish) -> None:
        """Captures a step as a CUDA graph. `new_batch` gives a batch over the tensors that the graph will read."""

        def step() -> torch.Tensor:
            batch = new_batch()
            logits_SV = self._model.forward(batch, self._cache)
            finish(logits_SV)
            return logits_SV

        self._graphs = self._graphs or StepGraphs()
        self._graphs.capture(new_batch().num_seqs, step)

    @property
    def num_graphs(self) -> int:
        return 0 if self._graphs is None else len(self._graphs)

    def record_step(self, seconds: float, num_tokens: int) -> None:
        """A step has ended."""
        self._total_s += seconds
        self._num_steps += 1
        self._total_tokens += num_tokens

    def configure(
        self, *, mode: Mode | None, attention_sm: int | None, ffn_sm: int | None, profiling: bool | None
    ) -> None:
        """Changes what is given, between two steps; None leaves as it is.

        Raises:
            FailedPrecondition: the device cannot be partitioned, so `static` cannot be run.
        """
        if mode is Mode.STATIC:
            raise FailedPrecondition(
                f"mode static needs SM partitions, which this device does not have ({self._reason}); "
                "use auto or disabled",
                field="mode",
                reason=self._reason,
            )
        self._mode = mode or self._mode
        self._attention_sm = self._attention_sm if attention_sm is None else attention_sm
        self._ffn_sm = self._ffn_sm if ffn_sm is None else ffn_sm
        self.profiling = self.profiling if profiling is None else profiling

    def stats(self) -> PipelineStats:
        steps, profiled = max(self._num_steps, 1), max(self._num_profiled, 1)
        return PipelineStats(
            mode=self._mode,
            active=False,
            fallback_reason="DISABLED" if self._mode is Mode.DISABLED else self._reason,
            total_tokens=self._total_tokens,
            attention_ms=self._attention_s / profiled * 1e3,
            ffn_ms=self._ffn_s / profiled * 1e3,
            total_ms=self._total_s / steps * 1e3,
            attention_sm_asked=self._attention_sm,
            ffn_sm_asked=self._ffn_sm,
            attention_sm=0,
            ffn_sm=0,
            num_steps=self._num_steps,
            num_profiled_steps=self._num_profiled,
        )

    @property
    def _reason(self) -> str:
        has_plain_kernels = self._cache.device.type == "cuda" and not self._model.operations.replayable
        return "PLAIN_KERNELS" if has_plain_kernels else "NO_SM_PARTITIONS"

    def _profiled_step(self, batch: ForwardBatch) -> torch.Tensor:
        state: Activations | torch.Tensor = batch.token_ids_T
        for layer in range(self._model.config.num_layers):
            started = self._now()
            attended = self._model.forward_attention_stage(layer, state, batch, self._cache)
            middle = self._now()
            state = self._model.forward_ffn_stage(layer, attended, batch)
            self._attention_s += middle - started
            self._ffn_s += self._now() - middle
        self._num_profiled += 1
        assert isinstance(state, torch.Tensor), "the last FFN stage gives logits"
        return state

    def _now(self) -> float:
        """Once the device has done what it was asked for so far."""
        if self._cache.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()
