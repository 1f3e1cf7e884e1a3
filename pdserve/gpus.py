"""How many GPUs a process of this machine can use, as the CUDA driver says; without torch."""

from __future__ import annotations

import subprocess
import sys

from common.settings import ConfigError

TIMEOUT_S = 60.0
# CUDA_ERROR_NO_DEVICE: a driver, and nothing for it to drive.
_COUNT = """
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(0)
    raise SystemExit
status, count = cuda.cuInit(0), ctypes.c_int(0)
if status not in (0, 100):
    raise SystemExit(f"cuInit returned {status}")
if status == 0:
    cuda.cuDeviceGetCount(ctypes.byref(count))
print(count.value)
"""


def num_gpus() -> int:
    """Of those that CUDA_VISIBLE_DEVICES leaves, if it is set.

    Raises ConfigError when the driver is there and does not work.
    """
    # In a process of its own: after cuInit the forks of this one could not use CUDA.
    try:
        asked = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise _broken(f"it did not answer within {TIMEOUT_S:g} s") from None
    if asked.returncode != 0:
        raise _broken(asked.stderr.strip().rpartition("\n")[2] or f"it died with {asked.returncode}")
    return int(asked.stdout)


def _broken(trouble: str) -> ConfigError:
    return ConfigError(
        f"the CUDA driver does not work: {trouble}; `pdserve doctor` says more, device='cpu' does without"
    )
