"""Measures one cell, a batch size at a context: the sequential step beside pipelined ones, which stage times choose."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.pipeline_device import Device, Pair, Replay
from benchmarks.pipeline_steps import Workload
from common.model.batch import ForwardBatch
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.calibration import StageTime
from decode_service.pipeline.execution import bounds
from decode_service.pipeline.order import Cut, Lane, Order, Span, Stage
from decode_service.pipeline.stage_times import StageTimes

# What attention is given where stages are timed alone; other splits are interpolated.
SOLO_SPLITS = (16, 32, 48, 64, 80, 96, 112)
SOLO_REPEATS = 5
TURNS = 9
# Pairs of each cut that are measured as a pipeline.
BEST = 3
# What a small GPU would be split into.
FIXED = (16, 16)


class Candidate(NamedTuple):
    """A pipelined step to be measured. `asked` is empty where stage times chose it."""

    cut: Cut
    pair: Pair
    asked: str = ""

    @property
    def name(self) -> str:
        if not self.pair.partitioned:
            return f"{self.cut.value}, plain streams"
        return f"{self.cut.value} {self.pair.attention_sm}:{self.pair.ffn_sm}"


@dataclass(frozen=True)
class Timed:
    """A step of the cell. Seconds; None: does not apply, or is not known."""

    what: str
    seconds: float
    cut: Cut | None = None
    asked: str = ""
    # By the times of stages alone: of the step, and of the busier lane, as if it never waited.
    predicted_s: float | None = None
    ideal_s: float | None = None
    # Estimated of the whole model.
    whole_s: float | None = None
    # Its logits are, to the bit, those of the same micro-batches one after the other, on the whole device.
    same_bits: bool | None = None
    # Share of rows with the same token as in the sequential step of the whole batch, which rounds differently.
    same_tokens: float | None = None


def measure_cell(device: Device, workload: Workload, cell: Cell, *, whole_layers: int) -> list[Timed]:
    """The sequential step first, the two micro-batches in a row next, then pipelined steps.

    `whole_layers`: of the whole model, of which the workload has the first layers.
    """
    batch = workload.fill(cell)
    alone = {cut: solo(device, workload, batch, cut) for cut in Cut}
    head_s = device.seconds([device.captured(workload.head(cell.num_seqs))], TURNS)[0]
    times, whole = (
        {cut: StageTimes(cut, num_layers, stages, head=head_s) for cut, stages in alone.items()}
        for num_layers in (workload.config.num_layers, whole_layers)
    )
    chosen = list(candidates(device, times))
    baselines = workload.order(Cut.LAYER, 1), workload.order(Cut.LAYER, 2)
    steps = [workload.step(batch, order) for order in baselines]
    steps += [workload.step(batch, workload.order(one.cut, 2), pair=one.pair) for one in chosen]
    replays = [device.captured(step) for step in steps]
    seconds = device.seconds(replays, TURNS)
    replays[0]()
    device.wait()
    tokens_S = workload.tokens_S.clone()
    layer_s = sum(stage.seconds for stage in timed_stages(device, workload, batch, workload.order(Cut.LAYER, 1), None))
    more_s = (whole_layers - workload.config.num_layers) * layer_s
    rows = [Timed("sequential", seconds[0], whole_s=seconds[0] + more_s)]
    _, share = _tokens_of(device, workload, replays[1], tokens_S)
    rows.append(Timed("two micro-batches", seconds[1], same_tokens=share))
    # Each is dropped once it has been compared.
    replays.reverse()
    del replays[-2:]
    for candidate, step_s in zip(chosen, seconds[2:], strict=True):
        logits_SV, share = _tokens_of(device, workload, replays.pop(), tokens_S)
        pair, stages = candidate.pair, times[candidate.cut]
        reference = workload.step(batch, workload.order(candidate.cut, 2), attention_sm=pair.attention_sm)()
        same_bits = same(logits_SV, reference)
        del reference
        # A step over its prediction stays the same with more layers, which the prediction has.
        predicted_s, whole_s = (
            known[candidate.cut].makespan(pair.attention_sm, pair.ffn_sm, overlaps=pair.partitioned)
            for known in (times, whole)
        )
        rows.append(
            Timed(
                candidate.name,
                step_s,
                candidate.cut,
                candidate.asked,
                predicted_s=predicted_s if pair.partitioned else None,
                ideal_s=max(stages.busy(pair.attention_sm, pair.ffn_sm).values()) + head_s,
                whole_s=step_s / predicted_s * whole_s,
                same_bits=same_bits,
                same_tokens=share,
            )
        )
        del logits_SV
        device.release()
    return rows


def solo(device: Device, workload: Workload, batch: ForwardBatch, cut: Cut) -> list[StageTime]:
    """Stage times of the first of two micro-batches, on the partitions of some pairs, nothing else running.

    With one micro-batch the lanes take turns, so that each stage has its partition and nothing beside it.
    """
    half = batch.part(0, bounds(batch.num_seqs, 2)[1])
    result: list[StageTime] = []
    asked = [(split, device.num_sms - split) for split in SOLO_SPLITS if split in device.splits]
    for attention_sm, ffn_sm in [*asked, (device.num_sms, device.num_sms)]:
        pair = device.pair(attention_sm, ffn_sm)
        if pair is None:
            print(f"    no pair {attention_sm}:{ffn_sm}, {device.missing}", flush=True)
        else:
            result += timed_stages(device, workload, half, workload.order(cut, 1), pair)
    return result


def timed_stages(
    device: Device, workload: Workload, batch: ForwardBatch, order: Order, pair: Pair | None
) -> list[StageTime]:
    """Of steps of one micro-batch; without a pair, each stage on all SMs."""
    spans = profiled(device, workload, batch, order, pair, SOLO_REPEATS)
    everything = Pair(device.num_sms, device.num_sms, False, None)
    num_sm = {Lane.ATTENTION: (pair or everything).attention_sm, Lane.FFN: (pair or everything).ffn_sm}
    return stage_times(order, spans, num_sm)


def profiled(
    device: Device, workload: Workload, batch: ForwardBatch, order: Order, pair: Pair | None, num_steps: int
) -> list[dict[Stage, Span]]:
    """When the stages ran of so many steps, after one that does not count."""
    clock = device.clock()
    replay = device.captured(workload.step(batch, order, pair=pair, around=clock.around))
    steps = []
    for _ in range(num_steps + 1):
        replay()
        device.wait()
        steps.append(clock.spans())
    del replay
    device.release()
    return steps[1:]


def stage_times(order: Order, steps: Sequence[Mapping[Stage, Span]], num_sm: Mapping[Lane, int]) -> list[StageTime]:
    """Medians over the steps, of each lane: its first stage, its last, and all between. At least three stages."""
    result = []
    for lane in Lane:
        last = order.num_stages(lane) - 1
        seconds = [
            statistics.median(spans[stage].end_s - spans[stage].start_s for spans in steps)
            for stage in (Stage(lane, layer, 0) for layer in range(last + 1))
        ]
        middle = statistics.median(seconds[1:last])
        result.append(StageTime(order.cut, lane, num_sm[lane], middle, seconds[0], seconds[last]))
    return result


def candidates(device: Device, times: Mapping[Cut, StageTimes]) -> Iterator[Candidate]:
    """The pairs of each cut that are predicted to be the fastest; the fixed pair; two plain streams."""
    for cut, stages in times.items():
        fixed = device.pair(*FIXED) if device.splits else None
        asked = ":".join(map(str, FIXED))
        for attention_sm in best_splits(device.splits, device.num_sms, stages):
            pair = device.pair(attention_sm, device.num_sms - attention_sm)
            if pair is None:
                print(f"    no pair for {attention_sm}, {device.missing}", flush=True)
            elif pair == fixed:
                yield Candidate(cut, pair, asked)
                fixed = None
            else:
                yield Candidate(cut, pair)
        if fixed is not None:
            yield Candidate(cut, fixed, asked)
        plain = device.pair(device.num_sms, device.num_sms)
        if plain is not None:
            yield Candidate(cut, plain)


def best_splits(splits: Sequence[int], num_sms: int, stages: StageTimes) -> list[int]:
    """Of the SMs that attention can be given, those with the shortest predicted steps; the shortest first."""
    return sorted(splits, key=lambda split: stages.makespan(split, num_sms - split, overlaps=True))[:BEST]


def same(logits_SV: Tensor, others_SV: Tensor) -> bool:
    """To the bit. A few rows at a time: the logits of a large batch are gigabytes."""
    return all(map(torch.equal, logits_SV.split(256), others_SV.split(256)))


def _tokens_of(device: Device, workload: Workload, replay: Replay, expected_S: Tensor) -> tuple[Tensor, float]:
    """Its logits, and the share of its tokens that are as expected."""
    workload.tokens_S.fill_(-1)
    logits_SV = replay()
    device.wait()
    return logits_SV, (workload.tokens_S == expected_S).float().mean().item()
