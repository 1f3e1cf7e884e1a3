"""What a pair needs of a two-member process group. A backend is one file that provides these three."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from common.errors import Unavailable

PREFILL_RANK = 0
DECODE_RANK = 1
MAX_RENDEZVOUS_BYTES = 4096


class PairBroken(Unavailable):
    """The process group is of no use any more; a new one has to be made."""

    default_reason = "PAIR_LOST"


class Transfer(Protocol):
    """A send or receive under way. Holds on to its tensor until it ended."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until the tensor has been sent or filled.

        Raises:
            PairBroken: it never will be. A wait that times out breaks the whole group.
        """


class PairGroup(Protocol):
    """Ordered messages between two members: the n-th `send` of one meets the n-th `receive` of the other, of one size.

    Tensors are contiguous uint8. Every method may be called from any thread.
    """

    transport: str

    def send(self, payload: Tensor) -> Transfer:
        """Begins to send; `payload` stays as it is until the transfer has ended."""

    def receive(self, buffer: Tensor) -> Transfer:
        """Begins to fill `buffer`."""

    def wait_for_end(self) -> str:
        """Blocks until the peer is gone or either side has closed, for hours if need be; returns what happened."""

    def close(self) -> None:
        """Ends every transfer of both sides with PairBroken, and both `wait_for_end`; takes milliseconds.

        A transfer that is in the middle of its message may go on until its own timeout.
        """


class Joining(Protocol):
    """One side of a group that is being made. Each side has a few bytes that the other needs."""

    async def rendezvous(self) -> bytes:
        """What the peer has to be told; at most MAX_RENDEZVOUS_BYTES."""

    async def connect(self, peer_rendezvous: bytes) -> PairGroup:
        """The group. The peer has to connect at the same time.

        Raises:
            PairBroken: the peer could not be reached within the timeout.
        """

    def cancel(self) -> None:
        """The group is not wanted any more."""


class Join(Protocol):
    def __call__(self, rank: int, *, interface: str, timeout_s: float) -> Joining:
        """Begins to make a group that binds one interface, given by address or host name."""
