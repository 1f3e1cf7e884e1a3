"""The device checksum of `common.transport.checksum` in one pass over the payload, to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def mixed_sum(words: Tensor) -> Tensor:
    """The checksum of contiguous int64 words as one int64, on their device and in the stream of the calling thread."""
    assert words.dtype is torch.int64
    assert words.is_contiguous()
    total = torch.zeros(1, dtype=torch.int64, device=words.device)
    _mixed_sum[(triton.cdiv(len(words), BLOCK),)](words, total, len(words), BLOCK=BLOCK, num_warps=8)
    return total


@triton.jit(do_not_specialize=["num_words"])
def _mixed_sum(words, total, num_words, BLOCK: tl.constexpr):
    indices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = indices < num_words
    x = tl.load(words + indices, mask=valid, other=0).to(tl.uint64, bitcast=True)
    x ^= (indices + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x ^= x >> 31
    # Whatever order the programs end in, a sum of integers is the same.
    tl.atomic_add(total, tl.sum(tl.where(valid, x.to(tl.int64, bitcast=True), 0)), sem="relaxed")
