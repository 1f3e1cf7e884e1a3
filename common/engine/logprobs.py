"""Log-probabilities of tokens under the raw logits: before penalties, bias and temperature.

Shapes: R rows, T positions of a prompt, V vocabulary, N alternatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.engine.ranking import rank_keys
from common.params import TokenLogprob, TopLogprob

# Ranking takes 8 bytes a logit beside the 4 of the logit itself: a long prompt goes through in slices of this many
# logits.
MAX_LOGITS_AT_ONCE = 1 << 24


def pack_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> Tensor:
    """What a row says about its token, fp64 [R, 3 + 2 N] on the device: one tensor, so that one transfer brings all
    of it.

    Columns: token id, log-probability, rank, the ids of the `num_top` most probable tokens, their log-probabilities.
    N is `num_top` or the vocabulary size, if that is less. Tokens of equal logits rank by id, the lowest first.
    """
    keys_RV = rank_keys(logits_RV - logits_RV.amax(dim=-1, keepdim=True))
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    token_ids_R1 = token_ids_R[:, None]
    ranks_R1 = 1 + (keys_RV < keys_RV.gather(1, token_ids_R1)).sum(dim=-1, keepdim=True)
    top_ids_RN = keys_RV.topk(min(num_top, keys_RV.shape[1]), largest=False).indices
    columns = (
        token_ids_R1,
        logprobs_RV.gather(1, token_ids_R1),
        ranks_R1,
        top_ids_RN,
        logprobs_RV.gather(1, top_ids_RN),
    )
    return torch.cat([column.double() for column in columns], dim=1)


def unpack_logprobs(row: list[float], num_top: int) -> TokenLogprob:
    """One row of `pack_logprobs`, on the host, with the first `num_top` of its alternatives."""
    token_id, logprob, rank, *top = row
    ids, logprobs = top[: len(top) // 2], top[len(top) // 2 :]
    best = tuple(TopLogprob(int(i), p) for i, p in zip(ids[:num_top], logprobs[:num_top], strict=True))
    return TokenLogprob(int(token_id), logprob, int(rank), best)


def pack_prompt_logprobs(logits_TV: Tensor, next_ids_T: Tensor, num: int) -> Tensor:
    """`pack_logprobs` of a prompt's tokens, each with `num` alternatives.

    `next_ids_T[t]` is the token that follows position t, the one that `logits_TV[t]` (fp32) speaks about.
    """
    num_rows = max(1, MAX_LOGITS_AT_ONCE // logits_TV.shape[1])
    slices = zip(logits_TV.split(num_rows), next_ids_T.split(num_rows), strict=True)
    return torch.cat([pack_logprobs(logits, next_ids, num) for logits, next_ids in slices])
