"""Where the workers of the tests compute: a CPU, or what PDSERVE_TEST_DEVICE names (`make test-gpu` sets it)."""

from __future__ import annotations

import os

import pytest
import torch

TEST_DEVICE = os.environ.get("PDSERVE_TEST_DEVICE", "cpu")
ON_GPU = TEST_DEVICE.startswith("cuda")
# In float32, so that exact tests stay exact; batch-invariant, since they compare batches; a share that leaves room for
# the other workers of a test.
WORKER_SETTINGS: dict[str, object] = {"device": TEST_DEVICE}
if ON_GPU:
    WORKER_SETTINGS |= {"dtype": "float32", "deterministic": True, "gpu_memory_fraction": 0.2}
    # Few graphs to capture, since every worker of every test captures its own.
    WORKER_SETTINGS |= {"max_num_seqs": 16, "max_batch_tokens": 256}


def needs_gpus(count: int = 1) -> list[pytest.MarkDecorator]:
    """Marks of tests that only CUDA devices can run."""
    reason = "needs a CUDA device" if count == 1 else f"needs {count} CUDA devices"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]
