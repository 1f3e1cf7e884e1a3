"""What `deterministic` costs: the decode step of Qwen3-0.6B with batch-invariant kernels and without."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.decode_step import OUTPUT, PROMPT, step_ms
from benchmarks.offline import OfflineEngine
from benchmarks.processes import in_new_process
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, Shape

BATCHES = (1, 32, 128, 512)


def steps_ms(shape: Shape, device: str, batches: Sequence[int], *, deterministic: bool) -> dict[int, float]:
    """By batch, those whose KV fits."""
    engine = OfflineEngine(
        shape,
        device=device,
        deterministic=deterministic,
        max_num_seqs=max(batches),
        # Batch-invariant prompts are slow, and the last has to begin before the first has ended.
        max_batch_tokens=8 * max(PROMPT, max(batches)),
        gpu_memory_fraction=0.9,
    )
    print(f"  deterministic={deterministic}: ready after {engine.ready_s:.1f} s", flush=True)
    return {batch: step_ms(engine, batch) for batch in batches if engine.holds(batch, PROMPT + OUTPUT)}


def run() -> None:
    shape = SHAPES["0.6B"]
    report = Report("determinism-cost", "Decode step with batch-invariant kernels and without, context 512 to 640")
    plain = in_new_process(steps_ms, shape, "cuda", BATCHES, deterministic=False)
    invariant = in_new_process(steps_ms, shape, "cuda", BATCHES, deterministic=True)
    for batch in BATCHES:
        if batch not in plain or batch not in invariant:
            report.notes.append(f"- batch {batch}: not run, its KV does not fit.")
            continue
        report.add(
            model=shape.name,
            batch=batch,
            step_ms=plain[batch],
            deterministic_ms=invariant[batch],
            ratio=invariant[batch] / plain[batch],
        )
    report.save()


if __name__ == "__main__":
    run()
