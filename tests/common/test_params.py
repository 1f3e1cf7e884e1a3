import math
from dataclasses import FrozenInstanceError

import pytest

from common.errors import InvalidArgument
from common.params import SamplingParams, StoppingParams

VOCAB = 100


def bias(num_entries):
    return dict.fromkeys(range(num_entries), 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.01),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", math.inf),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: -math.inf}),
    ],
)
def test_sampling_value_out_of_its_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidArgument) as refusal:
        SamplingParams(**{field: value}).validate(VOCAB)
    assert refusal.value.field == f"sampling.{field}"
    assert str(refusal.value).startswith(f"sampling.{field} must be ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("stop", ("",)),
        ("stop", ("end", "")),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (VOCAB,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * 65),
    ],
)
def test_stopping_value_out_of_its_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidArgument) as refusal:
        StoppingParams(**{field: value}).validate(VOCAB)
    assert refusal.value.field == f"stopping.{field}"
    assert str(refusal.value).startswith(f"stopping.{field} must be ")


def test_refusal_names_the_limit_and_the_value():
    with pytest.raises(InvalidArgument, match=r"^sampling\.top_p must be in \(0, 1\], got 1\.5$"):
        SamplingParams(top_p=1.5).validate(VOCAB)
    with pytest.raises(InvalidArgument, match=r"token ids below the vocabulary size 100, got 100$"):
        SamplingParams(logit_bias={100: 1.0}).validate(VOCAB)
    with pytest.raises(InvalidArgument, match=r"at most 1,024 entries, got 1,025 entries$"):
        SamplingParams(logit_bias=bias(1025)).validate(5000)
    with pytest.raises(InvalidArgument, match=r"in \[0, max_tokens = 4\], got 5$"):
        StoppingParams(max_tokens=4, min_tokens=5).validate(VOCAB)


def test_values_at_their_limits_are_accepted():
    SamplingParams().validate(VOCAB)
    SamplingParams(temperature=0, top_p=1e-300, top_k=2**32 - 1, min_p=1, seed=2**64 - 1).validate(VOCAB)
    SamplingParams(presence_penalty=2, frequency_penalty=-2, repetition_penalty=1e-6).validate(VOCAB)
    SamplingParams(logit_bias=bias(1024) | {99: -100.0, 0: 100.0}).validate(5000)
    StoppingParams().validate(VOCAB)
    StoppingParams(max_tokens=1, min_tokens=1, stop=("x",) * 16, stop_token_ids=(99,) * 64).validate(VOCAB)


def test_zero_temperature_is_greedy_and_neutral_penalties_are_none():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy
    assert not SamplingParams(logit_bias={1: 1.0}).has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties


def test_params_are_values():
    assert SamplingParams(seed=3) == SamplingParams(seed=3)
    with pytest.raises(FrozenInstanceError):
        SamplingParams().seed = 4
