"""On which SMs the kernels of a stream run: every program writes down its own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer, smid

# Warps of a program: at most two such programs fit on an SM, so that they spread.
NUM_WARPS = 32
# How long each stays there: longer than it takes to place a program on every other SM.
HOLD_NS = 20_000


def record_sm_ids(sm_id_P: Tensor) -> None:
    """Launches a program for each entry of `sm_id_P` (int32) on the current stream: its SM. Needs a GPU.

    Four programs for every SM of the device reach all that the stream may use.
    """
    _record_sm_ids[(len(sm_id_P),)](sm_id_P, HOLD_NS=HOLD_NS, num_warps=NUM_WARPS)


@triton.jit
def _record_sm_ids(sm_id_P, HOLD_NS: tl.constexpr):
    tl.store(sm_id_P + tl.program_id(0), smid())
    start = globaltimer()
    now = start
    while now - start < HOLD_NS:
        now = globaltimer()
