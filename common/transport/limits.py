"""The limits that come from gloo, and how long a transfer may take."""

from __future__ import annotations

# A peer that dies in the middle of a message leaves gloo hanging until the timeout: short messages, short hangs.
LARGEST_CHUNK_BYTES = 4 * 2**20

_BASE_S = 10.0
_SLOWEST_BYTES_PER_S = 4 * 2**20


def transfer_timeout_s(num_bytes: int) -> float:
    """How long a transfer of that size may take before the pair counts as broken."""
    return _BASE_S + num_bytes / _SLOWEST_BYTES_PER_S
