"""Seeded noise in place of weights, so that any size can be measured without a download."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# That of a freshly initialised Qwen3.
STANDARD_DEVIATION = 0.02
CHUNK_ELEMENTS = 1 << 24


def fill_dummy(destination: Tensor, name: str, seed: int) -> None:
    """Uniform noise for a matrix [rows, columns], a function of (seed, name, index) alone; ones for a norm's vector.

    Integer hashing (the multiply and xorshift rounds of splitmix64, Steele et al. 2014) gives the same values on every
    device, so that a CPU and a GPU worker hold one model. Computed where the weights live.
    """
    if name.endswith("norm.weight"):
        destination.fill_(1)
        return
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little", signed=True)
    num_rows, num_columns = destination.shape
    rows_per_chunk = max(1, CHUNK_ELEMENTS // num_columns)
    for first in range(0, num_rows, rows_per_chunk):
        rows = destination[first : first + rows_per_chunk]
        start = first * num_columns
        index = torch.arange(start, start + rows.numel(), dtype=torch.int64, device=destination.device)
        rows.copy_(_noise(index, key).view(rows.shape))


def _noise(index: Tensor, key: int) -> Tensor:
    """float32 in [-a, a), a = sqrt(3) standard deviations; overwrites `index`. Products wrap around at 64 bits."""
    index.mul_(-0x61C8864680B583EB).add_(key)
    index.bitwise_xor_(index >> 32).mul_(-0x40A7B892E31B1A47)
    index.bitwise_xor_(index >> 29).mul_(-0x6B2FB644ECCEEE15)
    return (index >> 40).to(torch.float32).mul_(STANDARD_DEVIATION * math.sqrt(3) / (1 << 23))
