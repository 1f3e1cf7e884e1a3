"""The noise and the probabilities of `common.engine.philox` and `common.engine.truncation`, to the bit, inside kernels.

PyTorch's CUDA kernels use the device's math library as it stands, so these functions do too. The interpreter has none:
there they compute in fp64 and round once, which agrees with a CPU's library but for a rare last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from common.kernels import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def philox_words(block, position, seed_low, seed_high):
    """The four words of each block of four token ids; all uint32 but `position`, int64."""
    counter_0 = block
    counter_1 = tl.zeros_like(block)
    counter_2 = tl.zeros_like(block) + (position & 0xFFFFFFFF).to(tl.uint32)
    counter_3 = tl.zeros_like(block) + (position >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_0 = counter_0.to(tl.uint64) * 0xD2511F53
        product_1 = counter_2.to(tl.uint64) * 0xCD9E8D57
        counter_0 = (product_1 >> 32).to(tl.uint32) ^ counter_1 ^ seed_low
        counter_2 = (product_0 >> 32).to(tl.uint32) ^ counter_3 ^ seed_high
        counter_1, counter_3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        seed_low = (seed_low + 0x9E3779B9).to(tl.uint32)
        seed_high = (seed_high + 0xBB67AE85).to(tl.uint32)
    return counter_0, counter_1, counter_2, counter_3


@triton.jit
def uniform_of(word):
    return tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)


@triton.jit
def gumbel_of(v):
    """Standard Gumbel noise of `uniform_of` a word."""
    if INTERPRETED:
        exponential = -tl.log(1 - v.to(tl.float64)).to(tl.float32)
        return -tl.log(exponential.to(tl.float64)).to(tl.float32)
    else:
        return -libdevice.log(-libdevice.log1p(-v))


@triton.jit
def not_below_gumbel_of(v):
    """A number not below `gumbel_of(v)`, nor far above it where it is large; at a tenth of the cost.

    -log(-log(1 - v)) < -log(v), and the slack is far more than any rounding of the two.
    """
    if INTERPRETED:
        return 1e-4 - 0.6931472 * tl.log2(v)
    else:
        return 1e-4 - 0.6931472 * libdevice.fast_log2f(v)


@triton.jit
def in_fours(word_0, word_1, word_2, word_3):
    """One tensor of four times the size, which takes from the four in turn."""
    pairs = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    return tl.reshape(pairs, [4 * word_0.shape[0]])


@triton.jit
def uniforms_of_tokens(blocks, position, seed_low, seed_high):
    """v of the tokens 4b, 4b + 1, 4b + 2 and 4b + 3 of each block b, in order."""
    words = philox_words(blocks.to(tl.uint32), position, seed_low, seed_high)
    return uniform_of(in_fours(words[0], words[1], words[2], words[3]))


@triton.jit
def uniform_of_token(token_id, position, seed_low, seed_high):
    """v of one token."""
    words = philox_words((token_id // 4).to(tl.uint32), position, seed_low, seed_high)
    lane = token_id % 4
    first = tl.where(lane == 0, words[0], words[1])
    return uniform_of(tl.where(lane < 2, first, tl.where(lane == 2, words[2], words[3])))


@triton.jit
def weight_of(z):
    """int64: the probability in multiples of 2**-34 of the most probable token's, which has z = 0."""
    if INTERPRETED:
        probability = tl.exp(z.to(tl.float64)).to(tl.float32)
    else:
        probability = libdevice.exp(z)
    scaled = probability * 2.0**34
    # To the nearest, ties to even: from 2**23 on there are no fractions, below it the sum has no room for them.
    return tl.where(scaled < 2.0**23, (scaled + 2.0**23) - 2.0**23, scaled).to(tl.int64)


@triton.jit
def rank_bits(z):
    """int32 that orders as -z does; `z` is not positive, so that its bits without the sign do."""
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
