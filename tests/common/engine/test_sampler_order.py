"""The order of edits and truncations, by cases where another order keeps other tokens; and the history they look at."""

import math

import torch

from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams
from tests.common.engine import reference_sampler as reference
from tests.common.engine.drawing import SPREAD, add, assert_drawn_from, draws, sample_one, support


def test_penalties_come_before_truncation():
    logits = [2.0, 1.9, 1.8, 0.0]
    assert support(logits, SamplingParams(top_k=2), output=[0]) == {0, 1}
    assert support(logits, SamplingParams(top_k=2, presence_penalty=1.0), output=[0]) == {1, 2}


def test_bias_comes_after_the_repetition_penalty():
    # (2 / 2) + 2 = 3 beats 2.5; (2 + 2) / 2 = 2 would not.
    params = SamplingParams(temperature=0, repetition_penalty=2.0, logit_bias={0: 2.0})
    assert sample_one([2.0, 2.5], params, prompt=[0]) == 0


def test_repetition_penalty_comes_before_presence_and_frequency():
    # (2 / 2) - 1 - 1 = -1 beats -1.2; (2 - 2) / 2 = 0 or (2 - 1) / 2 - 1 = -0.5 would beat -0.9.
    params = SamplingParams(temperature=0, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    assert sample_one([2.0, -1.2], params, output=[0]) == 0
    assert sample_one([2.0, -0.9], params, output=[0]) == 1


def test_temperature_comes_before_top_p():
    logits = [2.0, 1.0, 0.0, -1.0]
    assert support(logits, SamplingParams(top_p=0.6)) == {0}
    assert support(logits, SamplingParams(top_p=0.6, temperature=5.0)) == {0, 1, 2}


def test_top_k_comes_before_top_p():
    # Among the best two the first has 0.6 of the share; among all of them it has 0.4.
    logits = [math.log(p) for p in (0.4, 0.8 / 3, 0.2, 0.4 / 3)]
    assert support(logits, SamplingParams(top_p=0.5)) == {0, 1}
    assert support(logits, SamplingParams(top_p=0.5, top_k=2)) == {0}


def test_top_p_comes_before_min_p():
    # Had min_p taken the last two first, the best token alone would reach the share.
    logits = [math.log(p) for p in (0.5, 0.3, 0.1, 0.1)]
    assert support(logits, SamplingParams(top_p=0.6, min_p=0.3)) == {0, 1}
    assert support(logits, SamplingParams(top_p=0.6, min_p=0.7)) == {0}


def test_repetition_counts_prompt_and_output_but_presence_and_frequency_count_output_alone():
    logits = [1.0, 0.5]
    for params, where, expected in [
        (SamplingParams(temperature=0, repetition_penalty=3.0), "prompt", 1),
        (SamplingParams(temperature=0, repetition_penalty=3.0), "output", 1),
        (SamplingParams(temperature=0, presence_penalty=2.0), "prompt", 0),
        (SamplingParams(temperature=0, presence_penalty=2.0), "output", 1),
        (SamplingParams(temperature=0, frequency_penalty=2.0), "prompt", 0),
        (SamplingParams(temperature=0, frequency_penalty=2.0), "output", 1),
    ]:
        assert sample_one(logits, params, **{where: [0]}) == expected


def test_repetition_penalty_multiplies_negative_logits():
    assert sample_one([-1.0, -1.5], SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[0]) == 1


def test_drawn_tokens_count_towards_the_next_penalties():
    state = SamplingState(2, 3, "cpu")
    add(state, 0, SamplingParams(temperature=0, frequency_penalty=1.0))
    add(state, 1, SamplingParams(temperature=0))
    logits = torch.tensor([[2.5, 2.0, 0.0]]).repeat(2, 1)
    steps = [Sampler().sample(logits, state, [0, 1], [p, p]).token_ids for p in range(5)]
    assert [tokens[0] for tokens in steps] == [0, 1, 0, 1, 0]
    assert [tokens[1] for tokens in steps] == [0] * 5


def test_a_slot_forgets_the_sequence_that_left_it():
    state = SamplingState(1, 3, "cpu")
    heavy = SamplingParams(temperature=0, repetition_penalty=5.0, frequency_penalty=2.0, logit_bias={1: 50.0})
    logits = torch.tensor([[2.5, 2.0, 0.0]])
    add(state, 0, heavy, prompt=[0], output=[0, 0], stops=[0], min_tokens=9)
    assert Sampler().sample(logits, state, [0], [3]).token_ids == [1]
    state.remove(0)
    light = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.1, logit_bias={2: 0.5})
    add(state, 0, light, stops=[2], min_tokens=1)
    assert Sampler().sample(logits, state, [0], [0]).token_ids == [0]


def test_stop_tokens_are_not_drawn_before_min_tokens():
    state = SamplingState(1, 4, "cpu")
    add(state, 0, SamplingParams(temperature=0), stops=[0, 2], min_tokens=3, prompt=[1] * 5)
    logits = torch.tensor([[9.0, 1.0, 8.0, 0.0]])
    tokens = [Sampler().sample(logits, state, [0], [5 + index]).token_ids[0] for index in range(5)]
    assert tokens == [1, 1, 1, 0, 0]


def test_min_tokens_counts_the_output_before_a_resumption():
    logits = [9.0, 1.0]
    history = {"stops": [0], "min_tokens": 3, "prompt": [1, 1]}
    assert sample_one(logits, SamplingParams(temperature=0), 4, **history, output=[1, 1]) == 1
    assert sample_one(logits, SamplingParams(temperature=0), 5, **history, output=[1, 1, 1]) == 0


def test_min_tokens_beats_the_bias_and_shifts_its_share_to_the_others():
    params = SamplingParams(logit_bias={0: 100.0})
    forbidden = draws(SPREAD, params, stops=[0, 5], min_tokens=10, prompt=[1] * 140)
    edited = reference.edited(SPREAD, params, forbidden={0, 5})
    assert_drawn_from(forbidden, reference.distribution(edited, params))
