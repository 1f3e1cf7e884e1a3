"""What every kernel here needs to know about how it is launched: compiled or interpreted, and after whom.

Programmatic dependent launch (PDL): a kernel may start while the one before it in the stream still runs. It then loads
what no kernel writes (weights), waits once with `wait_for_inputs`, and only then touches what others wrote or read.
Two kernels load more before they wait: what was written before a whole step began, or before a kernel that has ended.
Every kernel of this package that is launched with `launch_pdl` does so; after it, results are as without PDL.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Kernels run on the CPU, one program after the other, in numpy. Decided when triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Hopper and later."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Everything that earlier kernels wrote is visible from here on."""
    if PDL:
        gdc_wait()


@triton.jit
def allow_next(PDL: tl.constexpr):
    """The next kernel may start as soon as every program has come here; it still waits for this one's end."""
    if PDL:
        gdc_launch_dependents()
