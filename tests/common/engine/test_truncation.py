import math

import pytest
import torch

from common.engine.sampling_state import DrawnRows
from common.engine.truncation import truncate

NUM_ROWS = 3


def rows(*, top_k=None, top_p=None, min_p=None):
    """One value for each row, or None where no row uses a truncation."""

    def column(values, dtype):
        return None if values is None else torch.tensor(values, dtype=dtype)[:, None]

    return DrawnRows(
        index_R=torch.arange(NUM_ROWS),
        seed_words_R2=torch.zeros(NUM_ROWS, 2, dtype=torch.int64),
        temperature_R1=torch.ones(NUM_ROWS, 1),
        top_k_R1=column(top_k, torch.int64),
        max_top_k=max(top_k or [0]),
        top_p_R1=column(top_p, torch.float64),
        log_min_p_R1=column(min_p and [math.log(p) if p else -math.inf for p in min_p], torch.float32),
    )


def winners(z, scores, truncations):
    """The token of the largest score in each row, all rows of the same z and scores."""
    z, scores = (torch.tensor([row] * NUM_ROWS, dtype=torch.float32) for row in (z, scores))
    return truncate(scores, z, truncations).argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    "truncations",
    [rows(top_k=[0, 1, 2]), rows(top_p=[1.0, 0.5, 0.9]), rows(min_p=[0.0, 0.9, 0.2])],
    ids=["top_k", "top_p", "min_p"],
)
def test_each_row_has_its_own_truncation_and_a_row_without_keeps_the_least_probable_token(truncations):
    assert winners([0.0, -1.0, -90.0], [1.0, 2.0, 3.0], truncations) == [2, 0, 1]


def test_winner_is_the_best_score_among_the_kept_tokens_however_many_are_rejected():
    z = [-0.01 * token_id for token_id in range(500)]
    scores = [float(token_id % 499) for token_id in range(500)]
    truncations = rows(top_p=[0.3, 1e-300, 1.0])
    share = 0.3 * math.fsum(map(math.exp, z))
    num_kept = next(n for n in range(500) if math.fsum(map(math.exp, z[:n])) >= share)
    assert winners(z, scores, truncations) == [num_kept - 1, 0, 498]


@pytest.mark.parametrize("z", [[math.nan] * 3, [-math.inf, math.nan, -math.inf]], ids=["nan", "infinity"])
@pytest.mark.parametrize("top_k", [None, [0, 1, 2]])
def test_rows_without_a_most_probable_token_come_to_an_end_too(z, top_k):
    scores = truncate(torch.tensor([z] * 3), torch.tensor([z] * 3), rows(top_p=[0.5, 0.9, 1e-300], top_k=top_k))
    assert not scores.amax(dim=-1).isfinite().any()
