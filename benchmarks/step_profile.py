"""Where a decode step's time goes: its kernels, from a profile of the running engine, and the gaps between them.

A row's floor is what its bytes take at the memory's rate; of products of many tokens, what their operations take.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import NamedTuple

import torch

from benchmarks.offline import OfflineEngine, make_sequence, random_prompt
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, one_model
from common.engine.loop import on_device

BATCHES = (1, 8, 32, 64, 128, 256, 512)
PROMPT, STEPS = 512, 20
MOST_ROWS = 12


class Kernel(NamedTuple):
    name: str
    start_us: float
    end_us: float


def steady_kernels(engine: OfflineEngine, batch: int) -> list[Kernel]:
    """Every kernel and copy of some steady steps of the running engine, in the order of their starts."""
    generator = random.Random(batch)
    sequences = [
        make_sequence(random_prompt(generator, PROMPT, engine.shape.vocab_size), 8 * STEPS) for _ in range(batch)
    ]
    with on_device(engine.parts.device):
        for sequence in sequences:
            engine.engine.open(sequence, local=True)
        while min(sequence.num_output_tokens for sequence in sequences) < STEPS:
            engine.turn()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            first = sequences[0].num_output_tokens
            while sequences[0].num_output_tokens < first + STEPS:
                engine.turn()
        for sequence in sequences:
            engine.engine.close(sequence)
        while engine.engine.num_in_flight:
            engine.turn()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def idle_share(kernels: list[Kernel]) -> float:
    """Of the time from the first start to the last end, what no kernel covers."""
    covered, reached = 0.0, kernels[0].start_us
    for kernel in kernels:
        covered += max(0.0, kernel.end_us - max(kernel.start_us, reached))
        reached = max(reached, kernel.end_us)
    return 1 - covered / (reached - kernels[0].start_us)


def run() -> None:
    model = one_model(sys.argv[1:])
    shape = SHAPES[model]
    report = Report("step-profile", "Kernels of a decode step, context 512 to 672", model=model)
    engine = OfflineEngine(
        shape, device="cuda", max_num_seqs=max(BATCHES), max_batch_tokens=16384, gpu_memory_fraction=0.94
    )
    for batch in BATCHES:
        kernels = steady_kernels(engine, batch)
        step_us = (kernels[-1].end_us - kernels[0].start_us) / STEPS
        total: Counter[str] = Counter()
        for kernel in kernels:
            total[kernel.name] += kernel.end_us - kernel.start_us  # type: ignore[assignment]
        report.add(
            model=shape.name,
            batch=batch,
            kernel="step, and the share of it that is idle",
            us=step_us,
            share=idle_share(kernels),
            launches=len(kernels) / STEPS,
            floor_us=shape.decode_floor_s(batch, PROMPT + 3 * STEPS) * 1e6,
        )
        for kernel_name, us in total.most_common(MOST_ROWS):
            launches = sum(kernel.name == kernel_name for kernel in kernels) / STEPS
            report.add(
                model=shape.name,
                batch=batch,
                kernel=kernel_name[:70],
                us=us / STEPS,
                share=us / STEPS / step_us,
                launches=launches,
            )
    report.save()


if __name__ == "__main__":
    run()
