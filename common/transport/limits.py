"""How large a chunk may be, and how long a transfer may take."""

from __future__ import annotations

# A peer that dies in the middle of a message leaves gloo hanging until the timeout: short messages, short hangs.
GLOO_CHUNK_BYTES = 4 * 2**20
# Between devices a chunk costs the host half a millisecond, whatever its size.
DEVICE_CHUNK_BYTES = 16 * 2**20

_BASE_S = 10.0
_SLOWEST_BYTES_PER_S = 4 * 2**20


def chunk_bytes(transport: str, limit: int) -> int:
    """The largest chunk over a transport, where the operator allows `limit` (0: whatever suits it)."""
    if transport == "gloo":
        return min(limit or GLOO_CHUNK_BYTES, GLOO_CHUNK_BYTES)
    return limit or DEVICE_CHUNK_BYTES


def transfer_timeout_s(num_bytes: int) -> float:
    """How long a transfer of that size may take before the pair counts as broken."""
    return _BASE_S + num_bytes / _SLOWEST_BYTES_PER_S
