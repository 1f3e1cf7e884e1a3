"""Device memory that other processes of the machine may read: exporting it, and opening what others export.

A handle names a whole allocation. Exported memory is never freed, only used again: whoever has it open may be in the
middle of a copy, and what it would then read from is undefined.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from cuda.bindings import runtime
from torch import Tensor

HANDLE_BYTES = 64


class Export(NamedTuple):
    """An allocation, and how another process finds it."""

    buffer: Tensor
    handle: bytes


_lock = threading.Lock()
_idle: defaultdict[tuple[torch.device, int], list[Export]] = defaultdict(list)


def export(num_bytes: int, device: torch.device) -> Export:
    """`num_bytes` of uint8 with arbitrary content, until `give_back`."""
    with _lock:
        idle = _idle[device, num_bytes]
        if idle:
            return idle.pop()
    _call(runtime.cudaSetDevice, device.index)
    pointer = _call(runtime.cudaMalloc, num_bytes)
    handle = _call(runtime.cudaIpcGetMemHandle, pointer)
    return Export(_tensor(pointer, num_bytes, device), ctypes.string_at(handle.getPtr(), HANDLE_BYTES))


def give_back(unused: Export) -> None:
    with _lock:
        _idle[unused.buffer.device, unused.buffer.numel()].append(unused)


class Opened:
    """What another process exported. Nothing may read `buffer` after `close`."""

    def __init__(self, handle: bytes, num_bytes: int, device: torch.device) -> None:
        named = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(named.getPtr(), handle, HANDLE_BYTES)
        _call(runtime.cudaSetDevice, device.index)
        self._device = device
        self._pointer = _call(runtime.cudaIpcOpenMemHandle, named, runtime.cudaIpcMemLazyEnablePeerAccess)
        self.buffer = _tensor(self._pointer, num_bytes, device)

    def close(self) -> None:
        del self.buffer
        _call(runtime.cudaSetDevice, self._device.index)
        _call(runtime.cudaIpcCloseMemHandle, self._pointer)


def _call(function: Any, *arguments: Any) -> Any:
    """Its result. Raises RuntimeError, naming the call, when it fails."""
    status, *results = function(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        name = runtime.cudaGetErrorName(status)[1]
        raise RuntimeError(f"{function.__name__}: {name.decode()}")
    return results[0] if results else None


def _tensor(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    # Written in threads with and without inference mode, so it must not be an inference tensor.
    with torch.inference_mode(False):
        return torch.as_tensor(_Allocation(int(pointer), num_bytes), device=device)


class _Allocation:
    """See https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }
