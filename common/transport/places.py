"""Where a worker computes, as far as the choice of a transport asks. Travels in the names that a hello offers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Two workers compare these parts; beyond that they mean nothing. Letters, digits and dashes."""

    # UUID of the device.
    gpu: str
    # The machine, and what NCCL takes for one: each worker's own name for it where NCCL_HOSTID is set.
    machine: str
    nccl_machine: str
    # What processes share that can open one another's memory.
    namespaces: str
    process: str

    def __str__(self) -> str:
        return "/".join(self)

    def is_process_of(self, other: Place) -> bool:
        """Both are one process."""
        return self[1:] == other[1:]

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """None for what another version writes."""
        parts = text.split("/")
        return cls(*parts) if len(parts) == len(cls._fields) else None


def place_of(device: torch.device) -> Place:
    """Of this process, computing on `device`. On a CPU nobody asks."""
    if device.type == "cpu":
        return Place("", "", "", "", "")
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    named = os.environ.get("NCCL_HOSTID")
    nccl_machine = hashlib.sha256(named.encode()).hexdigest()[:16] if named else machine
    namespaces = "-".join(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("ipc", "pid"))
    return Place(gpu, machine, nccl_machine, namespaces, str(os.getpid()))
