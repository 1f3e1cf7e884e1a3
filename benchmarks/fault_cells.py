"""The cells of the fault matrix: which faults there are, and how each is dealt and healed."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.control_link import Fault
from tests.support.processes import Service

# How long a detection may take.
DETECT_MS = {"kill": 200, "restart": None, "reset": None, "stop": 2500, "cut": 2500}
PHASES = ("queued", "prefilling", "decoding", "draining")


@dataclass(frozen=True)
class Cell:
    fault: str
    phase: str
    role: str


def cells(*, has_network: bool) -> list[Cell]:
    """Every cell that can be run here."""
    faults = ["kill", "restart", "stop", *(("cut", "reset") if has_network else ())]
    ours = itertools.product(faults, PHASES, ("prefill", "decode", "router"))
    clients = itertools.product(("leave", "slow"), PHASES, ("client",))
    messages = [(fault.value, "prefilling", "pair") for fault in Fault]
    return [Cell(*one) for one in (*ours, *clients, *messages)]


def blows(fault: str, victim: Service) -> tuple[Callable[[], None], Callable[[], None]]:
    """How a process is struck, and how healed."""
    match fault:
        case "kill":
            return victim.kill, victim.start
        case "restart":
            return lambda: (victim.kill(), victim.start())[0], lambda: None
        case "stop":
            return (
                lambda: os.kill(victim.process.pid, signal.SIGSTOP),
                lambda: os.kill(victim.process.pid, signal.SIGCONT),
            )
    assert victim.host is not None, "faults of the network need one"
    return (victim.host.cut, victim.host.mend) if fault == "cut" else (victim.host.reset, lambda: None)
