"""The attention/FFN pipeline against the sequential decode step, over batch sizes and contexts of one model.

    python -m benchmarks.decode_pipeline MODEL [--batch 512 1024] [--context 1024] [--layers 8] [--seconds 300]

Every step is a CUDA graph over the first layers of a model with random weights, and ends with its head and a draw. A
run goes on where the last one stopped: what is kept is not measured again, save with `--fresh`. With `--cpu` the tiny
model's steps run once on the CPU; that shows whether this program works, and nothing is kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.pipeline_cell import Timed, measure_cell
from benchmarks.pipeline_device import GraphDevice, HostDevice
from benchmarks.pipeline_heat_map import best_of, cells_of, draw
from benchmarks.pipeline_steps import Workload, compile_all
from benchmarks.report import Report, environment, table
from benchmarks.shapes import PIPELINE_SHAPES, TINY, Shape
from decode_service.pipeline.arrangements import Cell

NAME = "decode-pipeline"
# Where a pipeline can pay comes first: batches whose products are bound by compute, long contexts.
BATCHES = (512, 1024, 256, 2048, 64, 16)
CONTEXTS = (1024, 4096, 256)
LAYERS = 8
# Graphs that are kept at the same time, and the steps beside them that compute what is compared.
NUM_STEPS = 15
# CUDA's own, and the workspaces of products, one for each stream.
RESERVED_BYTES = 5 << 30
# From here on kernels are compiled by several processes.
MANY_BATCHES = 3


class Selection(NamedTuple):
    """Of the cells asked for."""

    to_measure: list[Cell]
    too_large: list[Cell]


def cell_bytes(shape: Shape, cell: Cell) -> int:
    """Device memory that measuring a cell takes: weights, KV, and what the steps write."""
    weights = 2 * (shape.layer_parameters + shape.head_parameters * (1 if shape.tied else 2))
    kv = cell.num_seqs * cell.context * shape.kv_bytes_per_token
    activations = 2 * (4 * shape.intermediate_size + 4 * shape.num_heads * shape.head_dim + 8 * shape.hidden_size)
    return weights + kv + NUM_STEPS * cell.num_seqs * (4 * shape.vocab_size + activations) + RESERVED_BYTES


def select(cells: Iterable[Cell], kept: Sequence[Mapping[str, Any]], shape: Shape, free_bytes: int) -> Selection:
    """What is left to measure of `cells`, in their order, by the rows that are kept and the memory that is free."""
    known = set(cells_of(kept))
    to_measure: list[Cell] = []
    too_large: list[Cell] = []
    for cell in cells:
        if cell_bytes(shape, cell) > free_bytes:
            too_large.append(cell)
        elif cell not in known:
            to_measure.append(cell)
    return Selection(to_measure, too_large)


def rows_of(model: str, shape: Shape, cell: Cell, measured: Sequence[Timed], commit: object) -> list[dict[str, Any]]:
    sequential_s, whole_s = measured[0].seconds, measured[0].whole_s
    return [
        {
            "model": model,
            "layers": shape.num_layers,
            "batch": cell.num_seqs,
            "context": cell.context,
            "what": one.what,
            "asked": one.asked,
            "pipelined": one.cut is not None,
            "ms": one.seconds * 1e3,
            "gain": sequential_s / one.seconds,
            "predicted_gain": one.predicted_s and sequential_s / one.predicted_s,
            "ideal_ms": one.ideal_s and one.ideal_s * 1e3,
            "over_ideal": one.ideal_s and one.seconds / one.ideal_s,
            "whole_model_gain": one.whole_s and whole_s and whole_s / one.whole_s,
            "same_bits": one.same_bits,
            "same_tokens": one.same_tokens,
            "commit": commit,
        }
        for one in measured
    ]


def named(cells: Iterable[Cell]) -> str:
    return ", ".join(f"{cell.num_seqs} x {cell.context}" for cell in cells)


def notes(
    rows: Sequence[Mapping[str, Any]], shape: Shape, layers: int, picture: str, left: Mapping[str, str]
) -> list[str]:
    """What a reader of the table has to know."""
    best = []
    for cell in cells_of(rows):
        row = best_of(rows, cell)
        columns = ("what", "ms", "gain", "predicted_gain", "over_ideal", "whole_model_gain")
        where = {"batch": cell.num_seqs, "context": cell.context, "sequential_ms": row["ms"] * row["gain"]}
        best.append(where | {key: row[key] for key in columns})
    result = [
        f"{shape.num_layers} of {layers} layers, with the embedding, the head and a draw, which weigh more than in the "
        "whole model; `whole_model_gain` estimates all layers from the times of stages. `gain`: the sequential step's "
        "time over this one's. `ideal_ms`: of the two lanes, the busier one's stages, each alone on its partition, "
        "max(T_attention, T_ffn), and the head. `same_bits`: the logits are those of the same micro-batches one after "
        "the other on the whole device. `same_tokens`: share of rows with the token of the whole batch's step, which "
        "rounds differently.",
        "",
        "The best pipelined step of each cell:",
        "",
        *table(best),
    ]
    if picture:
        result += ["", f"![Gain over the sequential step]({picture})"]
    for why, cells in left.items():
        result += ["", f"Not measured, {why} (batch x context): {cells}."]
    return result


def measure(options: argparse.Namespace) -> None:
    started_s = time.monotonic()
    full = PIPELINE_SHAPES[options.model]
    shape = replace(full, num_layers=min(options.layers, full.num_layers))
    name = NAME if shape.num_layers == LAYERS else f"{NAME}-{shape.num_layers}-layers"
    report = Report(name, "Pipelined decode steps against the sequential one", model=options.model)
    cells = [Cell(batch, context) for context in options.context for batch in options.batch]
    with GraphDevice() as device:
        again = set(cells) if options.fresh else set()
        report.rows = [row for row in report.kept_rows() if Cell(row["batch"], row["context"]) not in again]
        to_measure, too_large = select(cells, report.rows, shape, device.free_bytes())
        batches = sorted({cell.num_seqs for cell in to_measure}, reverse=True)
        print(f"  to measure: {named(to_measure) or 'nothing'}", flush=True)
        if len(batches) >= MANY_BATCHES:
            compile_all(full, batches, min(CONTEXTS))
            print(f"  kernels compiled after {time.monotonic() - started_s:.0f} s", flush=True)
        workload = Workload(shape, device.device) if to_measure else None
        longest_s, commit = 0.0, environment()["commit"]
        while to_measure and time.monotonic() - started_s + longest_s < options.seconds:
            assert workload is not None
            cell_started_s = time.monotonic()
            cell = to_measure.pop(0)
            try:
                measured = measure_cell(device, workload, cell, whole_layers=full.num_layers)
            except torch.OutOfMemoryError as error:
                print(f"  {named([cell])}: {error}", flush=True)
                too_large.append(cell)
                continue
            for row in rows_of(full.name, shape, cell, measured, commit):
                report.add(**row)
            longest_s = max(longest_s, time.monotonic() - cell_started_s)
            print(f"  {named([cell])} took {time.monotonic() - cell_started_s:.1f} s", flush=True)
            keep(report, shape, full.num_layers, too_large, to_measure)
    if report.rows:
        keep(report, shape, full.num_layers, too_large, to_measure)


def keep(report: Report, shape: Shape, layers: int, too_large: Sequence[Cell], not_yet: Sequence[Cell]) -> None:
    report.rows.sort(key=lambda row: (row["context"], row["batch"]))
    reasons = {"for lack of memory": named(too_large), "for lack of time": named(not_yet)}
    left = {why: cells for why, cells in reasons.items() if cells}
    picture = report.path("png")
    picture.parent.mkdir(exist_ok=True)
    try:
        draw(report.rows, picture, title=f"{shape.name}, {shape.num_layers} layers, {environment()['hardware']}")
        name = picture.name
    except ImportError:
        print("  no picture: matplotlib is not installed", flush=True)
        name = ""
    report.notes = notes(report.rows, shape, layers, name, left)
    report.save()


def measure_on_cpu(cell: Cell) -> list[dict[str, Any]]:
    """The tiny model's steps, each run; their times say nothing."""
    device = HostDevice(num_sms=48)
    measured = measure_cell(device, Workload(TINY, device.device), cell, whole_layers=2 * TINY.num_layers)
    return rows_of(TINY.name, TINY, cell, measured, "")


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=PIPELINE_SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--seconds", type=float, default=300, help="no cell is begun that would end later")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--cpu", action="store_true", help="only show that this program works")
    options = parser.parse_args(arguments)
    if options.model is None and not options.cpu:
        parser.error(f"name a model of {', '.join(PIPELINE_SHAPES)}, or --cpu")
    if options.layers < 3:
        parser.error("--layers: at least 3, a first one, a last one and one between")
    return options


@torch.inference_mode()
def run(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    if options.cpu:
        for row in measure_on_cpu(Cell(16, 64)):
            print("  " + "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        return
    measure(options)


if __name__ == "__main__":
    run(sys.argv[1:])
