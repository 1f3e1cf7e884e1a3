"""The generator behind every draw: Philox-4x32-10, and the Gumbel noise made of it.

Counter-based: the noise of a token is a pure function of (seed, absolute position, token id), so a row's draw is the
same in any batch, on any worker and after any restart, and no generator state has to travel.

    key      (seed low, seed high)                              32-bit words
    counter  (token id // 4, 0, position low, position high)
    word     output word number (token id % 4)

The second counter word is 0 for token draws. A kernel that follows this page gives the same bits; it has to round every
operation to fp32 and to use the `log` and `log1p` of its device's math library.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11).

Shapes: R rows, V vocabulary; words are int64 tensors that hold 32-bit values, since torch multiplies no uint32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Four 32-bit words for each counter under its key.

    int64 tensors of values below 2**32. The counter's broadcast against one another, the key's to their shape; the
    result has one more dimension, of size 4, at the end.
    """
    multipliers, increments = _constants(counter[0].device, counter[0].dim())
    # Both halves of a round run as one tensor: `odd` is what the products of `even` are mixed with. Bits above the
    # 32nd are left in place where the next operation drops them anyway.
    counter0, counter1, counter2, counter3 = torch.broadcast_tensors(*counter)
    even = torch.stack((counter0, counter2))
    odd = torch.stack((counter3, counter1))
    keys = torch.stack((key[1], key[0])) + increments
    for round_key in keys:
        products = even * multipliers
        mixed = (products >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(WORD)
        even, odd = mixed.flip(0), products
    odd &= WORD
    return torch.stack((even[0], odd[1], even[1], odd[0]), dim=-1)


def gumbel_noise(seed_words_R2: Tensor, positions_R: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, fp32 [R, V], for drawing the tokens at `positions_R` (int64, absolute).

    `seed_words_R2` holds the low and the high word of each row's seed.
    """
    blocks_1B = torch.arange((vocab_size + 3) // 4, device=positions_R.device)[None, :]
    positions_R1 = positions_R[:, None]
    counter = (blocks_1B, torch.zeros_like(positions_R1), positions_R1 & WORD, positions_R1 >> 32)
    words_RB4 = philox_4x32(counter, (seed_words_R2[:, :1], seed_words_R2[:, 1:]))
    return gumbel_of_words(words_RB4).flatten(1)[:, :vocab_size]


def gumbel_of_words(words: Tensor) -> Tensor:
    """-log(-log(1 - v)) in fp32, for v = min(fp32(word) * 2**-32 + 2**-33, 1 - 2**-24).

    The noise that wins a draw lies where v is near 0, and there fp32 keeps all 32 bits of the word; a uniform taken as
    `word / 2**32` would have to round them near 1. The result lies in [-2.82, 22.88].
    """
    v = words.float().mul_(2.0**-32).add_(2.0**-33).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


@lru_cache
def _constants(device: torch.device, num_dims: int) -> tuple[Tensor, Tensor]:
    """Multipliers [2, 1...] and each round's key increments [10, 2, 1...], made once for each device."""
    ones = (1,) * num_dims
    multipliers = torch.tensor(MULTIPLIERS, device=device).view(2, *ones)
    increments = [[r * increment & WORD for increment in reversed(KEY_INCREMENTS)] for r in range(NUM_ROUNDS)]
    return multipliers, torch.tensor(increments, device=device).view(NUM_ROUNDS, 2, *ones)
