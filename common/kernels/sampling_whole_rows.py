"""Top-k and top-p of a row too wide for one program's registers: the whole row is read, several times.

A winner that the truncation rejects takes all less probable tokens with it, so that rounds are few: see
`common.engine.truncation`. Everything is decided by whole numbers, in any order of addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.sampling_noise import gumbel_of, rank_bits, uniforms_of_tokens, weight_of

# A token's key holds its rank, then its id in the lower bits.
_ID_BITS = tl.constexpr(24)
_NUM_KEY_BITS = tl.constexpr(56)


@triton.jit
def draw_among_all(
    logits_row,
    largest,
    temperature,
    narrow,
    top_k,
    top_p,
    log_min_p,
    total,
    token,
    score,
    position,
    seed_low,
    seed_high,
    vocab_size,
    TILE: tl.constexpr,
):
    """(token, score) of any row. `token` and `score` are the best of all and `total` is the weight, unless `narrow`."""
    # Tokens of this key and beyond are rejected.
    end = tl.full((), 1, tl.int64) << _NUM_KEY_BITS
    if top_k > 0:
        end = _end_of_top_k(logits_row, largest, temperature, top_k, vocab_size, TILE)
        total = tl.zeros((), tl.int64)
        if top_p < 1:
            total = _weight_before(logits_row, largest, temperature, end, vocab_size, TILE)
    bound = tl.where(top_p < 1, tl.maximum(top_p * total.to(tl.float64), 1.0), float("inf"))
    key = tl.full((), 1, tl.int64) << _NUM_KEY_BITS
    if narrow == 0:
        key = _keys(tl.div_rn(tl.load(logits_row + token) - largest, temperature), token)
    rejected = True
    while rejected:
        if key >= end:
            score = tl.full((), float("-inf"), tl.float32)
            token = tl.zeros((), tl.int32)
            start = 0
            while start < vocab_size:
                token_ids = start + tl.arange(0, TILE)
                logits = tl.load(logits_row + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
                z = tl.div_rn(logits - largest, temperature)
                may_win = (_keys(z, token_ids) < end) & (z >= log_min_p) & (token_ids < vocab_size)
                if tl.max(may_win.to(tl.int32), 0) > 0:
                    v = uniforms_of_tokens(start // 4 + tl.arange(0, TILE // 4), position, seed_low, seed_high)
                    scores = tl.where(may_win, z + gumbel_of(v), float("-inf"))
                    tile_score = tl.max(scores, 0)
                    tile_token = tl.min(tl.where(scores == tile_score, token_ids, vocab_size), 0)
                    # Between equals the earlier tile's id is the lower one.
                    token = tl.where(tile_score > score, tile_token, token)
                    score = tl.maximum(tile_score, score)
                start += TILE
            key = _keys(tl.div_rn(tl.load(logits_row + token) - largest, temperature), token)
        rejected = False
        if top_p < 1:
            before = _weight_before(logits_row, largest, temperature, key, vocab_size, TILE)
            rejected = before.to(tl.float64) >= bound
            end = tl.where(rejected, key, end)
    return token, score


@triton.jit
def _keys(z, token_ids):
    return (rank_bits(z).to(tl.int64) << _ID_BITS) | token_ids


@triton.jit
def _weight_before(logits_row, largest, temperature, end, vocab_size, TILE: tl.constexpr):
    """int64: the weight of the tokens whose keys are below `end`."""
    weight = tl.zeros((), tl.int64)
    start = 0
    while start < vocab_size:
        token_ids = start + tl.arange(0, TILE)
        logits = tl.load(logits_row + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
        z = tl.div_rn(logits - largest, temperature)
        weight += tl.sum(tl.where(_keys(z, token_ids) < end, weight_of(z), 0), 0)
        start += TILE
    return weight


@triton.jit
def _end_of_top_k(logits_row, largest, temperature, top_k, vocab_size, TILE: tl.constexpr):
    """The key that exactly `top_k` tokens are below, found from its highest byte on."""
    prefix = tl.zeros((), tl.int64)
    shift = tl.full((), _NUM_KEY_BITS, tl.int32)
    num_wanted = top_k
    num_equal = top_k + 1
    while num_wanted < num_equal:
        shift -= 8
        counts = tl.zeros([256], tl.int32)
        start = 0
        while start < vocab_size:
            token_ids = start + tl.arange(0, TILE)
            logits = tl.load(logits_row + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
            keys = _keys(tl.div_rn(logits - largest, temperature), token_ids) >> shift
            counts += tl.histogram(
                (keys & 255).to(tl.int32), 256, mask=(keys >> 8 == prefix) & (token_ids < vocab_size)
            )
            start += TILE
        up_to = tl.cumsum(counts, 0)
        digit = tl.sum((up_to < num_wanted).to(tl.int32), 0)
        num_equal = tl.sum(tl.where(tl.arange(0, 256) == digit, counts, 0), 0)
        num_wanted -= tl.max(tl.where(up_to < num_wanted, up_to, 0), 0)
        prefix = (prefix << 8) | digit
    return (prefix + 1) << shift
