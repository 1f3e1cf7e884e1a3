from common.engine.chunks import MOST_SCORED_TOKENS, plan_chunks
from tests.support.models import make_request

BLOCK = 16


def spans(*sequences, max_batch_tokens=4096):
    chunks = plan_chunks(sequences, max_batch_tokens=max_batch_tokens, block_size=BLOCK)
    return [(chunk.start, chunk.end) for chunk in chunks]


def test_prompts_share_the_budget_in_order_and_are_cut_at_blocks():
    assert spans(make_request([1] * 40), make_request([1] * 100), max_batch_tokens=100) == [(0, 40), (0, 48)]


def test_prompts_whose_tokens_are_scored_share_a_budget_of_their_own():
    plain, scored = (make_request([1] * 600, num_prompt_logprobs=number) for number in (None, 2))
    also_scored = make_request([1] * 20, num_prompt_logprobs=0)
    assert spans(plain, scored, also_scored) == [(0, 600), (0, MOST_SCORED_TOKENS)]
    scored.num_computed = MOST_SCORED_TOKENS
    assert spans(scored, also_scored) == [(MOST_SCORED_TOKENS, 600), (0, 20)]
