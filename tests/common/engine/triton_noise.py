"""The noise of `common.engine.philox` as a Triton kernel writes it."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def noise_kernel(seed_words_R2, positions_R, noise_RV, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key0 = tl.load(seed_words_R2 + 2 * row).to(tl.uint32)
    key1 = tl.load(seed_words_R2 + 2 * row + 1).to(tl.uint32)
    position = tl.load(positions_R + row)
    c0 = (token_ids // 4).to(tl.uint32)
    c1 = tl.zeros_like(c0)
    c2 = c1 + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = c1 + (position >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = c0 * 0xD2511F53, tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        low1, high1 = c2 * 0xCD9E8D57, tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += tl.full((), 0x9E3779B9, tl.uint32)
        key1 += tl.full((), 0xBB67AE85, tl.uint32)
    lane = token_ids % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    v = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    noise = -libdevice.log(-libdevice.log1p(-v))
    tl.store(noise_RV + row * vocab_size + token_ids, noise, mask=token_ids < vocab_size)
