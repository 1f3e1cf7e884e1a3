"""What the tests of the sampler share: rows of logits, and short ways to draw from them."""

import math

import numpy as np
import torch
from hypothesis import strategies as st
from scipy import stats

from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams

VOCAB = 24
SPREAD = [round(3 * math.sin(2.7 * i) + 0.05 * i, 4) for i in range(VOCAB)]
PEAKED = [6.0, 5.0, 4.5, 4.5, 4.5, 2.0] + [-1.0 - 0.1 * i for i in range(VOCAB - 6)]
FLAT = [0.0] * VOCAB


def add(state, slot, params, *, stops=(), min_tokens=0, prompt=(), output=(), num_logprobs=None):
    state.add(slot, params, stops, min_tokens, prompt, output, num_logprobs)


def sample_one(logits, params, position=10, **history):
    """The token of a batch of one row."""
    state = SamplingState(1, len(logits), "cpu")
    add(state, 0, params, **history)
    return Sampler().sample(torch.tensor([logits]), state, [0], [position]).token_ids[0]


def draws(logits, params, *, num_seeds=128, num_positions=48, **history):
    """Tokens [seed, position], drawn from the same logits. Counts are put back after each, so that draws are alike."""
    state = SamplingState(num_seeds, len(logits), "cpu")
    for slot in range(num_seeds):
        values = {name: getattr(params, name) for name in SamplingParams.__slots__}
        add(state, slot, SamplingParams(**values | {"seed": 1000 + slot}), **history)
    counts = state.output_counts_NV.clone()
    logits_SV = torch.tensor([logits]).repeat(num_seeds, 1)
    columns = []
    for position in range(num_positions):
        columns.append(Sampler().sample(logits_SV, state, range(num_seeds), [100 + position] * num_seeds).token_ids)
        state.output_counts_NV.copy_(counts)
    return np.array(columns).T


def assert_drawn_from(tokens, probabilities):
    """Pearson's chi-square of the drawn tokens, rare ones together; what has no probability is never drawn."""
    counts = np.bincount(tokens.flatten(), minlength=len(probabilities))
    expected = np.array(probabilities) * tokens.size
    assert (counts[expected == 0] == 0).all()
    common = expected >= 8
    observed, wanted = list(counts[common]), list(expected[common])
    if rest := expected[~common].sum():
        observed.append(counts[~common].sum())
        wanted.append(rest)
    if len(observed) > 1:
        assert stats.chisquare(observed, wanted).pvalue > 1e-3


HISTORY = {"prompt": [0, 3, 3, 7], "output": [1, 3, 9, 9, 9]}


def support(logits, params, **history):
    return set(draws(logits, params, num_seeds=64, num_positions=16, **history).flatten().tolist())


FINITE = st.floats(-30, 30, width=32)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 5.0, 1e30]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-9]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 1e-40, 1e40]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {0: 5.0, 6: -100.0}]),
)
ROW = st.fixed_dictionaries(
    {
        "logits": st.lists(FINITE, min_size=7, max_size=7),
        "params": PARAMS,
        "position": st.integers(0, 2**33),
        "history": st.fixed_dictionaries(
            {
                "prompt": st.lists(st.integers(0, 6), max_size=4),
                "output": st.lists(st.integers(0, 6), max_size=4),
                "min_tokens": st.sampled_from([0, 2**32]),
                "stops": st.sampled_from([(), (0, 3)]),
                "num_logprobs": st.sampled_from([None, 0, 3, 9]),
            }
        ),
    }
)
