"""What mode `auto` of the attention/FFN pipeline costs or brings over sequential steps, and what profiling costs.

    python -m benchmarks.pipeline_auto MODEL [--batch 64 512] [--context 1024] [--static attention-core 64 68]

One engine with all layers of a model, its calibration made anew and thrown away. The ways to run a step take turns, in
windows of 32 steps there and back again, so that what drifts (clocks, contexts that grow from half of what is asked to
all of it) does so for all alike. `auto` comes first to a choice, keeps what it learns, and pays for its probes. With
`--cpu` the tiny model runs once; that shows whether this program works, and nothing is kept.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.offline import OfflineEngine
from benchmarks.pipeline_ways import AUTO, SEQUENTIAL, WINDOW, Batch, Way
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, TINY
from common.engine.loop import on_device
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.decisions import Mode, Reason
from decode_service.pipeline.order import Cut
from decode_service.pipeline.scheduler import PipelineStats

BATCHES, CONTEXTS = (64, 256, 512), (1024,)
# A choice that has lasted for so many steps is taken for settled.
SETTLED = 512
UNDECIDED = {Reason.NOT_CALIBRATED.name, Reason.MEASURING.name, "NO_STEPS"}
WAYS = (SEQUENTIAL, AUTO, Way(Mode.AUTO, True), Way(Mode.DISABLED, True))


def calibrate(engine: OfflineEngine) -> float:
    """To the end; seconds that it took.

    Raises:
        SystemExit: a stage could not be measured.
    """
    started_s, pipeline = time.monotonic(), engine.engine.pipeline
    with on_device(engine.parts.device):
        while pipeline.stats().fallback_reason == Reason.NOT_CALIBRATED.name:
            pipeline.idle(1.0)
    stats = pipeline.stats()
    if stats.fallback_reason == "CALIBRATION_FAILED":
        raise SystemExit(f"the calibration failed: {stats.fallback_detail}")
    return time.monotonic() - started_s


def chosen(stats: PipelineStats) -> str:
    return f"{stats.cut} {stats.attention_sm}:{stats.ffn_sm}" if stats.active else "sequential"


def settle(batch: Batch, most_steps: int) -> int | None:
    """Steps until `auto` had made a choice and kept it for a while; None if so many were not enough."""
    last, num_kept = "", 0

    def is_settled(stats: PipelineStats) -> bool:
        nonlocal last, num_kept
        now = stats.fallback_reason or chosen(stats)
        last, num_kept = now, num_kept + WINDOW if now == last and now not in UNDECIDED else 0
        return num_kept >= SETTLED

    return batch.run_until(AUTO, is_settled, most_steps)


def is_ready(batch: Batch, way: Way, most_steps: int) -> bool:
    """Whether its steps run as asked, after so many at most: profiled, or static."""

    def count() -> int:
        stats = batch.stats()
        return stats.num_profiled_steps if way.profiling else stats.num_pipelined_steps

    if not way.profiling and way.mode is not Mode.STATIC:
        return True
    # With steps of the way before, which are in flight.
    batch.run(way, WINDOW)
    before = count()
    return batch.run_until(way, lambda _: count() > before, most_steps) is not None


def measure(
    engine: OfflineEngine, cell: Cell, *, static: Mapping[str, Any], num_turns: int, most_steps: int
) -> dict[str, Any]:
    """The row of a cell. Each way's time is the median over the turns; None where steps did not run as asked."""
    batch = Batch(engine, cell, static)
    ways = [*WAYS, Way(Mode.STATIC)] if static else list(WAYS)
    with on_device(engine.parts.device):
        settled_steps = settle(batch, most_steps)
        # Graphs of other ways are captured in slices, when they are asked for.
        ready = {way: is_ready(batch, way, most_steps) for way in reversed(ways)}
        turns_s: dict[Way, list[float]] = {way: [] for way in ways}
        choices: list[tuple[str, str]] = []
        for _ in range(num_turns):
            windows_s: dict[Way, list[float]] = {way: [] for way in ways}
            for way in [*ways, *reversed(ways)]:
                windows_s[way].append(batch.run(way, WINDOW))
                if way == AUTO:
                    choices.append((chosen(batch.stats()), batch.stats().fallback_reason))
            for way in ways:
                turns_s[way].append(statistics.fmean(windows_s[way]))
        batch.close()
    ms = {way: statistics.median(turns_s[way]) * 1e3 if ready[way] else None for way in ways}
    sequential_ms, auto_ms, auto_profiled_ms, profiled_ms = (ms[way] for way in WAYS)
    assert sequential_ms is not None, "it has its graph from the start"
    assert auto_ms is not None, "it runs as it chooses"
    row = {
        "model": engine.shape.name,
        "batch": cell.num_seqs,
        "context": cell.context,
        "sequential_ms": sequential_ms,
        "auto_ms": auto_ms,
        "auto_over_sequential": sequential_ms / auto_ms,
        "of_all_windows": sum(turns_s[SEQUENTIAL]) / sum(turns_s[AUTO]),
        "chosen": ", then ".join(choice for choice, _ in itertools.groupby(choice for choice, _ in choices)),
        "reason": choices[-1][1],
        "settled_steps": settled_steps,
        "profiled_ms": auto_profiled_ms,
        "profiling_cost": auto_profiled_ms and auto_profiled_ms / auto_ms - 1,
        "sequential_profiling_cost": profiled_ms and profiled_ms / sequential_ms - 1,
    }
    if static:
        static_ms = ms[ways[-1]]
        row["static_gain"] = static_ms and sequential_ms / static_ms
    return row


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--turns", type=int, default=8, help="of all ways, there and back")
    parser.add_argument("--most-steps", type=int, default=4096, help="until auto has settled; as many for each graph")
    parser.add_argument("--static", nargs=3, metavar=("CUT", "ATTENTION_SM", "FFN_SM"), help="measure it as well")
    parser.add_argument("--cpu", action="store_true", help="only show that this program works")
    options = parser.parse_args(arguments)
    if options.model is None and not options.cpu:
        parser.error(f"name a model of {', '.join(SHAPES)}, or --cpu")
    if min(options.context) < 192:
        parser.error("--context: at least 192, so that a window fits into the second half")
    try:
        cut, attention_sm, ffn_sm = options.static or (Cut.LAYER, 0, 0)
        static = {"cut": Cut(cut), "attention_sm": int(attention_sm), "ffn_sm": int(ffn_sm)}
    except ValueError:
        parser.error(f"--static: a cut of {', '.join(one.value for one in Cut)}, and two numbers of SMs")
    options.static = static if options.static else {}
    return options


def run(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    cells = [Cell(4, 192)] if options.cpu else [Cell(*one) for one in itertools.product(options.batch, options.context)]
    device: dict[str, Any] = (
        {"device": "cpu", "num_blocks": 128} if options.cpu else {"device": "cuda", "gpu_memory_fraction": 0.92}
    )
    report = Report("pipeline-auto", "Mode auto of the attention/FFN pipeline, all layers", model=options.model or "")
    with tempfile.TemporaryDirectory() as folder:
        engine = OfflineEngine(
            TINY if options.cpu else SHAPES[options.model],
            decode_pipeline="auto",
            decode_pipeline_folder=folder,
            max_num_seqs=max(cell.num_seqs for cell in cells),
            max_batch_tokens=16384,
            **device,
        )
        calibration_s = calibrate(engine)
    print(f"  ready after {engine.ready_s:.1f} s, calibrated after another {calibration_s:.1f} s", flush=True)
    for cell in cells:
        if not engine.holds(cell.num_seqs, cell.context):
            report.notes.append(f"- {cell.num_seqs} x {cell.context}: not run, its KV does not fit.")
            continue
        started_s = time.monotonic()
        row = measure(engine, cell, static=options.static, num_turns=options.turns, most_steps=options.most_steps)
        report.add(**row, calibration_s=calibration_s)
        print(f"  {cell.num_seqs} x {cell.context} took {time.monotonic() - started_s:.0f} s", flush=True)
        if not options.cpu:
            report.save()


if __name__ == "__main__":
    run(sys.argv[1:])
