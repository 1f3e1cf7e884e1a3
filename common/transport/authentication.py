"""The first message on a new process group, each way: proof that it joins the two sides that met on the control stream.

It travels as payload does, so it also proves that payload gets through.

A port that gloo listens on is open to anybody who can reach the interface. The token goes from decode to prefill on the
control stream, which may be mTLS, and is used once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

import torch

from common.engine.streams import beside_computation
from common.transport.group import DECODE_RANK, PREFILL_RANK, PairBroken, PairGroup

_ROLES = {PREFILL_RANK: b"prefill", DECODE_RANK: b"decode"}


def new_token() -> bytes:
    return secrets.token_bytes(32)


class Credentials(NamedTuple):
    """What both sides of one pair know, and nobody else."""

    token: bytes
    prefill_boot_id: str
    decode_boot_id: str

    def proof(self, rank: int, transport: str) -> bytes:
        """HMAC-SHA256 over role, boot ids and transport, so that nobody can be answered with words heard elsewhere."""
        parts = (_ROLES[rank], self.prefill_boot_id.encode(), self.decode_boot_id.encode(), transport.encode())
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self.token, message, hashlib.sha256).digest()


def authenticate(group: PairGroup, rank: int, credentials: Credentials, *, timeout_s: float) -> None:
    """Exchanges proofs; blocks for twice `timeout_s` at most. The group is closed unless the peer's proof holds.

    Prefill speaks first: over NCCL, which does one thing at a time, two sides that listen would wait for ever.

    Raises:
        PairBroken: the peer is somebody else, or silent.
    """
    with beside_computation(group.device):
        try:
            if rank == PREFILL_RANK:
                _say(group, credentials.proof(rank, group.transport), timeout_s)
            _hear(group, credentials.proof(1 - rank, group.transport), timeout_s)
            if rank == DECODE_RANK:
                _say(group, credentials.proof(rank, group.transport), timeout_s)
        except PairBroken:
            group.close()
            raise


def _say(group: PairGroup, proof: bytes, timeout_s: float) -> None:
    payload = group.send_buffer(len(proof))
    payload.copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
    group.send(payload).wait(timeout_s)


def _hear(group: PairGroup, expected: bytes, timeout_s: float) -> None:
    received = group.receive_buffer(len(expected))
    group.receive(received).wait(timeout_s)
    if not hmac.compare_digest(received.cpu().numpy().tobytes(), expected):
        raise PairBroken("the peer on the process group is not the one on the control stream: its proof is wrong")
