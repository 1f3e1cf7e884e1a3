import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams
from tests.common.engine.drawing import FLAT, PEAKED, ROW, SPREAD, VOCAB, add


def test_a_resumed_sequence_continues_with_the_same_tokens():
    params = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.5, repetition_penalty=1.2, seed=77)
    prompt = [1, 2, 3]
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(3)) * 2

    def run(output, until):
        state = SamplingState(1, VOCAB, "cpu")
        add(state, 0, params, prompt=prompt, output=output, stops=[4], min_tokens=8)
        output = list(output)
        while len(output) < until:
            rows = logits[len(output) : len(output) + 1]
            output += Sampler().sample(rows, state, [0], [len(prompt) + len(output)]).token_ids
        return output

    whole = run([], 20)
    for cut in (1, 7, 8, 19):
        assert run(whole[:cut], 20) == whole


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=2, max_size=5))
def test_a_row_gives_the_same_token_and_logprobs_alone_and_in_any_batch(rows):
    state = SamplingState(8, 7, "cpu")
    slots = [7, 2, 5, 0, 3][: len(rows)]
    for slot, row in zip(slots, rows, strict=True):
        add(state, slot, row["params"], **row["history"])
    logits = torch.tensor([row["logits"] for row in rows])
    together = Sampler().sample(logits, state, slots, [row["position"] for row in rows])
    for index, row in enumerate(rows):
        alone_state = SamplingState(1, 7, "cpu")
        add(alone_state, 0, row["params"], **row["history"])
        alone = Sampler().sample(logits[index : index + 1], alone_state, [0], [row["position"]])
        assert alone.token_ids == together.token_ids[index : index + 1]
        assert alone.logprobs == together.logprobs[index : index + 1]


@pytest.mark.parametrize("vocab_size", [1001, 2048])
def test_wide_rows_score_the_same_bits_alone_and_in_a_batch(vocab_size):
    state = SamplingState(40, vocab_size, "cpu")
    params = SamplingParams(temperature=0.8, top_p=0.95, min_p=0.001)
    for slot in range(40):
        add(state, slot, params, num_logprobs=5)
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    together = Sampler().draw(logits, state, range(40), range(40)).packed
    scores, logprobs = together[40:80], together[80:].view(40, -1)
    for slot in range(40):
        alone = Sampler().draw(logits[slot : slot + 1].clone(), state, [slot], [slot]).packed
        assert alone[1] == scores[slot]
        assert torch.equal(alone[2:], logprobs[slot])


def test_a_batch_may_change_at_every_step():
    state = SamplingState(4, VOCAB, "cpu")
    logits = torch.tensor([SPREAD, PEAKED, FLAT])
    add(state, 2, SamplingParams(seed=5))
    add(state, 0, SamplingParams(temperature=0))
    first = Sampler().sample(logits[:2], state, [2, 0], [4, 9]).token_ids
    add(state, 3, SamplingParams(seed=6, top_k=2))
    assert Sampler().sample(logits[[2, 1, 0]], state, [3, 0, 2], [7, 9, 4]).token_ids[1:] == first[::-1]
    state.remove(0)
    assert Sampler().sample(logits[:1], state, [2], [4]).token_ids == first[:1]
