import math

from hypothesis import given, settings
from hypothesis import strategies as st

from common.params import SamplingParams
from tests.common.engine import reference_sampler as reference
from tests.common.engine.drawing import FINITE, FLAT, ROW, SPREAD, VOCAB, assert_drawn_from, draws, sample_one, support

DISTINCT = st.lists(FINITE.map(lambda x: round(x, 3)), min_size=2, max_size=40, unique=True)


@settings(max_examples=60, deadline=None)
@given(
    logits=DISTINCT, temperature=st.floats(1e-6, 1e6), seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40)
)
def test_narrowest_truncation_is_greedy(logits, temperature, seed, position):
    best = logits.index(max(logits))
    for narrow in ({"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}):
        params = SamplingParams(temperature=temperature, seed=seed, **narrow)
        assert sample_one(logits, params, position) == best


@settings(max_examples=60, deadline=None)
@given(row=ROW)
def test_any_valid_parameters_draw_a_token_that_is_kept(row):
    row["params"].validate(7)
    token_id = sample_one(row["logits"], row["params"], row["position"], **row["history"])
    history = row["history"]
    held_open = history["min_tokens"] and row["position"] < len(history["prompt"]) + history["min_tokens"]
    assert not (held_open and token_id in history["stops"])


def test_widest_truncation_keeps_every_token():
    wide = SamplingParams(top_k=VOCAB, top_p=1.0, min_p=0.0)
    assert (draws(SPREAD, wide, num_seeds=16) == draws(SPREAD, SamplingParams(), num_seeds=16)).all()


def test_least_temperature_is_greedy_and_the_greatest_is_uniform():
    assert (draws(SPREAD, SamplingParams(temperature=1e-300), num_seeds=8) == SPREAD.index(max(SPREAD))).all()
    assert_drawn_from(draws(SPREAD, SamplingParams(temperature=1e300)), [1 / VOCAB] * VOCAB)


def test_equal_logits_go_to_the_lowest_token_id():
    assert sample_one(FLAT, SamplingParams(temperature=0)) == 0
    assert sample_one([1.0, 2.0, 2.0, 2.0], SamplingParams(temperature=0)) == 1
    assert support([1.0, 2.0, 2.0, 2.0], SamplingParams(top_k=2)) == {1, 2}
    assert support([1.0, 2.0, 2.0, 2.0], SamplingParams(top_p=0.25)) == {1}
    assert support([1.0, 2.0, 2.0, 2.0], SamplingParams(min_p=1.0)) == {1, 2, 3}


def test_forbidden_logits_of_the_model_are_never_drawn():
    logits = [-math.inf if index % 3 else x for index, x in enumerate(SPREAD)]
    params = SamplingParams(temperature=100.0, top_p=0.999)
    assert_drawn_from(draws(logits, params), reference.distribution(logits, params))
