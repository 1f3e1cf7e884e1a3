"""The first two kernels of a sampling step: each tile's largest logit, and the best scores of the rows that are drawn.

Shapes: S rows, V vocabulary, B tiles of V, U shares of a row, G groups of V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.launch import allow_next, wait_for_inputs
from common.kernels.sampling_noise import (
    INTERPRETED,
    gumbel_of,
    not_below_gumbel_of,
    uniform_of_token,
    uniforms_of_tokens,
    weight_of,
)


@triton.jit
def tile_maxima(
    logits_SV,
    temperature_S,
    top_k_S,
    top_p_S,
    tile_max_SB,
    tile_best_SB,
    group_max_SG,
    vocab_size,
    row_stride,
    num_tiles,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each tile's largest logit and the lowest token that has it; +inf for a tile with NaN."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token_ids = tile * TILE + tl.arange(0, TILE)
    logits_row = logits_SV + row * row_stride
    wait_for_inputs(PDL)
    allow_next(PDL)
    logits = tl.load(logits_row + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    is_truncated = (tl.load(top_k_S + row) > 0) | (tl.load(top_p_S + row) < 1)
    is_truncated = is_truncated & (tl.load(temperature_S + row) > 0)
    # The search for the largest goes by fours, which a thread holds together: a quarter of the comparisons.
    block_max = _largest(tl.reshape(logits, [TILE // 4, 4]), 1)
    largest = _largest(block_max, 0)
    first_blocks = tl.where(block_max == largest, tl.arange(0, TILE // 4), TILE // 4 - 1)
    four_ids = tile * TILE + tl.min(first_blocks, 0) * 4 + tl.arange(0, 4)
    four = tl.load(logits_row + four_ids, mask=four_ids < vocab_size, other=float("-inf"))
    best = tl.min(tl.where(four == largest, four_ids, vocab_size - 1), 0)
    tl.store(tile_max_SB + row * num_tiles + tile, tl.where(largest != largest, float("inf"), largest))
    tl.store(tile_best_SB + row * num_tiles + tile, best)
    if is_truncated:
        GROUPS: tl.constexpr = TILE // GROUP
        group_max = tl.max(tl.reshape(block_max, [GROUPS, GROUP // 4]), 1)
        groups = tile * GROUPS + tl.arange(0, GROUPS)
        tl.store(group_max_SG + row * (num_tiles * GROUPS) + groups, group_max)


@triton.jit
def _largest(x, AXIS: tl.constexpr):
    """The largest along an axis; NaN, or in the interpreter +inf, where there is NaN."""
    if INTERPRETED:
        return tl.max(tl.where(x != x, float("inf"), x), AXIS)
    else:
        return tl.reduce(x, AXIS, _larger)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["num_shares"])
def best_scores(
    logits_SV,
    temperature_S,
    seed_words_S2,
    top_k_S,
    top_p_S,
    log_min_p_S,
    positions_S,
    tile_max_SB,
    tile_best_SB,
    score_SU,
    drawn_SU,
    weight_SU,
    vocab_size,
    row_stride,
    num_tiles,
    num_shares,
    TILES: tl.constexpr,
    SCORE_TILE: tl.constexpr,
    CANDIDATE_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best score among every `num_shares`-th tile of a drawn row, and the sum of their weights if top-p asks."""
    share, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    allow_next(PDL)
    temperature = tl.load(temperature_S + row)
    top_k = tl.load(top_k_S + row)
    tiles = tl.arange(0, TILES)
    tile_max = tl.load(tile_max_SB + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    largest = tl.max(tile_max, 0)
    # A small top-k is drawn from its candidates alone, and nothing from a row without a finite maximum.
    is_drawn = (temperature > 0) & (tl.abs(largest) < float("inf"))
    if is_drawn & ((top_k <= 0) | (top_k > CANDIDATE_GROUPS) | (top_k >= vocab_size)):
        tile_best = tl.load(tile_best_SB + row * num_tiles + tiles, mask=tiles < num_tiles, other=vocab_size)
        best = tl.min(tl.where(tile_max == largest, tile_best, vocab_size), 0)
        log_min_p = tl.load(log_min_p_S + row)
        needs_weights = tl.load(top_p_S + row) < 1
        position = tl.load(positions_S + row).to(tl.int64)
        seed_low = tl.load(seed_words_S2 + 2 * row).to(tl.uint32)
        seed_high = tl.load(seed_words_S2 + 2 * row + 1).to(tl.uint32)
        # The most probable token is the one to beat, from the first tile on.
        score = gumbel_of(uniform_of_token(best, position, seed_low, seed_high))
        weight = tl.zeros((), tl.int64)
        # Not above 1 / temperature, so that the product below is not below the true quotient.
        inverse = tl.minimum(1 / temperature, 3e38) * (1 - 2.0**-20)
        logits_row = logits_SV + row * row_stride
        start = share * SCORE_TILE
        while start < vocab_size:
            token_ids = start + tl.arange(0, SCORE_TILE)
            logits = tl.load(logits_row + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
            below = logits - largest
            v = uniforms_of_tokens(start // 4 + tl.arange(0, SCORE_TILE // 4), position, seed_low, seed_high)
            # Few tiles hold a score that matters, and only those are worth the exact logarithms.
            promising = tl.max(below * inverse + not_below_gumbel_of(v), 0) >= score
            if needs_weights | promising:
                z = tl.div_rn(below, temperature)
                if needs_weights:
                    weight += tl.sum(weight_of(z), 0)
                if promising:
                    scores = tl.where(z < log_min_p, float("-inf"), z + gumbel_of(v))
                    tile_score = tl.max(scores, 0)
                    tile_drawn = tl.min(tl.where(scores == tile_score, token_ids, vocab_size), 0)
                    better = (tile_score > score) | ((tile_score == score) & (tile_drawn < best))
                    best = tl.where(better, tile_drawn, best)
                    score = tl.where(better, tile_score, score)
            start += num_shares * SCORE_TILE
        tl.store(score_SU + row * num_shares + share, score)
        tl.store(drawn_SU + row * num_shares + share, best)
        tl.store(weight_SU + row * num_shares + share, weight)
