import math

import pytest
import torch

from common.engine.sampler import NonFiniteLogits, Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams
from tests.common.engine.drawing import PEAKED, SPREAD, VOCAB, add


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5, top_k=3, min_p=0.1)], ids=repr
)
def test_row_of_non_finite_logits_is_named_and_the_others_are_drawn(bad, params):
    state = SamplingState(3, VOCAB, "cpu")
    for slot in range(3):
        add(state, slot, params, num_logprobs=2)
    logits = torch.tensor([SPREAD, PEAKED, PEAKED])
    clean = Sampler().sample(logits, state, [0, 1, 2], [5, 5, 5])
    logits[1, 7] = bad
    with pytest.raises(NonFiniteLogits, match=r"rows \[1\]") as fault:
        Sampler().sample(logits, state, [0, 1, 2], [5, 5, 5])
    assert fault.value.rows == (1,)
    assert fault.value.reason == "NON_FINITE_LOGITS"
    for row in (0, 2):
        assert fault.value.sampled.token_ids[row] == clean.token_ids[row]
        assert fault.value.sampled.logprobs[row] == clean.logprobs[row]


def test_logits_are_left_as_they_are():
    state = SamplingState(1, VOCAB, "cpu")
    params = SamplingParams(repetition_penalty=2.0, logit_bias={1: 5.0}, top_k=3, top_p=0.5, min_p=0.1)
    add(state, 0, params, prompt=[0, 1], stops=[2], min_tokens=5)
    logits = torch.tensor([SPREAD])
    Sampler().sample(logits, state, [0], [2])
    assert torch.equal(logits, torch.tensor([SPREAD]))


def test_tables_of_vocabulary_width_exist_only_once_they_are_needed():
    state = SamplingState(4, VOCAB, "cpu")
    add(state, 0, SamplingParams(top_p=0.5), prompt=[1, 2], stops=[3], num_logprobs=1)
    Sampler().sample(torch.tensor([SPREAD]), state, [0], [2])
    tables = {"in_prompt_NV", "output_counts_NV", "bias_NV", "stops_NV"}
    assert not tables & vars(state).keys()
    add(state, 1, SamplingParams(logit_bias={1: 1.0}))
    assert tables & vars(state).keys() == {"bias_NV"}
