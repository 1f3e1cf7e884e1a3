"""What the GPU's power limit does to sequential and pipelined steps: their times after a rest, and once it throttles.

    python -m benchmarks.pipeline_power MODEL [--layers 8] [--batch 1024] [--context 1024]

A GPU that has rested runs its first steps at full clocks. Kept busy it draws as much as it may, and lowers the clock of
its SMs until it does: what then counts is the energy of a step, which no overlap saves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.pipeline_device import GraphDevice, Replay
from benchmarks.pipeline_steps import Workload
from benchmarks.report import Report
from benchmarks.shapes import PIPELINE_SHAPES
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.order import Cut

SPLITS = (48, 56, 64, 72)
REST_S, NUM_RESTED = 0.25, 5
BUSY_S, SAMPLE_S, TURNS_AT_ONCE = 1.5, 0.05, 5


class Sample(NamedTuple):
    clock_mhz: int
    power_w: float


class Watch:
    """Clock and power, from a thread of its own. A context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: list[Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def settled(self) -> Sample:
        """Medians over the second half."""
        clocks, powers = zip(*self._samples[len(self._samples) // 2 :], strict=True)
        return Sample(statistics.median_low(clocks), statistics.median(powers))

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            sample = Sample(torch.cuda.clock_rate(self._device), torch.cuda.power_draw(self._device) / 1e3)
            self._samples.append(sample)


def rested_s(device: GraphDevice, replay: Replay) -> float:
    """Of single steps, a pause before each."""
    times = []
    for _ in range(NUM_RESTED):
        time.sleep(REST_S)
        times += device.once([replay])
    return statistics.median(times)


def busy(device: GraphDevice, replay: Replay) -> tuple[float, Sample]:
    """Seconds of a step at the end of a while without a pause, and what the GPU did then."""
    seconds = 0.0
    with Watch(device.device) as watch:
        until_s = time.monotonic() + BUSY_S
        while time.monotonic() < until_s:
            seconds = statistics.median(device.once([replay] * TURNS_AT_ONCE))
    return seconds, watch.settled


def steps(device: GraphDevice, workload: Workload, cell: Cell) -> Iterator[tuple[str, Replay]]:
    batch = workload.fill(cell)
    yield "sequential", workload.step(batch, workload.order(Cut.LAYER, 1))
    for cut in Cut:
        for split in (*SPLITS, device.num_sms):
            pair = device.pair(split, device.num_sms - split or device.num_sms)
            if pair is not None:
                name = f"{pair.attention_sm}:{pair.ffn_sm}" if pair.partitioned else "plain streams"
                yield f"{cut.value} {name}", workload.step(batch, workload.order(cut, 2), pair=pair)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=PIPELINE_SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    return parser.parse_args(arguments)


@torch.inference_mode()
def run(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    shape, cell = (
        replace(PIPELINE_SHAPES[options.model], num_layers=options.layers),
        Cell(options.batch, options.context),
    )
    title = f"Clocks and power of {options.layers} layers, batch {cell.num_seqs}, context {cell.context}"
    report = Report(f"pipeline-power-{cell.num_seqs}x{cell.context}", title, model=options.model)
    with GraphDevice() as device:
        first: dict[str, float] = {}
        for name, step in steps(device, Workload(shape, device.device), cell):
            replay = device.captured(step)
            replay()
            after_rest_s = rested_s(device, replay)
            busy_s, sample = busy(device, replay)
            first = first or {"rested": after_rest_s, "busy": busy_s}
            report.add(
                what=name,
                rested_ms=after_rest_s * 1e3,
                rested_gain=first["rested"] / after_rest_s,
                busy_ms=busy_s * 1e3,
                busy_gain=first["busy"] / busy_s,
                clock_mhz=sample.clock_mhz,
                power_w=sample.power_w,
                joules=sample.power_w * busy_s,
            )
            del replay
            device.release()
    report.save()


if __name__ == "__main__":
    run(sys.argv[1:])
