"""nano-vllm's benchmark: 256 requests of 100 to 1,024 tokens in and out, uniform, greedy, all at once, one engine."""

from __future__ import annotations

import random

from benchmarks.offline import OfflineEngine, random_prompt
from benchmarks.report import Report
from benchmarks.shapes import SHAPES

NUM_REQUESTS = 256
# Tokens per second of vLLM 0.26.0 on an NVIDIA H200, and what to reach.
VLLM_RATE, TARGET_RATE = 23_400, 27_000


def run() -> None:
    engine = OfflineEngine(
        SHAPES["0.6B"], device="cuda", max_num_seqs=NUM_REQUESTS, max_batch_tokens=16384, gpu_memory_fraction=0.9
    )
    generator = random.Random(0)
    requests = [
        (random_prompt(generator, generator.randint(100, 1024), 10_000), generator.randint(100, 1024))
        for _ in range(NUM_REQUESTS)
    ]
    engine.run(requests[:16])
    report = Report("mixed-workload", f"{NUM_REQUESTS} requests, 100 to 1,024 tokens in and out, greedy")
    num_tokens = sum(num for _, num in requests)
    elapsed = engine.run(requests)
    report.add(
        model=engine.shape.name,
        tokens_per_s=num_tokens / elapsed,
        target=TARGET_RATE,
        vllm=VLLM_RATE,
        seconds=elapsed,
        output_tokens=num_tokens,
        prompt_tokens=sum(len(prompt) for prompt, _ in requests),
        until_all_first_tokens_s=max(engine.first_tokens_s),
    )
    report.save()


if __name__ == "__main__":
    run()
