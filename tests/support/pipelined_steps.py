"""A program of its own for tools that watch a whole process: some pipelined decode steps on a GPU, without graphs.

TORCH_CUDA_SANITIZER=1 python -m tests.support.pipelined_steps layer
compute-sanitizer python -m tests.support.pipelined_steps attention-core
"""

from __future__ import annotations

import sys

from tests.support.engine import HandTurnedEngine
from tests.support.models import make_request

NUM_STEPS = 12


def run(cut: str) -> None:
    engine = HandTurnedEngine(
        device="cuda:0",
        dtype="bfloat16",
        gpu_memory_fraction=0.2,
        num_blocks=200,
        enforce_eager=True,
        decode_pipeline="static",
        decode_pipeline_cut=cut,
        decode_attention_sm=64,
        decode_ffn_sm=64,
    )
    for index in range(12):
        engine.open(make_request(range(index, index + 40), max_tokens=100), local=True)
    while engine.pipeline.stats().num_pipelined_steps < NUM_STEPS:
        engine.turn()
    print(f"{NUM_STEPS} pipelined steps in {cut}")


if __name__ == "__main__":
    run(*sys.argv[1:])
