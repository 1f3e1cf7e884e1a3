"""Weights brought into the L2 cache by a side of the GPU that is idle: an idea for small batches."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.pipeline_steps import Workload
from decode_service.pipeline.order import Lane, Stage

LINE_BYTES = 128
LINES_AT_ONCE = 1024


@triton.jit
def _ask_for(weights, num_lines, LINES: tl.constexpr):
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(weights + tl.minimum(lines, num_lines - 1) * 128).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


class Prefetching:
    """Around each attention stage of a sequential step: the first bytes of the FFN's weights, on another stream."""

    def __init__(self, workload: Workload, side: torch.cuda.Stream, num_bytes: int) -> None:
        self._layers = workload.model.model.layers
        self._side = side
        self._num_bytes = num_bytes

    @contextlib.contextmanager
    def around(self, stage: Stage) -> Generator[None, None, None]:
        if stage.lane is not Lane.ATTENTION:
            yield
            return
        caller = torch.cuda.current_stream()
        self._side.wait_stream(caller)
        with torch.cuda.stream(self._side):
            self._bring(self._layers[stage.layer].gate_up_weight)
        yield
        caller.wait_stream(self._side)

    def _bring(self, weight: Tensor) -> None:
        num_lines = min(self._num_bytes, weight.nbytes) // LINE_BYTES
        _ask_for[(triton.cdiv(num_lines, LINES_AT_ONCE),)](weight.view(torch.uint8), num_lines, LINES=LINES_AT_ONCE)
