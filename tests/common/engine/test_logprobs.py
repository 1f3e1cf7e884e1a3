import math

import pytest
import torch

from common.engine import logprobs as module
from common.engine.logprobs import pack_prompt_logprobs, unpack_logprobs
from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams

VOCAB = 300
LOGITS = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(5)) * 5


def prompt_logprobs(logits_TV, next_ids_T, num):
    return [unpack_logprobs(row, num) for row in pack_prompt_logprobs(logits_TV, next_ids_T, num).tolist()]


def expected(logits_V, token_id, num):
    """Log-probability, rank and the best alternatives, of Python's own arithmetic in float64."""
    logits = logits_V.tolist()
    log_total = math.log(math.fsum(math.exp(x - max(logits)) for x in logits)) + max(logits)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = [(i, logits[i] - log_total) for i in order[:num]]
    return logits[token_id] - log_total, 1 + order.index(token_id), best


def assert_logprob(got, logits_V, token_id, num):
    logprob, rank, best = expected(logits_V, token_id, num)
    assert (got.token_id, got.rank) == (token_id, rank)
    assert got.logprob == pytest.approx(logprob, abs=1e-5)
    assert [top.token_id for top in got.top] == [i for i, _ in best]
    assert [top.logprob for top in got.top] == pytest.approx([value for _, value in best], abs=1e-5)


@pytest.mark.parametrize("num", [0, 1, 20])
def test_prompt_logprobs_are_those_of_the_following_tokens(num):
    next_ids = torch.tensor([5, 299, 0, 17, 17, 3, 250, 8, 101])
    rows = prompt_logprobs(LOGITS, next_ids, num)
    for row, logits, token_id in zip(rows, LOGITS, next_ids.tolist(), strict=True):
        assert_logprob(row, logits, token_id, num)


def test_long_prompt_gives_the_same_in_slices(monkeypatch):
    next_ids = torch.arange(9)
    whole = prompt_logprobs(LOGITS, next_ids, 4)
    monkeypatch.setattr(module, "MAX_LOGITS_AT_ONCE", 2 * VOCAB)
    assert prompt_logprobs(LOGITS, next_ids, 4) == whole


def test_logprobs_are_of_the_raw_logits():
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=3.0, logit_bias={4: 90.0}, seed=8)
    state = SamplingState(1, VOCAB, "cpu")
    state.add(0, params, [], 0, [1, 2, 3], [4, 4], 3)
    (token_id,), (logprob,) = Sampler().sample(LOGITS[:1], state, [0], [5])
    assert token_id == 4
    assert_logprob(logprob, LOGITS[0], 4, 3)


def test_each_row_gets_as_many_alternatives_as_it_asked_for():
    state = SamplingState(4, VOCAB, "cpu")
    for slot, num in enumerate([None, 0, 7, 2]):
        state.add(slot, SamplingParams(seed=slot), [], 0, [], [], num)
    token_ids, logprobs = Sampler().sample(LOGITS[:4], state, [0, 1, 2, 3], [0, 0, 0, 0])
    assert logprobs[0] is None
    for row, num in ((1, 0), (2, 7), (3, 2)):
        assert_logprob(logprobs[row], LOGITS[row], token_ids[row], num)


def test_greedy_token_has_rank_one_and_ties_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, -0.0, 3.0]])
    rows = [prompt_logprobs(logits, torch.tensor([token_id]), 6)[0] for token_id in range(6)]
    assert [row.rank for row in rows] == [4, 1, 5, 2, 6, 3]
    assert [top.token_id for top in rows[0].top] == [1, 3, 5, 0, 2, 4]


def test_no_more_alternatives_than_tokens():
    assert len(prompt_logprobs(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 20)[0].top) == 2


def test_probability_zero_is_minus_infinity():
    logits = torch.tensor([[-math.inf, 2.0, -math.inf]])
    (row,) = prompt_logprobs(logits, torch.tensor([2]), 0)
    assert (row.logprob, row.rank) == (-math.inf, 3)
