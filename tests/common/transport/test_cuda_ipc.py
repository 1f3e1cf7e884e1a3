"""Two processes on one GPU, over memory that one exports to the other."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.common.transport.on_gpu import survive_a_fault
from tests.support.device import needs_gpus

pytestmark = needs_gpus()


@pytest.mark.parametrize(("fault", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 5.0)])
async def test_kv_arrives_and_decode_survives_its_prefill_worker(serve, spawn, fault, within_s) -> None:
    await survive_a_fault(serve, spawn, fault, "cuda-ipc", within_s=within_s)


def test_exported_memory_is_used_again_and_never_freed() -> None:
    from common.transport.ipc_memory import HANDLE_BYTES, export, give_back

    device = torch.device("cuda", 0)
    first = export(1 << 20, device)
    first.buffer.fill_(3)
    assert (first.buffer.device, first.buffer.dtype, first.buffer.numel()) == (device, torch.uint8, 1 << 20)
    assert len(first.handle) == HANDLE_BYTES
    address = first.buffer.data_ptr()
    give_back(first)
    second, third = export(1 << 20, device), export(1 << 20, device)
    assert second.buffer.data_ptr() == address
    assert third.handle != second.handle
    for unused in (second, third):
        give_back(unused)
