"""The transports that a worker has, and the choice of the one that a pair takes. Opens nothing.

Prefill offers what it has, best first, each by name and place: `nccl@PLACE`. Decode takes the first that it has as well
and that can work between the two places, and answers with its label, which is what the serving path says:

    cuda-ipc    one GPU of one machine, two processes: copies within its memory
    nccl:p2p    two GPUs of one machine that reach each other directly
    nccl:host   two GPUs of one machine, through its memory
    nccl:net    two machines
    nccl        two GPUs of one machine, of which decode cannot see the other
    gloo        TCP; from and to pinned memory where a worker computes on a GPU
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from common.config import KV_TRANSPORTS
from common.settings import ConfigError
from common.transport.places import Place, place_of

log = logging.getLogger(__name__)

# As many as a proof has, which finds them again.
_PROBE_BYTES = 32


class Choice(NamedTuple):
    """What a pair uses, and why not what was offered before it."""

    label: str
    refused: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.label} (not {'; not '.join(self.refused)})" if self.refused else self.label


def name_of(offer: str) -> str:
    """The transport in an offer or a label."""
    return offer.partition("@")[0].partition(":")[0]


class Transports:
    """Those of one worker, best first."""

    def __init__(self, names: Sequence[str], device: torch.device, place: Place) -> None:
        self.names = tuple(names)
        # Where the worker computes.
        self.device = device
        self.place = place

    @classmethod
    def of(cls, wanted: Sequence[str], device: torch.device) -> Transports:
        """Those among `wanted` (`kv_transports`) that a worker on `device` has.

        Raises:
            ConfigError: it has none of them; says why.
        """
        missing = {name: _why_missing(name, device) for name in wanted}
        names = [name for name in wanted if not missing[name]]
        reasons = [f"{name}: {reason}" for name, reason in missing.items() if reason]
        if not names:
            raise ConfigError(f"kv_transports={list(wanted)}: none can be used: {'; '.join(reasons)}")
        if reasons and device.type == "cuda":
            log.warning("KV transports: %s; without %s", ", ".join(names), "; ".join(reasons))
        return cls(names, device, place_of(device))

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(name if name == "gloo" else f"{name}@{self.place}" for name in self.names)

    def choose(self, offers: Sequence[str]) -> Choice | None:
        """Decode's choice among prefill's offers; None when they have nothing in common."""
        refused: list[str] = []
        for offer in offers:
            name = name_of(offer)
            reason = self._why_not(name, Place.parse(offer.partition("@")[2]))
            if not reason:
                return Choice(self._label(name, offer), tuple(refused))
            refused.append(f"{name}: {reason}")
        return None

    def _why_not(self, name: str, peer: Place | None) -> str:
        if name not in self.names:
            return "decode does not have it" if name in KV_TRANSPORTS else "decode does not know it"
        if name == "gloo":
            return ""
        if peer is None:
            return "prefill names its place in another way"
        if self.place.is_process_of(peer):
            return "the workers are one process"
        if name == "cuda-ipc":
            if self.place.gpu != peer.gpu:
                return "the workers are on different GPUs"
            return "" if self.place.namespaces == peer.namespaces else "the workers are in different containers"
        if (self.place.gpu, self.place.nccl_machine) == (peer.gpu, peer.nccl_machine):
            return "the workers are on one GPU"
        return ""

    def _label(self, name: str, offer: str) -> str:
        peer = Place.parse(offer.partition("@")[2])
        if name != "nccl" or peer is None:
            return name
        if self.place.nccl_machine != peer.nccl_machine:
            return "nccl:net"
        return {True: "nccl:p2p", False: "nccl:host", None: "nccl"}[_reaches(self.device, peer.gpu)]


def _why_missing(name: str, device: torch.device) -> str:
    if name == "gloo":
        return ""
    if device.type != "cuda":
        return "the worker computes on a CPU"
    if name == "nccl":
        return "" if dist.is_nccl_available() else "this PyTorch is built without NCCL"
    try:
        from common.transport.ipc_memory import export, give_back

        give_back(export(_PROBE_BYTES, device))
    except ImportError:
        return "cuda-python is not installed"
    except RuntimeError as error:
        return str(error)
    return ""


def _reaches(device: torch.device, gpu: str) -> bool | None:
    """Whether a GPU of this machine can be accessed directly; None where it cannot be seen."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == gpu:
            return torch.cuda.can_device_access_peer(device, index)
    return None
