"""The checksum of a chunk, made to find accidents, not forgeries. Which one it is depends on where payload travels.

In host memory: xxh3-64 (https://xxhash.com). On a device: every 64-bit word, little-endian, is combined with its place
and mixed as in SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), and the results are added up modulo 2**64.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
import xxhash
from torch import Tensor

from common.engine.streams import beside_computation, sleep_until_done

log = logging.getLogger(__name__)


def checksum(payload: Tensor) -> int:
    """Of a contiguous uint8 tensor, read in place. On a device it comes after what the calling thread's stream holds.

    Blocks until it is known, without the interpreter lock: then the payload is final as well.
    """
    if payload.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(payload.numpy().data)
    total = torch.empty(1, dtype=torch.int64, pin_memory=True)
    total.copy_(_mixed_sum()(payload.view(torch.int64)), non_blocking=True)
    sleep_until_done(payload.device)
    return int(total.item()) % 2**64


def warm_up(device: torch.device) -> None:
    """Compiles what checksums on `device` need."""
    with beside_computation(device):
        checksum(torch.zeros(8, dtype=torch.uint8, device=device))


def mixed_sum(words: Tensor) -> Tensor:
    """The device checksum of int64 words as one int64, in plain PyTorch: slow, and the same everywhere."""
    x = words ^ torch.arange(1, len(words) + 1, device=words.device) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shifted(x, 31)).sum().view(1)


@functools.cache
def _mixed_sum() -> Callable[[Tensor], Tensor]:
    if importlib.util.find_spec("triton") is None:
        log.warning("PLAIN_CHECKSUM: checksums on the device in PyTorch's own, slow steps: Triton is not installed")
        return mixed_sum
    from common.kernels.checksum import mixed_sum as compiled

    return compiled


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(x: Tensor, num_bits: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (x >> num_bits) & (2 ** (64 - num_bits) - 1)
