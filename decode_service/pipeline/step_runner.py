"""Computes decode steps, each in the way it is told: sequential or in some arrangement, profiled or not.

On a GPU every way has a CUDA graph for each batch bucket. Those of sequential steps are captured before the service is
ready; those of arrangements when they are first wanted, a slice after each step, and the ones not used for longest go
when they take more memory than they may.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.engine.graphs import capture
from common.engine.kv_cache import KvCache
from common.engine.sliced_capture import SlicedCapture
from common.model.batch import ForwardBatch
from common.model.qwen3 import Qwen3ForCausalLM
from decode_service.pipeline.arrangements import Arrangement
from decode_service.pipeline.execution import Finish, each_stage, no_finish, untimed
from decode_service.pipeline.order import NUM_MICRO_BATCHES, Cut, Lane, Order, Span, Stage, order
from decode_service.pipeline.stage_clock import StageClock, stage_clock
from decode_service.sm.green_manager import GreenManager
from decode_service.sm.sm_pairs import SmPair

# Of a capture, after each step: a step's launch is not to come late for it.
SLICE_S = 0.5e-3


class Way(NamedTuple):
    """How a step of so many rows is computed. Without an arrangement: one micro-batch, in the stream of the caller."""

    num_rows: int
    arrangement: Arrangement | None = None
    profiled: bool = False


class NoWay(Exception):
    """A step cannot be computed in some way. `reason` is a name, `detail` for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    num_bytes: int


class _Capture(NamedTuple):
    way: Way
    slices: SlicedCapture[Tensor]
    free_bytes: int


class StepRunner:
    """Belongs to the engine's thread."""

    def __init__(
        self, model: Qwen3ForCausalLM, cache: KvCache, partitions: GreenManager, *, max_graph_bytes: int
    ) -> None:
        """`max_graph_bytes`: what graphs of arrangements may take, all together."""
        self._model = model
        self._cache = cache
        self._partitions = partitions
        self._max_graph_bytes = max_graph_bytes
        self._is_cuda = cache.device.type == "cuda"
        self._graphs: OrderedDict[Way, _Graph] = OrderedDict()
        self._capture: _Capture | None = None
        self._clocks: dict[Way, StageClock] = {}
        self._pool: Any = None

    def pair(self, attention_sm: int, ffn_sm: int) -> SmPair:
        """Streams on so many SMs each. Raises NoWay."""
        pair = self._partitions.allocate(attention_sm, ffn_sm)
        if pair is None:
            stats = self._partitions.stats()
            raise NoWay(stats.state.name, f"{stats.reason}; {stats.remedy}")
        return pair

    def order(self, way: Way) -> Order:
        num_layers = self._model.config.num_layers
        if way.arrangement is None:
            return order(Cut.LAYER, num_layers, 1)
        return order(way.arrangement.cut, num_layers, NUM_MICRO_BATCHES)

    def capture(self, way: Way, batch: ForwardBatch, finish: Finish) -> None:
        """Captures a graph at once, which will read the tensors of `batch`; before that, runs the step.

        The largest first, since graphs share memory. From the first capture on, `run` replays graphs.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._compute(way, batch, finish)
        torch.cuda.current_stream().synchronize()
        graph, logits = capture(lambda: self._compute(way, batch, finish), self._pool)
        self._graphs[way] = _Graph(graph, logits, 0)

    def is_ready(self, way: Way) -> bool:
        """Whether `run` can be called at once."""
        return self._pool is None or way in self._graphs

    def prepare(self, way: Way, batch: ForwardBatch, finish: Finish) -> None:
        """Captures a slice of the graph of a way that is not ready; begins with it unless another one is under way.

        Raises:
            NoWay: there are no such streams, or CAPTURE_FAILED.
        """
        try:
            if self._capture is None:
                self._capture = self._begin(way, batch, finish)
            self._advance(self._capture)
        except RuntimeError as error:
            self._capture = None
            raise NoWay("CAPTURE_FAILED", str(error).partition("\n")[0]) from error

    def run(self, way: Way, batch: ForwardBatch, finish: Finish) -> Tensor:
        """Logits (float32) of all rows, until the next step. On a GPU this enqueues.

        Raises:
            NoWay: there are no such streams, or REPLAY_FAILED.
        """
        if self._pool is None:
            return self._compute(way, batch, finish)
        entry = self._graphs[way]
        if way.arrangement is not None:
            self._graphs.move_to_end(way)
        try:
            entry.graph.replay()
        except RuntimeError as error:
            raise NoWay("REPLAY_FAILED", str(error).partition("\n")[0]) from error
        return entry.logits

    def reference(self, way: Way, batch: ForwardBatch) -> Tensor:
        """The logits that a pipelined way has to give for this step, from the same kernels, one stage after the other.

        Nothing is drawn, and the keys and values that it writes are those of the step.

        Raises:
            torch.OutOfMemoryError: there is no room for them beside what serving needs.
        """
        return self._compute(way, batch, no_finish, in_lanes=False)

    def spans(self, way: Way) -> dict[Stage, Span]:
        """When each stage of the last step of a profiled way began and ended; once that step has ended."""
        return self._clocks[way].spans()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def graph_bytes(self) -> int:
        """What the graphs of arrangements have taken."""
        return sum(entry.num_bytes for entry in self._graphs.values())

    def handoff_bytes(self, cut: Cut) -> int:
        """What attention hands to the FFN of a layer, for each token: its result and the residual stream."""
        config = self._model.config
        width = config.hidden_size if cut is Cut.LAYER else config.num_heads * config.head_dim
        return (width + config.hidden_size) * self._model.dtype.itemsize

    def forget(self) -> None:
        """Drops whatever was captured for arrangements."""
        if self._capture is not None:
            self._capture.slices.abandon()
            self._capture = None
        for way in [way for way in self._graphs if way.arrangement is not None]:
            del self._graphs[way]

    def _begin(self, way: Way, batch: ForwardBatch, finish: Finish) -> _Capture:
        stages = self._stages(way, batch, finish)
        free_bytes = torch.cuda.mem_get_info(self._cache.device)[0]
        return _Capture(way, SlicedCapture(stages, self._pool), free_bytes)

    def _advance(self, under_way: _Capture) -> None:
        done = under_way.slices.advance(SLICE_S)
        if done is None:
            return
        self._capture = None
        num_bytes = max(0, under_way.free_bytes - torch.cuda.mem_get_info(self._cache.device)[0])
        self._graphs[under_way.way] = _Graph(*done, num_bytes)
        arranged = [way for way in self._graphs if way.arrangement is not None]
        while self.graph_bytes > self._max_graph_bytes and len(arranged) > 1:
            del self._graphs[arranged.pop(0)]

    def _compute(self, way: Way, batch: ForwardBatch, finish: Finish, *, in_lanes: bool = True) -> Tensor:
        stages = self._stages(way, batch, finish, in_lanes=in_lanes)
        while True:
            try:
                next(stages)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits

    def _stages(self, way: Way, batch: ForwardBatch, finish: Finish, *, in_lanes: bool = True) -> Any:
        pair = self.pair(way.arrangement.attention_sm, way.arrangement.ffn_sm) if way.arrangement else None
        around = untimed
        if way.profiled and in_lanes:
            self._clocks.setdefault(way, stage_clock(self._cache.device))
            around = self._clocks[way].around
        return each_stage(
            self._model,
            self._cache,
            batch,
            self.order(way),
            finish=finish,
            # On a CPU the lanes take turns.
            streams={Lane.ATTENTION: pair.attention, Lane.FFN: pair.ffn}
            if pair and in_lanes and self._is_cuda
            else None,
            attention_sm=pair.attention_sm if pair else None,
            around=around,
        )
