"""Runs one decode step of a batch: the attention and FFN stages of every layer, in order."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from common.engine.kv_cache import KvCache
from common.errors import FailedPrecondition
from common.model.batch import ForwardBatch
from common.model.qwen3 import Qwen3ForCausalLM
from decode_service.decisions import Mode
from decode_service.graphs import StepGraphs
from decode_service.pipeline_order import Cut, Lane, Order, order
from decode_service.pipeline_statistics import PipelineStatistics
from decode_service.pipelined_step import Finish, run_pipelined
from decode_service.stage_clock import StageClock, stage_clock

# With profiling, the stages of one step in so many are timed.
PROFILE_EVERY = 32


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """What `GetPipelineStats` shows, where its fields are explained."""

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
    cut: str
    attention_stage_p50_ms: float
    attention_stage_p99_ms: float
    ffn_stage_p50_ms: float
    ffn_stage_p99_ms: float
    attention_occupancy: float
    ffn_occupancy: float
    bubble_share: float
    attention_queue_depth: float
    ffn_queue_depth: float
    handoff_bytes: int


class _Variant(NamedTuple):
    """One way to compute a step of so many rows; each has a graph of its own."""

    num_rows: int
    profiled: bool


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
        self._profiling = profiling
        self._sequential = order(Cut.LAYER, model.config.num_layers, 1)
        self._statistics = PipelineStatistics()
        self._graphs: StepGraphs[_Variant] | None = None
        self._clocks: dict[_Variant, StageClock] = {}
        # Steps until the next profile.
        self._until_profile = 1
        # Launched and not recorded yet, oldest first: what times their stages.
        self._launched: deque[StageClock | None] = deque()

    def decode_token(self, batch: ForwardBatch, finish: Finish | None = None) -> tuple[Tensor, ...]:
        """Logits (fp32, [sequences, vocab]) of the next token of every sequence, as parts of consecutive rows.

        `finish` is called on each part, with its first row. Replays the graph that `capture` made for a batch of this
        size, if there is one. On a GPU this enqueues.
        """
        variant = _Variant(batch.num_seqs, self._takes_profile())
        self._launched.append(self._clock(variant))
        if self._graphs is not None:
            if variant not in self._graphs and variant._replace(profiled=False) in self._graphs:
                # The same kernels as without a profile, so that nothing has to be run before it can be captured.
                self._graphs.capture(variant, lambda: self._step(variant, batch, finish), warm_up=False)
            logits = self._graphs.replay(variant)
            if logits is not None:
                return logits
        return self._step(variant, batch, finish)

    def warm_up(self, batch: ForwardBatch, finish: Finish) -> None:
        """Runs a step that nobody records, so that what is compiled or allocated lazily exists; so does `capture`."""
        self._step(_Variant(batch.num_seqs, profiled=False), batch, finish)

    def capture(self, batch: ForwardBatch, finish: Finish) -> None:
        """Captures a step as a CUDA graph, which will read the tensors of `batch`."""
        variant = _Variant(batch.num_seqs, profiled=False)
        self._graphs = self._graphs or StepGraphs()
        self._graphs.capture(variant, lambda: self._step(variant, batch, finish))

    @property
    def num_graphs(self) -> int:
        return 0 if self._graphs is None else len(self._graphs)

    def record_step(self, seconds: float, num_tokens: int) -> None:
        """The oldest launched step has ended."""
        self._statistics.add_step(seconds, num_tokens)
        clock = self._launched.popleft()
        if clock is not None:
            self._statistics.add_profile(self._sequential, clock.spans())

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
        self._profiling = self._profiling if profiling is None else profiling

    def stats(self) -> PipelineStats:
        seen = self._statistics
        attention, ffn = seen.lanes[Lane.ATTENTION], seen.lanes[Lane.FFN]
        return PipelineStats(
            mode=self._mode,
            active=False,
            fallback_reason="DISABLED" if self._mode is Mode.DISABLED else self._reason,
            total_tokens=seen.total_tokens,
            attention_ms=attention.busy_ms(seen.num_profiled),
            ffn_ms=ffn.busy_ms(seen.num_profiled),
            total_ms=seen.step_ms,
            attention_sm_asked=self._attention_sm,
            ffn_sm_asked=self._ffn_sm,
            attention_sm=0,
            ffn_sm=0,
            num_steps=seen.num_steps,
            num_profiled_steps=seen.num_profiled,
            cut="",
            attention_stage_p50_ms=attention.stage_ms(50),
            attention_stage_p99_ms=attention.stage_ms(99),
            ffn_stage_p50_ms=ffn.stage_ms(50),
            ffn_stage_p99_ms=ffn.stage_ms(99),
            attention_occupancy=attention.occupancy(seen.profiled_s),
            ffn_occupancy=ffn.occupancy(seen.profiled_s),
            bubble_share=seen.bubble_share,
            attention_queue_depth=attention.queue_depth(seen.profiled_s),
            ffn_queue_depth=ffn.queue_depth(seen.profiled_s),
            handoff_bytes=handoff_bytes(self._model, self._sequential),
        )

    @property
    def _reason(self) -> str:
        has_plain_kernels = self._cache.device.type == "cuda" and not self._model.operations.replayable
        return "PLAIN_KERNELS" if has_plain_kernels else "NO_SM_PARTITIONS"

    def _takes_profile(self) -> bool:
        if not self._profiling:
            return False
        self._until_profile -= 1
        if self._until_profile:
            return False
        self._until_profile = PROFILE_EVERY
        return True

    def _clock(self, variant: _Variant) -> StageClock | None:
        if not variant.profiled:
            return None
        if variant not in self._clocks:
            self._clocks[variant] = stage_clock(self._cache.device)
        return self._clocks[variant]

    def _step(self, variant: _Variant, batch: ForwardBatch, finish: Finish | None) -> tuple[Tensor, ...]:
        clock = self._clock(variant)
        return run_pipelined(
            self._model,
            self._cache,
            batch,
            self._sequential,
            finish=finish or (lambda logits, first: None),
            around=clock.around if clock else lambda stage: contextlib.nullcontext(),
        )


def handoff_bytes(model: Qwen3ForCausalLM, order: Order) -> int:
    """What attention hands to the FFN of a layer, for each token: its result and the residual stream."""
    config = model.config
    width = config.hidden_size if order.cut is Cut.LAYER else config.num_heads * config.head_dim
    return (width + config.hidden_size) * model.dtype.itemsize
