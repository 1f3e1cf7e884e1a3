"""The last kernel of a sampling step: every row's token, with top-k and top-p as `common.engine.truncation` has them.

Tokens that a row may draw rank high, so they are looked for in the groups whose largest logit ranks high enough. That
is a superset, by the groups' maxima alone, of the k most probable tokens, and of the tokens before the best score's.
Where those groups are few, the row is drawn among their tokens, which one program holds; otherwise it reads the whole
row several times. Both are exact.

Tokens are ordered by `rank_bits` and, between equals, by id: together the key, the smaller the more probable.

Shapes: S rows, V vocabulary, B tiles of V, U shares of a row's tiles, G groups of V, C candidate groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.launch import allow_next, wait_for_inputs
from common.kernels.sampling_noise import gumbel_of, rank_bits, uniforms_of_tokens, weight_of
from common.kernels.sampling_whole_rows import draw_among_all

GROUP = 64
CANDIDATE_GROUPS = 64

# What the jitted functions see of them.
_GROUP = tl.constexpr(GROUP)
_CANDIDATE_GROUPS = tl.constexpr(CANDIDATE_GROUPS)
_BITS_OF_INFINITY = tl.constexpr(0x7F800000)
_BITS_OF_NOTHING = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_shares"])
def finish(
    logits_SV,
    temperature_S,
    seed_words_S2,
    top_k_S,
    top_p_S,
    log_min_p_S,
    positions_S,
    tile_max_SB,
    tile_best_SB,
    group_max_SG,
    score_SU,
    drawn_SU,
    weight_SU,
    groups_SC,
    out_token_S,
    out_score_S,
    vocab_size,
    row_stride,
    num_tiles,
    num_shares,
    num_groups,
    TILES: tl.constexpr,
    SHARES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token and the score of each row, one program for each."""
    row = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    allow_next(PDL)
    temperature = tl.load(temperature_S + row)
    top_k = tl.load(top_k_S + row)
    top_p = tl.load(top_p_S + row)
    tiles = tl.arange(0, TILES)
    tile_max = tl.load(tile_max_SB + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    tile_best = tl.load(tile_best_SB + row * num_tiles + tiles, mask=tiles < num_tiles, other=vocab_size)
    largest = tl.max(tile_max, 0)
    score = largest
    token = tl.min(tl.where(tile_max == largest, tile_best, vocab_size), 0)
    # A row without a finite maximum keeps it as its score.
    if (temperature > 0) & (tl.abs(largest) < float("inf")):
        top_k = tl.where(top_k < vocab_size, top_k, 0)
        narrow = (top_k > 0) & (top_k <= _CANDIDATE_GROUPS)
        shares = tl.arange(0, SHARES)
        share_offsets = row * num_shares + shares
        some = (shares < num_shares) & (narrow == 0)
        share_score = tl.load(score_SU + share_offsets, mask=some, other=float("-inf"))
        share_drawn = tl.load(drawn_SU + share_offsets, mask=some, other=vocab_size)
        total = tl.sum(tl.load(weight_SU + share_offsets, mask=some, other=0), 0)
        score = tl.max(share_score, 0)
        token = tl.min(tl.where(share_score == score, share_drawn, vocab_size), 0)
        if (top_k > 0) | (top_p < 1):
            logits_row = logits_SV + row * row_stride
            log_min_p = tl.load(log_min_p_S + row)
            position = tl.load(positions_S + row).to(tl.int64)
            seed_low = tl.load(seed_words_S2 + 2 * row).to(tl.uint32)
            seed_high = tl.load(seed_words_S2 + 2 * row + 1).to(tl.uint32)
            groups = tl.arange(0, GROUPS)
            group_max = tl.load(group_max_SG + row * num_groups + groups, mask=groups < num_groups, other=0)
            group_bits = rank_bits(tl.div_rn(group_max - largest, temperature))
            group_bits = tl.where(groups < num_groups, group_bits, _BITS_OF_NOTHING)
            if narrow:
                limit = _bits_that_hold(group_bits, top_k, _BITS_OF_INFINITY, _CANDIDATE_GROUPS)
            else:
                limit = rank_bits(tl.div_rn(tl.load(logits_row + token) - largest, temperature))
            chosen = group_bits <= limit
            num_chosen = tl.sum(chosen.to(tl.int32), 0)
            if (num_chosen <= _CANDIDATE_GROUPS) & (narrow | (top_k <= 0) | (top_p >= 1)):
                list_C = groups_SC + row * _CANDIDATE_GROUPS
                tl.store(list_C + tl.cumsum(chosen.to(tl.int32), 0) - 1, groups, mask=chosen)
                # Other threads of the program read the list.
                tl.debug_barrier()
                token, score = _draw_among_candidates(
                    logits_row, largest, temperature, list_C, num_chosen, limit, narrow, top_k, top_p, log_min_p,
                    total, position, seed_low, seed_high, vocab_size,
                )  # fmt: skip
            else:
                token, score = draw_among_all(
                    logits_row, largest, temperature, narrow, top_k, top_p, log_min_p, total, token, score,
                    position, seed_low, seed_high, vocab_size, ROW_TILE,
                )  # fmt: skip
    tl.store(out_token_S + row, token.to(out_token_S.dtype.element_ty))
    tl.store(out_score_S + row, score)


@triton.jit
def _bits_that_hold(bits, num_wanted, limit, num_allowed):
    """Some number that at least `num_wanted` of `bits` do not exceed, nor more than `num_allowed` where possible.

    `limit` is such a number but for `num_allowed`.
    """
    too_low, high = -1, limit
    num_held = tl.sum((bits <= high).to(tl.int32), 0)
    while (high - too_low > 1) & (num_held > num_allowed):
        middle = too_low + (high - too_low) // 2
        num_middle = tl.sum((bits <= middle).to(tl.int32), 0)
        enough = num_middle >= num_wanted
        too_low = tl.where(enough, too_low, middle)
        high = tl.where(enough, middle, high)
        num_held = tl.where(enough, num_middle, num_held)
    return high


@triton.jit
def _draw_among_candidates(
    logits_row,
    largest,
    temperature,
    list_C,
    num_chosen,
    limit,
    narrow,
    top_k,
    top_p,
    log_min_p,
    total,
    position,
    seed_low,
    seed_high,
    vocab_size,
):
    """(token, score) of a row whose every token of rank `limit` or better is in one of the chosen groups.

    `narrow`: those hold the `top_k` most probable tokens. Otherwise they hold the best score of all and what ranks
    before it, and `total` is the weight of all tokens.
    """
    NUM: tl.constexpr = _CANDIDATE_GROUPS * _GROUP
    places = tl.arange(0, NUM)
    groups = tl.load(list_C + places // _GROUP, mask=places // _GROUP < num_chosen, other=0)
    token_ids = groups * _GROUP + places % _GROUP
    valid = (places // _GROUP < num_chosen) & (token_ids < vocab_size)
    z = tl.div_rn(tl.load(logits_row + token_ids, mask=valid, other=float("-inf")) - largest, temperature)
    bits = tl.where(valid, rank_bits(z), _BITS_OF_NOTHING)
    kept = bits <= limit
    if narrow:
        kth = _bits_that_hold(bits, top_k, limit, top_k)
        num_surplus = tl.sum((bits <= kth).to(tl.int32), 0) - top_k
        kept = bits <= kth
        if num_surplus > 0:
            # Candidates are in the order of their ids, so the last of the equals go.
            equal = (bits == kth).to(tl.int32)
            num_equal = tl.sum(equal, 0)
            kept = kept & ((equal == 0) | (tl.cumsum(equal, 0) <= num_equal - num_surplus))
    weights = tl.zeros([NUM], tl.int64)
    bound = total.to(tl.float64)
    if top_p < 1:
        weights = tl.where(kept, weight_of(z), 0)
        if narrow:
            bound = tl.sum(weights, 0).to(tl.float64)
    bound = tl.where(top_p < 1, tl.maximum(top_p * bound, 1.0), float("inf"))
    blocks = tl.arange(0, NUM // 4)
    first = tl.load(list_C + blocks // (_GROUP // 4), mask=blocks // (_GROUP // 4) < num_chosen, other=0)
    v = uniforms_of_tokens(first * (_GROUP // 4) + blocks % (_GROUP // 4), position, seed_low, seed_high)
    scores = tl.where(kept & (z >= log_min_p), z + gumbel_of(v), float("-inf"))
    token, score = 0, 0.0
    rejected = True
    while rejected:
        score = tl.max(scores, 0)
        token = tl.min(tl.where(scores == score, token_ids, vocab_size), 0)
        token_bits = tl.min(tl.where(valid & (token_ids == token), bits, _BITS_OF_NOTHING), 0)
        before = (bits < token_bits) | ((bits == token_bits) & (token_ids < token))
        rejected = tl.sum(tl.where(before, weights, 0), 0).to(tl.float64) >= bound
        rejected = rejected | ((top_k > 0) & (tl.sum(before.to(tl.int32), 0) >= top_k))
        scores = tl.where(before, scores, float("-inf"))
    return token, score
