"""One decode step as micro-batches in two lanes: an order, computed.

With streams, each lane enqueues on its own and waits for the other lane by events; captured, these become the edges of
a CUDA graph. Without, all stages run in the calling thread's stream, one after the other, in an order that a pipeline
could take: the same kernels on the same micro-batches, so that the results have the same bits.

The head is in neither lane. Nothing is left that could overlap with it, so it has the whole device, and reads its
weights once for all micro-batches.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from common.engine.kv_cache import KvCache
from common.model.batch import ForwardBatch
from common.model.qwen3 import Qwen3ForCausalLM
from decode_service.pipeline.order import Cut, Lane, Order, Stage

# Takes the logits: draws tokens, where that belongs to the step.
Finish = Callable[[Tensor], None]
Streams = Mapping[Lane, torch.cuda.Stream]
Around = Callable[[Stage], contextlib.AbstractContextManager[Any]]
# Micro-batches begin at multiples of this many rows: kernels are compiled anew for tensors that do not lie on 16 bytes.
ROWS_TOGETHER = 4


def bounds(num_rows: int, num_micro_batches: int) -> list[int]:
    """Where micro-batches begin and the last one ends: as even as `ROWS_TOGETHER` allows, none empty if it can."""
    unit = ROWS_TOGETHER if num_rows >= num_micro_batches * ROWS_TOGETHER else 1
    units = -(-num_rows // unit)
    return [min(index * units // num_micro_batches * unit, num_rows) for index in range(num_micro_batches)] + [num_rows]


def no_finish(logits_SV: Tensor) -> None:
    """Leaves the logits to the caller."""


def untimed(stage: Stage) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def run_pipelined(
    model: Qwen3ForCausalLM,
    cache: KvCache,
    batch: ForwardBatch,
    order: Order,
    *,
    finish: Finish = no_finish,
    streams: Streams | None = None,
    attention_sm: int | None = None,
    around: Around = untimed,
) -> Tensor:
    """Logits (float32) of the batch, on which `finish` has been called. On a GPU this enqueues.

    `attention_sm` is what attention's kernels are cut for. `around(stage)` is entered in the lane's stream for each
    stage, between what it waits for and what waits for it.
    """
    stages = each_stage(
        model, cache, batch, order, finish=finish, streams=streams, attention_sm=attention_sm, around=around
    )
    while True:
        try:
            next(stages)
        except StopIteration as end:
            logits: Tensor = end.value
            return logits


def each_stage(
    model: Qwen3ForCausalLM,
    cache: KvCache,
    batch: ForwardBatch,
    order: Order,
    *,
    finish: Finish,
    streams: Streams | None,
    attention_sm: int | None,
    around: Around,
) -> Generator[None, None, Tensor]:
    """`run_pipelined` with a pause after every stage; it goes on in the stream in which it began."""
    rows = bounds(batch.num_seqs, order.num_micro_batches)
    parts = [batch.part(first, end, attention_sm=attention_sm) for first, end in itertools.pairwise(rows)]
    lanes = _Lanes(streams)
    states: list[Any] = [part.token_ids_T for part in parts]
    # What a stage read stays until its lane has enqueued the micro-batch's next stage. That one comes after whatever
    # the other lane still read of it, so that memory which is free by then may be used again, in either stream.
    kept: dict[tuple[Lane, int], Any] = {}
    for stage, waits in order.steps:
        index = stage.micro_batch
        with lanes.on(stage.lane):
            for wait in waits:
                lanes.wait(wait)
            with around(stage):
                result = run_stage(model, cache, order.cut, stage, states[index], parts[index])
            if order.is_read(stage):
                lanes.mark(stage)
        kept[stage.lane, index] = states[index]
        states[index] = result
        yield
    lanes.join()
    logits_SV = model.forward_head(states[0] if len(states) == 1 else torch.cat(states))
    finish(logits_SV)
    return logits_SV


def run_stage(model: Qwen3ForCausalLM, cache: KvCache, cut: Cut, stage: Stage, state: Any, batch: ForwardBatch) -> Any:
    """One stage of one micro-batch: from what the stage before left to what the next one takes."""
    match cut, stage.lane:
        case Cut.LAYER, Lane.ATTENTION:
            return model.forward_attention_stage(stage.layer, state, batch, cache)
        case Cut.LAYER, Lane.FFN:
            return model.forward_ffn_stage(stage.layer, state, batch)
        case Cut.ATTENTION_CORE, Lane.ATTENTION:
            return model.forward_attention_core(stage.layer, state, batch, cache)
        case Cut.ATTENTION_CORE, Lane.FFN:
            return model.forward_dense_stage(stage.layer, state, batch, cache)
    raise AssertionError(stage)


class _Lanes:
    """Two streams between a fork from the calling thread's stream and a join with it; or none."""

    def __init__(self, streams: Streams | None) -> None:
        self._streams = streams
        self._marks: dict[Stage, torch.cuda.Event] = {}
        if streams is not None:
            self._caller = torch.cuda.current_stream()
            for stream in streams.values():
                stream.wait_stream(self._caller)

    def on(self, lane: Lane) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._streams is None else torch.cuda.stream(self._streams[lane])

    def mark(self, stage: Stage) -> None:
        if self._streams is not None:
            self._marks[stage] = torch.cuda.Event()
            self._marks[stage].record()

    def wait(self, stage: Stage) -> None:
        if self._streams is not None:
            self._marks.pop(stage).wait()

    def join(self) -> None:
        if self._streams is not None:
            for stream in self._streams.values():
                self._caller.wait_stream(stream)
