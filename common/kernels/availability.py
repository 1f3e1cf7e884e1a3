"""Why a library's kernels cannot be used here: reasons for people, empty when there are none."""

from __future__ import annotations

import functools
import importlib

import torch


@functools.cache
def why_not_imported(package: str, module: str) -> str:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{package} is not installed"
        return f"{package} cannot be imported: {error}"
    except (ImportError, OSError) as error:
        # Built for another PyTorch, or its own libraries are missing.
        return f"{package} cannot be imported: {error}"
    return ""


def why_not_half(dtype: torch.dtype, device: torch.device) -> str:
    """For kernels on 16-bit tensor cores of Ampere and later."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {str(dtype).removeprefix('torch.')}, kernels exist for bfloat16 and float16"
    return ""
