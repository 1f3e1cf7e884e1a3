"""One decode step against the batch: prompts of 512 tokens, 128 tokens out, greedy, beside the floor and vLLM."""

from __future__ import annotations

import itertools
import random
import statistics
import sys

from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, one_model

PROMPT, OUTPUT = 512, 128
BATCHES = (1, 8, 32, 128, 256, 512, 1024)
# Milliseconds of vLLM 0.26.0 on an NVIDIA H200 (CUDA graphs, async scheduling, FlashAttention-3), and what to reach.
VLLM_MS = {
    "0.6B": (1.67, 1.75, 2.18, 4.24, 6.67, 12.1, 22.9),
    "8B": (5.15, 5.61, 6.02, 8.92, 14.4, 27.1, 52.9),
}
TARGET_MS = {"0.6B": (0.8, 0.9, 1.3, 3.1, 5.6, 10.5, 20.0), "8B": (4.4, 4.7, 5.2, 8.0, 12.5, 23.5, 46.0)}


def step_ms(engine: OfflineEngine, batch: int) -> float:
    """Median time between two arrivals of a token for every sequence."""
    generator = random.Random(batch)
    vocab_size = engine.shape.vocab_size
    engine.run([(random_prompt(generator, PROMPT, vocab_size), OUTPUT) for _ in range(batch)])
    full = [moment for moment, num_tokens in engine.arrivals if num_tokens == batch]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(full)) * 1e3


def run() -> None:
    model = one_model(sys.argv[1:])
    shape = SHAPES[model]
    report = Report("decode-step", "Decode step against batch, context 512 to 640", model=model)
    engine = OfflineEngine(
        shape, device="cuda", max_num_seqs=max(BATCHES), max_batch_tokens=16384, gpu_memory_fraction=0.94
    )
    report.notes.append(f"Ready after {engine.ready_s:.1f} s.")
    print(f"  ready after {engine.ready_s:.1f} s", flush=True)
    for index, batch in enumerate(BATCHES):
        floor_ms = shape.decode_floor_s(batch, PROMPT + OUTPUT // 2) * 1e3
        ours_ms = step_ms(engine, batch)
        report.add(
            model=shape.name,
            batch=batch,
            step_ms=ours_ms,
            target_ms=TARGET_MS[model][index],
            vllm_ms=VLLM_MS[model][index],
            floor_ms=floor_ms,
            floor_share=floor_ms / ours_ms,
        )
    report.save()


if __name__ == "__main__":
    run()
