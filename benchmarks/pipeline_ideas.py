"""What might make the attention/FFN pipeline faster, tried one idea at a time on one cell of one model.

    python -m benchmarks.pipeline_ideas [--model 8B] [--layers 8] [--batch 1024] [--context 1024]

Every row is a CUDA graph of a whole step, if nothing else is said in the cut attention-core, beside the sequential step
in the same turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.pipeline_cell import TURNS, timed_stages
from benchmarks.pipeline_device import GraphDevice, Pair, Replay
from benchmarks.pipeline_prefetch import Prefetching
from benchmarks.pipeline_steps import Workload
from benchmarks.report import Report
from benchmarks.shapes import PIPELINE_SHAPES
from common.model.batch import ForwardBatch
from decode_service.pipeline import execution
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.execution import bounds
from decode_service.pipeline.order import Cut, Lane
from decode_service.sm.green_manager import GreenManager

CUT = Cut.ATTENTION_CORE
SPLITS = (40, 48, 56, 64, 72, 80)
MICRO_BATCHES = (3, 4)
# Share of the first of two micro-batches.
UNEQUAL = (0.4, 0.45)
# For each layer: a part of an H200's 50 MB of L2.
PREFETCHED_BYTES = (4 << 20, 16 << 20)
# Streams of -5 are the most urgent.
URGENT = -5


class Idea(NamedTuple):
    name: str
    step: Replay


@contextmanager
def products_for(num_sms: int, device: GraphDevice) -> Iterator[None]:
    """Within, PyTorch asks the library for products that leave SMs to others, where it can be asked."""
    torch._C._set_sm_carveout_experimental(device.num_sms - num_sms)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)  # type: ignore[attr-defined]


def within(context: Callable[[], object], step: Replay) -> Replay:
    def run() -> torch.Tensor:
        with context():  # type: ignore[attr-defined]
            return step()

    return run


@contextmanager
def first_has(share: float) -> Iterator[None]:
    """Within, the first of two micro-batches has this share of the rows."""
    kept = execution.bounds
    execution.bounds = lambda num_rows, _: [0, round(num_rows * share / 4) * 4, num_rows]  # type: ignore[assignment]
    try:
        yield
    finally:
        execution.bounds = kept


def urgent_pair(stack: ExitStack, device: GraphDevice, attention_sm: int, lane: Lane) -> Pair | None:
    priorities = {"attention_priority": URGENT} if lane is Lane.ATTENTION else {"ffn_priority": URGENT}
    manager = stack.enter_context(GreenManager.of(device.device, **priorities))
    pair = manager.allocate(attention_sm, manager.num_sms - attention_sm)
    return None if pair is None else Pair.of(pair)


def ideas(stack: ExitStack, device: GraphDevice, workload: Workload, batch: ForwardBatch) -> Iterator[Idea]:
    def step(pair: Pair, micro_batches: int = 2) -> Replay:
        return workload.step(batch, workload.order(CUT, micro_batches), pair=pair)

    pairs = [pair for split in SPLITS if (pair := device.pair(split, device.num_sms - split))]
    for pair in pairs:
        yield Idea(f"{pair.attention_sm}:{pair.ffn_sm}", step(pair))
    for pair, count in itertools.product(pairs, MICRO_BATCHES):
        yield Idea(f"{pair.attention_sm}:{pair.ffn_sm}, {count} micro-batches", step(pair, count))
    for pair in pairs:
        name = f"{pair.attention_sm}:{pair.ffn_sm}"
        carved = within(lambda pair=pair: products_for(pair.ffn_sm, device), step(pair))  # type: ignore[misc]
        yield Idea(f"{name}, products for {pair.ffn_sm} SMs", carved)
        for lane in Lane:
            urgent = urgent_pair(stack, device, pair.attention_sm, lane)
            if urgent is not None:
                yield Idea(f"{name}, urgent {lane.value}", step(urgent))
    for pair, share in itertools.product(pairs, UNEQUAL):
        unequal = within(lambda share=share: first_has(share), step(pair))  # type: ignore[misc]
        yield Idea(f"{pair.attention_sm}:{pair.ffn_sm}, {share:.0%} and {1 - share:.0%} of the rows", unequal)
    plain = device.pair(device.num_sms, device.num_sms)
    assert plain is not None
    yield Idea("plain streams", step(plain))
    for count in MICRO_BATCHES:
        yield Idea(f"plain streams, {count} micro-batches", step(plain, count))
    for num_bytes in PREFETCHED_BYTES:
        prefetching = Prefetching(workload, torch.cuda.Stream(device.device), num_bytes)
        brought = workload.step(batch, workload.order(Cut.LAYER, 1), around=prefetching.around)
        yield Idea(f"sequential, {num_bytes >> 20} MiB of a layer's FFN weights prefetched beside attention", brought)


def stage_rows(device: GraphDevice, workload: Workload, batch: ForwardBatch) -> Iterator[dict[str, object]]:
    """One micro-batch's stages between the first and the last, alone on their partitions."""
    half = batch.part(0, bounds(batch.num_seqs, 2)[1])
    for split in (*SPLITS, device.num_sms):
        pair = device.pair(split, max(device.num_sms - split, 0) or device.num_sms)
        if pair is None:
            continue
        for one in timed_stages(device, workload, half, workload.order(CUT, 1), pair):
            yield {"what": f"a stage of {one.lane.value} alone on {one.num_sm} SMs", "ms": one.seconds * 1e3}


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PIPELINE_SHAPES, default="8B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    return parser.parse_args(arguments)


@torch.inference_mode()
def run(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    shape = replace(PIPELINE_SHAPES[options.model], num_layers=options.layers)
    title = f"Ideas for the pipeline: {options.layers} layers, batch {options.batch}, context {options.context}"
    report = Report(f"pipeline-ideas-{options.batch}x{options.context}", title, model=options.model)
    with GraphDevice() as device, ExitStack() as stack:
        workload = Workload(shape, device.device)
        batch = workload.fill(Cell(options.batch, options.context))
        sequential = device.captured(workload.step(batch, workload.order(Cut.LAYER, 1)))
        for idea in ideas(stack, device, workload, batch):
            # Beside the sequential step in the same turns, so that a device that becomes slower does so for both.
            replay = device.captured(idea.step)
            sequential_s, seconds = device.seconds([sequential, replay], TURNS)
            del replay
            device.release()
            report.add(what=idea.name, ms=seconds * 1e3, sequential_ms=sequential_s * 1e3, gain=sequential_s / seconds)
        for row in stage_rows(device, workload, batch):
            report.add(**row)
    spread = statistics.pstdev([row["sequential_ms"] for row in report.rows if "sequential_ms" in row])
    report.notes.append(f"The sequential step's times are {spread:.2g} ms apart (standard deviation).")
    report.save()


if __name__ == "__main__":
    run(sys.argv[1:])
