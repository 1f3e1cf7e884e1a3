"""Computes decode steps, each in the way it is told: sequential or in some arrangement, profiled or not.

On a GPU every way has a CUDA graph for each batch bucket. Those of sequential steps are captured before the service is
ready; all others when they are first wanted, a slice after each step, and the ones not used for longest go when they
take more memory than they may.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
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
    # Otherwise the stages of the arrangement one after the other, and nothing is drawn.
    in_lanes: bool = True

    @property
    def reference(self) -> Way:
        """Gives the logits that this one has to give, from the same kernels."""
        return Way(self.num_rows, self.arrangement, in_lanes=False)

    @property
    def is_plain(self) -> bool:
        """Has a graph from the start, which stays."""
        return self.arrangement is None and not self.profiled


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


@dataclass
class _Capture:
    way: Way
    slices: SlicedCapture[Tensor]
    # Taken by the slices so far.
    num_bytes: int = 0


class StepRunner:
    """Belongs to the engine's thread."""

    def __init__(
        self, model: Qwen3ForCausalLM, cache: KvCache, partitions: GreenManager, *, max_graph_bytes: int
    ) -> None:
        """`max_graph_bytes`: what graphs captured while serving may take, all together."""
        self._model = model
        self._cache = cache
        self._partitions = partitions
        self._max_graph_bytes = max_graph_bytes
        self._is_cuda = cache.device.type == "cuda"
        self._graphs: OrderedDict[Way, _Graph] = OrderedDict()
        self._capture: _Capture | None = None
        self._capturing: torch.cuda.Stream | None = None
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
        """Begins to capture the graph of a way that is not ready, unless another one is under way.

        Raises:
            NoWay: there are no such streams, or CAPTURE_FAILED.
        """
        if self._capture is None:
            with _failing_as("CAPTURE_FAILED"):
                self._capturing = self._capturing or torch.cuda.Stream(self._cache.device)
                slices = SlicedCapture(self._stages(way, batch, finish), self._pool, self._capturing)
                self._capture = _Capture(way, slices)

    @property
    def is_capturing(self) -> bool:
        return self._capture is not None

    def advance(self) -> None:
        """After a step: captures another slice of what is under way.

        Raises:
            NoWay: CAPTURE_FAILED.
        """
        under_way = self._capture
        if under_way is None:
            return
        free_bytes = torch.cuda.mem_get_info(self._cache.device)[0]
        self._capture = None
        with _failing_as("CAPTURE_FAILED"):
            done = under_way.slices.advance(SLICE_S)
        # Of the slices alone: between them others may take memory or give it back.
        under_way.num_bytes += free_bytes - torch.cuda.mem_get_info(self._cache.device)[0]
        if done is None:
            self._capture = under_way
            return
        self._graphs[under_way.way] = _Graph(*done, max(0, under_way.num_bytes))
        others = [way for way in self._graphs if not way.is_plain]
        # Two stay: a step, and what it is compared with.
        while self.graph_bytes > self._max_graph_bytes and len(others) > 2:
            del self._graphs[others.pop(0)]

    def run(self, way: Way, batch: ForwardBatch, finish: Finish) -> Tensor:
        """Logits (float32) of all rows, until the next step. On a GPU this enqueues.

        Raises:
            NoWay: there are no such streams, or REPLAY_FAILED.
        """
        if self._pool is None:
            return self._compute(way, batch, finish)
        entry = self._graphs[way]
        self._graphs.move_to_end(way)
        with _failing_as("REPLAY_FAILED"):
            entry.graph.replay()
        return entry.logits

    def spans(self, way: Way) -> dict[Stage, Span]:
        """When each stage of the last step of a profiled way began and ended; once that step has ended."""
        return self._clocks[way].spans()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def graph_bytes(self) -> int:
        """What the graphs captured while serving have taken."""
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

    def _compute(self, way: Way, batch: ForwardBatch, finish: Finish) -> Tensor:
        stages = self._stages(way, batch, finish)
        while True:
            try:
                next(stages)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits

    def _stages(self, way: Way, batch: ForwardBatch, finish: Finish) -> Any:
        pair = self.pair(way.arrangement.attention_sm, way.arrangement.ffn_sm) if way.arrangement else None
        around = untimed
        if way.profiled:
            self._clocks.setdefault(way, stage_clock(self._cache.device))
            around = self._clocks[way].around
        return each_stage(
            self._model,
            self._cache,
            batch,
            self.order(way),
            finish=finish if way.in_lanes else no_finish,
            # On a CPU the lanes take turns.
            streams={Lane.ATTENTION: pair.attention, Lane.FFN: pair.ffn}
            if pair and way.in_lanes and self._is_cuda
            else None,
            attention_sm=pair.attention_sm if pair else None,
            around=around,
        )


@contextlib.contextmanager
def _failing_as(reason: str) -> Generator[None, None, None]:
    try:
        yield
    except RuntimeError as error:
        raise NoWay(reason, str(error).partition("\n")[0]) from error
