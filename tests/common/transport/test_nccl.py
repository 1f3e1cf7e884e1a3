"""Two processes over NCCL: on one GPU, where it believes in two machines, and on two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.common.transport.on_gpu import survive_a_fault
from tests.support.device import needs_gpus

pytestmark = needs_gpus()
two_gpus = needs_gpus(2)[-1]

FAULTS = [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 5.0)]
HERE = "decode"


@pytest.fixture(autouse=True, scope="module")
def _this_machine() -> Iterator[None]:
    """NCCL reads it when it is first used, and keeps it as long as this process lives."""
    os.environ.update(NCCL_HOSTID=HERE, NCCL_IB_DISABLE="1")
    yield
    for name in ("NCCL_HOSTID", "NCCL_IB_DISABLE"):
        del os.environ[name]


@pytest.mark.parametrize(("fault", "within_s"), FAULTS)
async def test_kv_arrives_over_sockets_and_decode_survives_its_prefill_worker(serve, spawn, fault, within_s) -> None:
    environment = {"NCCL_HOSTID": "prefill"}
    await survive_a_fault(serve, spawn, fault, "nccl", within_s=within_s, label="nccl:net", environment=environment)


@two_gpus
@pytest.mark.parametrize(("fault", "within_s"), FAULTS)
async def test_kv_arrives_between_two_gpus_and_decode_survives_its_prefill_worker(
    serve, spawn, fault, within_s
) -> None:
    direct = torch.cuda.can_device_access_peer(1, 0)
    await survive_a_fault(
        serve,
        spawn,
        fault,
        "nccl",
        within_s=within_s,
        label="nccl:p2p" if direct else "nccl:host",
        prefill_device="cuda:0",
        decode_device="cuda:1",
    )
