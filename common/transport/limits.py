"""How large a chunk may be, how many a sender gathers ahead, and how long a transfer may take."""

from __future__ import annotations

# A peer that dies in the middle of a message leaves gloo hanging until the timeout: short messages, short hangs.
GLOO_CHUNK_BYTES = 4 * 2**20
# Between devices a chunk costs the host half a millisecond, whatever its size.
DEVICE_CHUNK_BYTES = 16 * 2**20

# Gathered payloads waiting for the wire or on it. With more of them, each has left the CPU's cache when it is sent.
GLOO_GATHER_SLOTS = 3
# A chunk is under way for some milliseconds, most of which are messages: with few at once the link stands idle.
DEVICE_GATHER_SLOTS = 8

_BASE_S = 10.0
_SLOWEST_BYTES_PER_S = 4 * 2**20


def chunk_bytes(transport: str, limit: int) -> int:
    """The largest chunk over a transport, where the operator allows `limit` (0: whatever suits it)."""
    if transport == "gloo":
        return min(limit or GLOO_CHUNK_BYTES, GLOO_CHUNK_BYTES)
    return limit or DEVICE_CHUNK_BYTES


def gather_slots(transport: str) -> int:
    """Staging slots of a sender."""
    return GLOO_GATHER_SLOTS if transport == "gloo" else DEVICE_GATHER_SLOTS


def transfer_timeout_s(num_bytes: int) -> float:
    """How long a transfer of that size may take before the pair counts as broken."""
    return _BASE_S + num_bytes / _SLOWEST_BYTES_PER_S
