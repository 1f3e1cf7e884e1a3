"""The first message on a new process group, each way: proof that it joins the two sides that met on the control stream.

A port that gloo listens on is open to anybody who can reach the interface. The token goes from decode to prefill on the
control stream, which may be mTLS, and is used once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

import torch

from common.transport.group import DECODE_RANK, PREFILL_RANK, PairBroken, PairGroup

_ROLES = {PREFILL_RANK: b"prefill", DECODE_RANK: b"decode"}


def new_token() -> bytes:
    return secrets.token_bytes(32)


class Credentials(NamedTuple):
    """What both sides of one pair know, and nobody else."""

    token: bytes
    prefill_boot_id: str
    decode_boot_id: str

    def proof(self, rank: int) -> bytes:
        """HMAC-SHA256 over role and boot ids, so that neither side can be answered with its own words."""
        parts = (_ROLES[rank], self.prefill_boot_id.encode(), self.decode_boot_id.encode())
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self.token, message, hashlib.sha256).digest()


def authenticate(group: PairGroup, rank: int, credentials: Credentials, *, timeout_s: float) -> None:
    """Exchanges proofs; blocks for at most `timeout_s`. The group is closed unless the peer's proof holds.

    Raises:
        PairBroken: the peer is somebody else, or silent.
    """
    own = credentials.proof(rank)
    received = torch.empty(len(own), dtype=torch.uint8)
    try:
        receive = group.receive(received)
        group.send(torch.frombuffer(bytearray(own), dtype=torch.uint8)).wait(timeout_s)
        receive.wait(timeout_s)
        if not hmac.compare_digest(received.numpy().tobytes(), credentials.proof(1 - rank)):
            raise PairBroken("the peer on the process group is not the one on the control stream: its proof is wrong")
    except PairBroken:
        group.close()
        raise
