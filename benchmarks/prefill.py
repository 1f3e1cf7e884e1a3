"""Prefill in one engine: tokens a second of a full batch, and one prompt's time to its first token."""

from __future__ import annotations

import random
import statistics
import sys

from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, one_model

REPEATS = 5
# vLLM 0.26.0 on an NVIDIA H200 and what to reach: tokens per second of 16 prompts of 2,048 tokens, and milliseconds
# to the first token of one prompt of each length.
RATES = {"0.6B": (390_000, 400_000), "8B": (42_700, 43_000)}
FIRST_TOKEN_MS = {
    "0.6B": {512: (11.5, 4), 2048: (21.4, 8), 8192: (34.2, 30)},
    "8B": {512: (17.2, 14), 2048: (48.9, 47), 8192: (211, 205)},
}


def last_first_token_s(engine: OfflineEngine, num_prompts: int, length: int) -> float:
    """Median time until every prompt has its first token."""
    generator = random.Random(length)
    prompts = [random_prompt(generator, length, engine.shape.vocab_size) for _ in range(num_prompts)]
    times = []
    for _ in range(REPEATS):
        engine.run([(prompt, 1) for prompt in prompts])
        times.append(max(engine.first_tokens_s))
    return statistics.median(times)


def run() -> None:
    model = one_model(sys.argv[1:])
    shape = SHAPES[model]
    report = Report("prefill", "Prefill: a batch of prompts, and one prompt alone", model=model)
    engine = OfflineEngine(shape, device="cuda", max_num_seqs=16, max_batch_tokens=16384, gpu_memory_fraction=0.45)
    vllm, target = RATES[model]
    rate, floor_s = 16 * 2048 / last_first_token_s(engine, 16, 2048), shape.prefill_floor_s(16, 2048)
    report.add(
        model=shape.name, what="16 x 2,048 tokens/s", ours=rate, target=target, vllm=vllm, floor=16 * 2048 / floor_s
    )
    for length, (vllm_ms, target_ms) in FIRST_TOKEN_MS[model].items():
        ours_ms, floor_ms = last_first_token_s(engine, 1, length) * 1e3, shape.prefill_floor_s(1, length) * 1e3
        what = f"first token of {length:,}, ms"
        report.add(model=shape.name, what=what, ours=ours_ms, target=target_ms, vllm=vllm_ms, floor=floor_ms)
    report.save()


if __name__ == "__main__":
    run()
