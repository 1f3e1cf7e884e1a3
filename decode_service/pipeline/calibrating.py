"""A calibration, one measurement at a time: for each cell the sequential step, and each lane's stages on some SMs."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from decode_service.pipeline.arrangements import SHORTEST_CONTEXT, Cell
from decode_service.pipeline.calibration import Calibration, CellCalibration, StageTime
from decode_service.pipeline.order import Cut, Lane
from decode_service.pipeline.stage_measuring import StageMeasuring
from decode_service.sm.green_manager import GreenManager

# Below, stages are too short for a pipeline to pay.
FEWEST_SEQS = 32
LONGEST_CONTEXT = 4096
# SM counts of each lane.
NUM_COUNTS = 4


def cells_to_measure(batch_buckets: Sequence[int], context_length: int, num_tokens: int) -> list[Cell]:
    """Batch sizes a doubling apart, contexts two; those whose KV would fit into a cache of `num_tokens`."""
    sizes, size = [], batch_buckets[-1]
    while size >= FEWEST_SEQS:
        sizes.append(next(bucket for bucket in batch_buckets if bucket >= size))
        size //= 2
    contexts, context = [], SHORTEST_CONTEXT
    while context <= max(SHORTEST_CONTEXT, min(context_length, LONGEST_CONTEXT)):
        contexts.append(context)
        context *= 4
    return [Cell(size, context) for size in reversed(sizes) for context in contexts if size * context <= num_tokens]


def calibrate(
    measuring: StageMeasuring, partitions: GreenManager, cells: Sequence[Cell]
) -> Generator[None, None, Calibration]:
    """Pauses after every measurement. Partitions that cannot be had are left out."""
    splits = partitions.splits
    chosen = splits[:: max(1, len(splits) // NUM_COUNTS)]
    measured = []
    for cell in cells:
        layers_s = measuring.layers_s(cell)
        yield
        head_s = measuring.head_s(cell)
        yield
        stages: list[StageTime] = []
        for split in chosen:
            pair = partitions.allocate(split, partitions.num_sms - split)
            if pair is None:
                continue
            for cut in Cut:
                for lane, stream, num_sm in (
                    (Lane.ATTENTION, pair.attention, pair.attention_sm),
                    (Lane.FFN, pair.ffn, pair.ffn_sm),
                ):
                    stages.append(measuring.stage(cell, cut, lane, stream, num_sm))
                    yield
        measured.append(CellCalibration(cell, layers_s + head_s, tuple(stages), head_s=head_s))
    return Calibration(tuple(measured))
