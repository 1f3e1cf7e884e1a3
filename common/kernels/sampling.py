"""One step of sampling on the device: the token that `common.engine.sampler` draws from the same logits, to the bit.

    logits ─▶ maxima of tiles ─▶ best scores of rows that are drawn ─▶ truncation, and the token of every row

A row's parameters lie on the device and nothing asks the host, so that a CUDA graph can replay the step with any
parameters. Penalties, bias and held-open stop tokens are not done here: rows that use them bring edited logits.

Greedy rows read their logits once. Drawn rows read them a second time, for scores need the largest logit first, but
for those of a small top-k, which are drawn from few candidates.

Shapes: S rows, V vocabulary, B tiles of V, U shares of a row, G groups of V, C candidate groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from common.kernels.launch import num_sms, supports_pdl
from common.kernels.sampling_scores import best_scores, tile_maxima
from common.kernels.sampling_truncation import CANDIDATE_GROUPS, GROUP, finish

# Tokens that a program looks at together, and its warps, in each of the three kernels.
MAXIMA_TILE, MAXIMA_WARPS = 4096, 8
SCORE_TILE, SCORE_WARPS = 4096, 8
ROW_TILE, FINISH_WARPS = 4096, 16
# Programs that share a drawn row: as many as give each multiprocessor these, within the limit.
SCORE_PROGRAMS = 16
MAX_SHARES = 64
# Sums of this many weights stay exact in fp64, as in `common.engine.truncation`.
MAX_VOCAB_SIZE = 2**19


class DeviceSampling(NamedTuple):
    """What each row asks for, on the device."""

    # fp32; 0: the most probable token is taken.
    temperature_S: Tensor
    # Low and high word of the seed, int64 or the bits as int32.
    seed_words_S2: Tensor
    # int32; 0: every token may be drawn.
    top_k_S: Tensor
    # fp64; 1: every token may be drawn.
    top_p_S: Tensor
    # fp32; -inf: every token may be drawn.
    log_min_p_S: Tensor


def sample(
    logits_SV: Tensor, params: DeviceSampling, positions_S: Tensor, out_token_S: Tensor, out_score_S: Tensor
) -> None:
    """Draws one token for each row of `logits_SV` (fp32, rows contiguous) into `out_token_S`.

    `positions_S` are the absolute positions of the tokens to be drawn. `out_score_S` (fp32) is the score of the token;
    it is not finite where the row's logits hold NaN or +inf, or nothing but -inf: the token is then any.
    """
    assert logits_SV.dtype == torch.float32
    assert logits_SV.stride(1) == 1
    assert params.top_p_S.dtype == torch.float64
    assert all(column.is_contiguous() for column in (*params, positions_S, out_token_S, out_score_S))
    num_rows, vocab_size = logits_SV.shape
    assert vocab_size <= MAX_VOCAB_SIZE
    device = logits_SV.device
    pdl = supports_pdl(device)
    num_tiles = triton.cdiv(vocab_size, MAXIMA_TILE)
    num_groups = num_tiles * (MAXIMA_TILE // GROUP)
    most_shares = min(triton.cdiv(vocab_size, SCORE_TILE), MAX_SHARES)
    num_shares = max(1, min(most_shares, SCORE_PROGRAMS * num_sms(device) // num_rows))
    tiles_lanes = triton.next_power_of_2(num_tiles)

    def scratch(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=device)

    tile_max_SB, tile_best_SB = scratch(num_tiles, torch.float32), scratch(num_tiles, torch.int32)
    group_max_SG = scratch(num_groups, torch.float32)
    score_SU, drawn_SU = scratch(num_shares, torch.float32), scratch(num_shares, torch.int32)
    weight_SU = scratch(num_shares, torch.int64)
    groups_SC = scratch(CANDIDATE_GROUPS, torch.int32)
    tile_maxima[(num_tiles, num_rows)](
        logits_SV,
        params.temperature_S,
        params.top_k_S,
        params.top_p_S,
        tile_max_SB,
        tile_best_SB,
        group_max_SG,
        vocab_size,
        logits_SV.stride(0),
        num_tiles,
        TILE=MAXIMA_TILE,
        GROUP=GROUP,
        PDL=pdl,
        num_warps=MAXIMA_WARPS,
        launch_pdl=pdl,
    )
    best_scores[(num_shares, num_rows)](
        logits_SV,
        *params,
        positions_S,
        tile_max_SB,
        tile_best_SB,
        score_SU,
        drawn_SU,
        weight_SU,
        vocab_size,
        logits_SV.stride(0),
        num_tiles,
        num_shares,
        TILES=tiles_lanes,
        SCORE_TILE=SCORE_TILE,
        CANDIDATE_GROUPS=CANDIDATE_GROUPS,
        PDL=pdl,
        num_warps=SCORE_WARPS,
        launch_pdl=pdl,
    )
    finish[(num_rows,)](
        logits_SV,
        *params,
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
        logits_SV.stride(0),
        num_tiles,
        num_shares,
        num_groups,
        TILES=tiles_lanes,
        SHARES=MAX_SHARES,
        GROUPS=tiles_lanes * (MAXIMA_TILE // GROUP),
        ROW_TILE=ROW_TILE,
        PDL=pdl,
        num_warps=FINISH_WARPS,
        launch_pdl=pdl,
    )
