"""Times of the pipeline's stages with nothing beside them, over sequences that are nobody's.

Their keys and values are whatever lies in the cache; what a stage writes goes to the scratch block. Several layers run
one after the other, so that their weights come from memory as they do in a step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.engine.graphs import capture
from common.engine.kv_cache import KvCache
from common.model.batch import ForwardBatch
from common.model.qwen3 import Activations, Attended, Projected, Qwen3ForCausalLM
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.calibration import StageTime
from decode_service.pipeline.execution import bounds, run_stage
from decode_service.pipeline.order import NUM_MICRO_BATCHES, Cut, Lane, Stage, order

MOST_LAYERS = 8
REPEATS = 5


class StageMeasuring:
    """Belongs to the engine's thread, between two steps."""

    def __init__(self, model: Qwen3ForCausalLM, cache: KvCache) -> None:
        self._model = model
        self._cache = cache
        self._slots_from = cache.scratch_block * cache.block_size
        # Of graphs, which take each other's memory: with a pool for each, what the last ones took is not given back
        # while the next one is captured. The last graph keeps the pool.
        self._pool: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        # Not the caller's, which may be the default stream: nothing can be captured there.
        self._caller: torch.cuda.Stream | None = None
        if not model.operations.replayable:
            # Only kernels reach the scratch block.
            self._cache = KvCache(model.config, 64, cache.block_size, model.dtype, cache.device)
            self._slots_from = 0

    def layers_s(self, cell: Cell) -> float:
        """Of a sequential step of the whole batch, all but its end: the head, and what draws its tokens."""
        times = {lane: self._time(Cut.LAYER, lane, cell.num_seqs, cell.context) for lane in Lane}
        num_layers = self._model.config.num_layers
        return sum(first + max(num_layers - 2, 0) * middle + last for first, middle, last in times.values())

    def head_s(self, cell: Cell) -> float:
        """Of the head over the whole batch."""
        hidden_RD = self._noise(cell.num_seqs, self._model.config.hidden_size)
        return self._seconds(lambda: self._model.forward_head(hidden_RD), None)

    def stage(self, cell: Cell, cut: Cut, lane: Lane, stream: torch.cuda.Stream | None, num_sm: int) -> StageTime:
        """One stage of one micro-batch on `stream`, which has so many SMs."""
        num_seqs = bounds(cell.num_seqs, NUM_MICRO_BATCHES)[1]
        first_s, seconds, last_s = self._time(cut, lane, num_seqs, cell.context, stream=stream, num_sm=num_sm)
        return StageTime(cut, lane, num_sm, seconds, first_s, last_s)

    def _time(
        self,
        cut: Cut,
        lane: Lane,
        num_seqs: int,
        context: int,
        *,
        stream: torch.cuda.Stream | None = None,
        num_sm: int | None = None,
    ) -> tuple[float, float, float]:
        """(first stage, one in the middle, last)."""
        batch = self._batch(num_seqs, context, num_sm)
        num_stages = order(cut, self._model.config.num_layers, 1).num_stages(lane)
        middle = list(range(1, num_stages - 1))[:MOST_LAYERS] or [0]
        first_s, middle_s, last_s = (
            self._seconds(lambda layers=layers: self._run(cut, lane, layers, batch), stream) / len(layers)  # type: ignore[misc]
            for layers in ([0], middle, [num_stages - 1])
        )
        return first_s, middle_s, last_s

    def _run(self, cut: Cut, lane: Lane, layers: Sequence[int], batch: ForwardBatch) -> None:
        for layer in layers:
            run_stage(self._model, self._cache, cut, Stage(lane, layer, 0), self._state(cut, lane, layer, batch), batch)

    def _state(self, cut: Cut, lane: Lane, layer: int, batch: ForwardBatch) -> object:
        """What a stage starts from, made once for each batch."""
        return batch.once(self._new_state, cut, lane, layer == 0)

    def _new_state(self, batch: ForwardBatch, cut: Cut, lane: Lane, is_first: bool) -> object:
        config = self._model.config

        begins_step = is_first and lane is (Lane.ATTENTION if cut is Cut.LAYER else Lane.FFN)
        if begins_step:
            return batch.token_ids_T
        rows = batch.num_seqs
        residual_TD, heads = self._noise(rows, config.hidden_size), (rows, config.num_heads, config.head_dim)
        if cut is Cut.LAYER:
            return Activations(self._noise(rows, config.hidden_size), residual_TD)
        kind = Projected if lane is Lane.ATTENTION else Attended
        return kind(self._noise(*heads), residual_TD)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self._model.dtype, device=self._cache.device)

    def _batch(self, num_seqs: int, context: int, num_sm: int | None) -> ForwardBatch:
        cache, device = self._cache, self._cache.device
        context = min(context, self._model.config.context_length)
        rows = torch.arange(num_seqs, device=device)
        width = -(-context // cache.block_size)
        return ForwardBatch(
            token_ids_T=rows.int() % self._model.config.vocab_size,
            positions_T=torch.full((num_seqs,), context - 1, dtype=torch.int32, device=device),
            slot_mapping_T=(self._slots_from + rows % cache.block_size).int(),
            query_starts=tuple(range(num_seqs + 1)),
            query_start_S1=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            kv_lens=(context,) * num_seqs,
            kv_len_S=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
            block_table_SP=torch.randint(cache.num_blocks, (num_seqs, width), dtype=torch.int32, device=device),
            logit_rows=None,
            attention_sm=num_sm,
        )

    def _seconds(self, run: Callable[[], object], stream: torch.cuda.Stream | None) -> float:
        """Median of some repetitions, after one that compiles and allocates."""
        run()
        if self._cache.device.type == "cpu":
            times = []
            for _ in range(REPEATS):
                started_s = time.perf_counter()
                run()
                times.append(time.perf_counter() - started_s)
            return statistics.median(times)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._caller = caller = self._caller or torch.cuda.Stream(self._cache.device)
        caller.wait_stream(torch.cuda.current_stream())

        def in_stream() -> None:
            if stream is None:
                run()
                return
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                run()
            caller.wait_stream(stream)

        with torch.cuda.stream(caller):
            in_stream()
            caller.synchronize()
            self._graph, _ = capture(in_stream, self._pool)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 2)]
            self._graph.replay()
            for event in events:
                event.record()
                self._graph.replay()
            # The graph goes with the next call, and its last replay is after the last event.
            caller.synchronize()
        return statistics.median(earlier.elapsed_time(later) * 1e-3 for earlier, later in itertools.pairwise(events))
