"""How the two sides of a pair come to a process group that both have proven themselves on.

They meet over gloo, whatever they will use: the hello needs one rendezvous, and what is told there about another
transport (NCCL's id, handles of memory) is told to somebody who is known.
"""

from __future__ import annotations

import asyncio
import threading

from common.transport.authentication import Credentials, authenticate
from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import PairGroup
from common.transport.transports import Transports, name_of


class Meeting:
    """One side. Begins when it is made."""

    def __init__(self, rank: int, transports: Transports, *, interface: str, timeout_s: float) -> None:
        self._rank = rank
        self._device = transports.device
        self._interface = interface
        self._timeout_s = timeout_s
        self._group: PairGroup | None = None
        pinned = self._device.type == "cuda"
        self._joining = GlooJoining(rank, interface=interface, timeout_s=timeout_s, pinned=pinned)

    async def rendezvous(self) -> bytes:
        """What the peer has to be told."""
        return await self._joining.rendezvous()

    async def connect(self, peer_rendezvous: bytes, label: str, credentials: Credentials) -> PairGroup:
        """The group, for the transport that decode chose.

        Raises:
            PairBroken: the peer could not be reached, or is somebody else.
        """
        gloo = await self._joining.connect(peer_rendezvous)
        proven = asyncio.ensure_future(asyncio.to_thread(self._prove, gloo, label, credentials))
        del gloo
        try:
            self._group = await asyncio.shield(proven)
        except asyncio.CancelledError:
            proven.add_done_callback(_dispose_of)
            raise
        return self._group

    def cancel(self) -> None:
        """The group is not wanted any more, whether it has been made or not."""
        self._joining.cancel()
        if self._group is not None:
            _dispose(self._group)

    def _prove(self, gloo: GlooGroup, label: str, credentials: Credentials) -> PairGroup:
        authenticate(gloo, self._rank, credentials, timeout_s=self._timeout_s)
        if name_of(label) == gloo.transport:
            return gloo
        group = self._open(gloo, label)
        try:
            authenticate(group, self._rank, credentials, timeout_s=self._timeout_s)
        except BaseException:
            group.close()
            group.release()
            raise
        return group

    def _open(self, gloo: GlooGroup, label: str) -> PairGroup:
        """Each needs libraries of its own, which only who uses it has to have."""
        try:
            if name_of(label) == "nccl":
                from common.transport.nccl import connect

                return connect(
                    gloo, self._rank, self._device, label, interface=self._interface, timeout_s=self._timeout_s
                )
            from common.transport.cuda_ipc import IpcGroup

            return IpcGroup(gloo, self._device)
        except BaseException:
            gloo.close()
            raise


def _dispose_of(proven: asyncio.Future[PairGroup]) -> None:
    if not proven.cancelled() and proven.exception() is None:
        _dispose(proven.result())


def _dispose(group: PairGroup) -> None:
    def end() -> None:
        group.close()
        group.release()

    threading.Thread(target=end, name="dispose-group", daemon=True).start()
