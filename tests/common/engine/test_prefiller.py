from __future__ import annotations

import pytest
import torch

from common.config import PrefillConfig
from common.engine.chunks import Chunk
from common.engine.setup import build
from common.errors import Internal
from tests.support.models import VOCAB, dummy_model_folder, make_request

pytest.importorskip("triton")

from common.kernels.operations import KernelOperations


def kernels(config, device, *, deterministic):
    return KernelOperations(config, device)


@pytest.fixture
def parts():
    config = PrefillConfig(model=dummy_model_folder(), load_format="dummy", device="cpu", num_blocks=8)
    return build(config, choose=kernels)


@pytest.fixture
def batches(parts, monkeypatch):
    """What the model is run on. It gives zeros."""
    seen = []

    def forward(batch, kv_cache, after_layer=None):
        seen.append(batch)
        return torch.zeros(1, VOCAB)

    monkeypatch.setattr(parts.model, "forward", forward)
    return seen


@pytest.mark.parametrize("max_tokens", [32, 2048])
def test_warming_up_stays_within_the_context_and_the_largest_step(parts, batches, max_tokens):
    parts.prefiller.warm_up(max_tokens)
    assert max(len(batch.token_ids_T) for batch in batches) == max_tokens
    assert max(int(batch.positions_T.max()) for batch in batches) < parts.model.config.context_length


def test_warming_up_draws_as_a_first_prompt_does(parts, batches, monkeypatch):
    drawn = []
    monkeypatch.setattr("common.engine.fused_draw.fused_draw", lambda sequences, logits, *_: drawn.append(len(logits)))
    parts.prefiller.warm_up(16)
    assert drawn == [1] * len(batches)


REQUESTS = (
    {},
    {"temperature": 0.8, "seed": 7, "top_p": 0.7},
    {"temperature": 1.0, "seed": 1, "presence_penalty": 1.5, "num_logprobs": 2},
    {"temperature": 1.0, "seed": 4, "logit_bias": {9: 30.0}},
    {"num_logprobs": 0, "num_prompt_logprobs": 1},
)


def prefiller_of(choose, monkeypatch):
    """Its model's logits depend on the last token alone; token 0 makes them NaN."""
    config = PrefillConfig(model=dummy_model_folder(), load_format="dummy", device="cpu", num_blocks=64)
    parts = build(config, choose=choose)
    table_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    table_VV[0, 5] = float("nan")

    def forward(batch, kv_cache, after_layer=None):
        tokens_T = batch.token_ids_T
        return table_VV[tokens_T if batch.logit_rows is None else tokens_T[batch.logit_rows]]

    monkeypatch.setattr(parts.model, "forward", forward)
    return parts


@pytest.fixture
def on_device(monkeypatch):
    return prefiller_of(kernels, monkeypatch)


def sequences_of(parts, last_tokens, requests=REQUESTS):
    """A prompt for each last token."""
    sequences = []
    for last, request in zip(last_tokens, requests, strict=False):
        sequences.append(make_request([11, 12, 13, last], **request))
        sequences[-1].block_table = parts.pool.allocate(1)
    return sequences


def launch(parts, sequences, start=0, end=4):
    return parts.prefiller.run([Chunk(sequence, start, end) for sequence in sequences])


def test_a_step_that_is_read_late_brings_what_the_sampler_draws_at_once(on_device, monkeypatch):
    at_once = prefiller_of(None, monkeypatch)
    expected = launch(at_once, sequences_of(at_once, range(20, 25))).read()
    late = launch(on_device, sequences_of(on_device, range(20, 25)))
    # Takes the same slots of the sampling state.
    launch(on_device, sequences_of(on_device, range(40, 45), REQUESTS[::-1]))
    for first, other in zip(late.read().values(), expected.values(), strict=True):
        assert first.token_id == other.token_id
        assert (first.logprob is None) == (other.logprob is None)
        if other.logprob is not None:
            assert first.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
            assert [top.token_id for top in first.logprob.top] == [top.token_id for top in other.logprob.top]
        assert [entry.token_id for entry in first.prompt_logprobs] == [
            entry.token_id for entry in other.prompt_logprobs
        ]


def test_nothing_is_read_before_somebody_asks(on_device, monkeypatch):
    def refuse(*_):
        raise AssertionError("something waits for the device")

    for name in ("tolist", "item", "cpu", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with torch.inference_mode():
        requests = [REQUESTS[1], {**REQUESTS[2], "temperature": 0.0}, REQUESTS[4]]
        launch(on_device, sequences_of(on_device, [20, 21, 22], requests))


def test_bad_logits_are_the_error_of_their_sequence_alone(on_device):
    good, bad, other = sequences_of(on_device, [20, 0, 22])
    first_tokens = launch(on_device, [good, bad, other]).read()
    assert isinstance(first_tokens[bad], Internal)
    assert first_tokens[good].token_id == launch(on_device, sequences_of(on_device, [20])).read().popitem()[1].token_id
    assert first_tokens[other].logprob.token_id == first_tokens[other].token_id


def test_prompt_logprobs_of_all_chunks_come_with_the_first_token(on_device):
    request = {"num_prompt_logprobs": 0}
    (whole,) = launch(on_device, sequences_of(on_device, [20], [request])).read().values()
    (sequence,) = sequences_of(on_device, [20], [request])
    assert launch(on_device, [sequence], 0, 2).read() == {}
    (cut,) = launch(on_device, [sequence], 2, 4).read().values()
    assert cut == whole
    assert len(cut.prompt_logprobs) == 3


def test_what_was_kept_of_an_attempt_is_not_told_with_the_next(on_device):
    (sequence,) = sequences_of(on_device, [20], [{"num_prompt_logprobs": 0}])
    launch(on_device, [sequence], 0, 2)
    on_device.prefiller.forget(sequence)
    (first,) = launch(on_device, [sequence]).read().values()
    assert len(first.prompt_logprobs) == 3
