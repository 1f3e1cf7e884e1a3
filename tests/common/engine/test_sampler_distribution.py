import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from common.params import SamplingParams
from tests.common.engine import reference_sampler as reference
from tests.common.engine.drawing import FLAT, HISTORY, PEAKED, SPREAD, VOCAB, assert_drawn_from, draws, sample_one


@pytest.mark.parametrize("logits", [SPREAD, PEAKED, FLAT], ids=["spread", "peaked", "flat"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.5, top_k=7, top_p=0.8, min_p=0.1),
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(logit_bias={2: 3.0, 0: -100.0, 23: 5.0}),
        SamplingParams(
            temperature=0.8,
            top_k=10,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            logit_bias={5: 2.0},
        ),
    ],
    ids=repr,
)
def test_tokens_follow_the_exact_distribution(logits, params):
    tokens = draws(logits, params, **HISTORY)
    logits = reference.edited(logits, params, HISTORY["prompt"], HISTORY["output"])
    assert_drawn_from(tokens, reference.distribution(logits, params))


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    tokens = draws(PEAKED[:4], SamplingParams(temperature=4.0), num_positions=64)
    for first, second in ((tokens[:, :-1:2], tokens[:, 1::2]), (tokens[:-1:2], tokens[1::2])):
        table = np.zeros((4, 4))
        np.add.at(table, (first.flatten(), second.flatten()), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_any_token_is_the_one_that_plain_python_draws():
    generator = torch.Generator().manual_seed(0)
    choices = itertools.product([0.0, 0.3, 1.0, 2.5], [0, 1, 5], [1.0, 0.7], [0.0, 0.3], [1.0, 1.4])
    for index, (temperature, top_k, top_p, min_p, repetition) in enumerate(choices):
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            seed=index << 30,
        )
        logits = (4 * torch.randn(VOCAB, generator=generator)).tolist()
        edited = reference.edited(logits, params, HISTORY["prompt"], HISTORY["output"])
        for position in (9, 10, 2**32 + 1):
            assert sample_one(logits, params, position, **HISTORY) == reference.draw(edited, params, position)


@pytest.mark.parametrize("top_k", [0, 150])
def test_top_p_of_a_wide_row_is_that_of_a_sort(top_k):
    generator = torch.Generator().manual_seed(4)
    for seed, (top_p, temperature) in enumerate(itertools.product([0.99, 0.9, 0.5, 0.1, 1e-4], [0.5, 1.0, 100.0])):
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        logits = (3 * torch.randn(999, generator=generator)).tolist()
        assert sample_one(logits, params, 50) == reference.draw(logits, params, 50)
