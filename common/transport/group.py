"""What a pair needs of a two-member process group. A transport is one file that provides it."""

from __future__ import annotations

from typing import Protocol

import torch
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
        """Blocks until the tensor has been sent or filled. Those of one direction are waited for in their order.

        Raises:
            PairBroken: it never will be. A wait that times out breaks the whole group.
        """


class PairGroup(Protocol):
    """Ordered messages between two members: the n-th `send` of one meets the n-th `receive` of the other, of one size.

    Tensors are contiguous uint8 at the beginning of a buffer from here. Every method may be called from any thread.
    On a CUDA device a transfer comes after what the calling thread's stream holds when it begins.
    """

    # As the serving path names it.
    transport: str
    # Where payload is sent from and received into.
    device: torch.device

    def send_buffer(self, num_bytes: int) -> Tensor:
        """Memory to send from; the group's own until `release`."""

    def receive_buffer(self, num_bytes: int) -> Tensor:
        """Memory to receive into, for as long as somebody holds it."""

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

    def release(self) -> None:
        """Gives back what the group holds; after `close`, once no transfer is under way. The last call."""
