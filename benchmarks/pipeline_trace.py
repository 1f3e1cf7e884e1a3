"""A few profiled steps of the attention/FFN pipeline beside the sequential one: a trace for Perfetto, and a picture.

    python -m benchmarks.pipeline_trace [--model 8B] [--layers 6] [--batch 512] [--context 1024]
        [--cut layer|attention-core] [--attention-sm 64]
    python -m benchmarks.pipeline_trace --simulate ATTENTION_MS FFN_MS

The second needs no GPU: it draws what stages of these times would do, which on a GPU they have on their partitions.
Both files go to benchmarks/results; the trace opens in ui.perfetto.dev. Timing every stage makes steps a little slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.pipeline_cell import profiled
from benchmarks.pipeline_device import Device, GraphDevice
from benchmarks.pipeline_picture import draw, step_s
from benchmarks.pipeline_steps import Workload
from benchmarks.report import environment
from benchmarks.shapes import PIPELINE_SHAPES
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.order import Cut, Lane, order, timeline
from decode_service.pipeline.trace import Track, chrome_trace

STEPS = 3


def measured(
    device: Device, workload: Workload, cell: Cell, cut: Cut, attention_sm: int, num_steps: int
) -> list[Track]:
    """The sequential steps, then the pipelined ones.

    Raises:
        SystemExit: there is no such pair of partitions.
    """
    pair = device.pair(attention_sm, device.num_sms - attention_sm)
    if pair is None:
        raise SystemExit(f"no partition of {attention_sm} SMs: {device.missing}")
    batch = workload.fill(cell)
    sequential, pipelined = workload.order(Cut.LAYER, 1), workload.order(cut, 2)
    return [
        Track("sequential", sequential, profiled(device, workload, batch, sequential, None, num_steps)),
        Track(
            f"pipelined, cut {cut.value}",
            pipelined,
            profiled(device, workload, batch, pipelined, pair, num_steps),
            {Lane.ATTENTION: pair.attention_sm, Lane.FFN: pair.ffn_sm},
        ),
    ]


def simulated(cut: Cut, num_layers: int, attention_s: float, ffn_s: float) -> list[Track]:
    """A step whose stages take so long, and never wait for anything but one another."""
    steps = order(cut, num_layers, 2)
    seconds = {Lane.ATTENTION: attention_s, Lane.FFN: ffn_s}
    spans = timeline(steps, lambda stage: seconds[stage.lane]).spans
    return [Track(f"simulated, cut {cut.value}", steps, [spans])]


def write(tracks: Sequence[Track], name: str, title: str) -> list[Path]:
    """Trace and picture; without matplotlib the trace alone."""
    report.RESULTS.mkdir(exist_ok=True)
    # Results end in .json; this is none.
    trace, picture = (report.RESULTS / f"{name}.{suffix}" for suffix in ("perfetto-trace", "png"))
    trace.write_text(json.dumps(chrome_trace(tracks)) + "\n")
    paths = [trace]
    try:
        draw(tracks, picture, title=title)
        paths.append(picture)
    except ImportError:
        print("  no picture: matplotlib is not installed", flush=True)
    for path in paths:
        print(f"  kept in {path}", flush=True)
    return paths


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PIPELINE_SHAPES, default="8B")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cut", type=Cut, choices=Cut, default=Cut.ATTENTION_CORE, help="layer or attention-core")
    parser.add_argument("--attention-sm", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--simulate", type=float, nargs=2, metavar=("ATTENTION_MS", "FFN_MS"))
    return parser.parse_args(arguments)


@torch.inference_mode()
def run(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    if options.simulate is not None:
        attention_s, ffn_s = (ms * 1e-3 for ms in options.simulate)
        tracks = simulated(options.cut, options.layers, attention_s, ffn_s)
        title = f"Attention/FFN pipeline, stages of {options.simulate[0]} and {options.simulate[1]} ms"
        write(tracks, f"simulated-pipeline-trace-{options.cut.value}", title)
        return
    shape = replace(PIPELINE_SHAPES[options.model], num_layers=options.layers)
    with GraphDevice() as device:
        workload = Workload(shape, device.device)
        cell = Cell(options.batch, options.context)
        tracks = measured(device, workload, cell, options.cut, options.attention_sm, options.steps)
    for track in tracks:
        print(f"  {track.name}: {step_s(track) * 1e3:.3f} ms a step, stages timed", flush=True)
    name = f"{environment()['slug']}-pipeline-trace-{options.model.lower()}-{options.cut.value}"
    setting = f"{shape.name}, {options.layers} layers, batch {options.batch:,}, context {options.context:,}"
    write(tracks, name, f"Attention/FFN pipeline, {setting}, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    run(sys.argv[1:])
