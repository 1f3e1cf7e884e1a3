import itertools

import pytest
import torch

from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.kernels.sampling import DeviceSampling, sample
from common.params import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two tiles, the second one not full; more groups than the kernel holds candidates of.
VOCAB = 4500
TOP_K = [0, 1, 5, 64, 65, 400, VOCAB]
TOP_P = [1.0, 0.999, 0.9, 0.1, 1e-9]

# Infinities are meant where they come up, and numpy warns of them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")


class Batch:
    """Rows with their parameters: what the sampler draws from them, and what the kernels draw."""

    def __init__(self, logits, params, positions=None):
        self.logits = logits.to(DEVICE)
        self.positions = torch.as_tensor(list(positions or range(7, 7 + len(params))), device=DEVICE)
        self.state = SamplingState(len(params), logits.shape[1], DEVICE)
        for slot, row in enumerate(params):
            self.state.add(slot, row, [], 0, [], [], None)
        greedy = torch.tensor([row.greedy for row in params], device=DEVICE)
        self.device_params = DeviceSampling(
            self.state.temperature_N.masked_fill(greedy, 0),
            self.state.seed_words_N2,
            self.state.top_k_N.int(),
            self.state.top_p_N,
            self.state.log_min_p_N,
        )

    def draw(self, token_dtype=torch.int64):
        """(tokens, scores) by the kernels."""
        tokens = torch.full((len(self.logits),), -7, dtype=token_dtype, device=DEVICE)
        scores = torch.full((len(self.logits),), float("nan"), device=DEVICE)
        sample(self.logits, self.device_params, self.positions, tokens, scores)
        return tokens, scores

    def expected(self):
        """(tokens, scores) by the sampler."""
        pending = Sampler().draw(self.logits, self.state, range(len(self.logits)), self.positions)
        return pending.token_ids_S, pending.packed[len(self.logits) :].float()


def assert_draws_what_the_sampler_draws(logits, params, positions=None):
    batch = Batch(logits, params, positions)
    tokens, scores = batch.draw()
    expected_tokens, expected_scores = batch.expected()
    wrong = (tokens != expected_tokens).nonzero().flatten().tolist()
    assert not wrong, [(params[row], tokens[row].item(), expected_tokens[row].item()) for row in wrong]
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-6)


def random_logits(num_rows, vocab_size, seed=0, scale=3.0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def mixes(*, temperature=(0.7,), top_k=(0,), top_p=(1.0,), min_p=(0.0,), times=1):
    rows = itertools.product(range(times), temperature, top_k, top_p, min_p)
    return [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=2654435761**2 * (number + 1) % 2**64)
        for number, (_, t, k, p, m) in enumerate(rows)
    ]


@pytest.mark.parametrize("temperature", [1e-5, 0.7, 100.0])
def test_rows_of_every_mix_of_parameters_share_a_batch(temperature):
    params = mixes(temperature=[temperature], top_k=[0, 1, 5, 64, 400], top_p=[1.0, 0.9])
    params += mixes(temperature=[0.0, 1.0], min_p=[0.05])
    assert_draws_what_the_sampler_draws(random_logits(len(params), VOCAB), params)


@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_top_p_and_min_p_of_every_size(min_p):
    params = mixes(temperature=[1.5], top_p=TOP_P, min_p=[min_p]) + mixes(top_k=[20], top_p=[1.0, 0.5], min_p=[min_p])
    assert_draws_what_the_sampler_draws(random_logits(len(params), VOCAB, seed=1), params)


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 1000, 4099, 8200])
def test_vocabulary_of_any_size(vocab_size):
    params = mixes(temperature=[0.9], top_k=[3, 100], top_p=[1.0, 0.8]) + mixes(temperature=[0.0, 0.9])
    assert_draws_what_the_sampler_draws(random_logits(len(params), vocab_size, seed=vocab_size), params)


def test_temperatures_that_overflow_or_vanish():
    params = mixes(temperature=[1e-45, 1e-30, 1e300], top_k=[0, 7], top_p=[1.0, 0.5])
    logits = random_logits(len(params), VOCAB, seed=2)
    logits[:, ::3] *= 1e37
    assert_draws_what_the_sampler_draws(logits, params)


@pytest.mark.parametrize("levels", [1, 40])
def test_lower_id_goes_first_among_equals(levels):
    params = mixes(temperature=[0.8], top_k=[0, 3, 50, 300], top_p=[1.0, 0.6]) + mixes(temperature=[0.0], min_p=[0.5])
    logits = random_logits(len(params), VOCAB, seed=3).mul(10).round() % levels
    assert_draws_what_the_sampler_draws(logits, params)


def test_logits_that_only_the_temperature_makes_equal():
    logits = 30 + random_logits(6, VOCAB, seed=4, scale=1e-5)
    logits[:, 4000] = 31
    assert_draws_what_the_sampler_draws(logits, mixes(top_k=[5, 60, 0], top_p=[1.0, 1e-3]))


def test_flat_distribution_of_which_one_token_is_kept():
    params = mixes(temperature=[100.0], top_p=[1e-9], times=3) + mixes(temperature=[1e6], top_k=[1], times=2)
    assert_draws_what_the_sampler_draws(random_logits(len(params), VOCAB, seed=5, scale=1e-3), params)


def test_tokens_of_no_probability_are_never_drawn():
    params = mixes(temperature=[0.7, 50.0], top_k=[0, 10, 100], top_p=[1.0, 0.95])
    logits = random_logits(len(params), VOCAB, seed=6)
    logits[:, torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[: VOCAB - 30]] = -float("inf")
    assert_draws_what_the_sampler_draws(logits, params)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 5, 0.9), (0.7, 0, 1.0), (0.7, 5, 0.9), (0.7, 300, 0.9)]
)
def test_row_without_a_finite_maximum_is_reported_and_leaves_the_others_alone(temperature, top_k, top_p):
    params = mixes(temperature=[temperature], top_k=[top_k], top_p=[top_p], times=6)
    logits = random_logits(6, VOCAB, seed=7)
    logits[0, 17] = float("nan")
    logits[1, VOCAB - 1] = -float("nan")
    logits[2, 4100] = float("inf")
    logits[3] = -float("inf")
    logits[4] = float("nan")
    batch = Batch(logits, params)
    tokens, scores = batch.draw()
    expected_tokens, expected_scores = batch.expected()
    assert scores.isfinite().tolist() == expected_scores.isfinite().tolist() == [False] * 5 + [True]
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    assert tokens[5] == expected_tokens[5]


def test_row_gives_the_same_bits_alone_and_in_a_batch():
    params = mixes(temperature=[0.8], top_k=[0, 40, 400], top_p=[1.0, 0.9]) + mixes(temperature=[0.0])
    logits = random_logits(len(params), VOCAB, seed=8)
    tokens, scores = Batch(logits, params).draw()
    for row in range(len(params)):
        token, score = Batch(logits[row : row + 1], params[row : row + 1], [7 + row]).draw()
        assert (token[0], score[0]) == (tokens[row], scores[row])


def test_positions_beyond_32_bits_and_every_bit_of_the_seed_count():
    params = [SamplingParams(seed=seed) for seed in (0, 1, 2**32, 2**64 - 1)] * 3
    positions = [position for position in (0, 2**31, 2**32 + 1) for _ in range(4)]
    logits = random_logits(1, 1000, seed=9, scale=0.1).repeat(len(params), 1)
    assert_draws_what_the_sampler_draws(logits, params, positions)
    assert len(set(Batch(logits, params, positions).draw()[0].tolist())) == len(params)


def test_narrow_integers_do_as_well():
    params = mixes(temperature=[0.0, 0.8, 1.0], top_k=[0, 40])
    batch = Batch(random_logits(len(params), 1000, seed=10), params)
    wide, _ = batch.draw()
    batch.positions = batch.positions.int()
    batch.device_params = batch.device_params._replace(seed_words_S2=batch.state.seed_words_N2.to(torch.int32))
    narrow, _ = batch.draw(torch.int32)
    assert narrow.dtype == torch.int32
    assert torch.equal(wide, narrow.long())


def test_logits_may_be_rows_of_a_wider_buffer():
    params = mixes(temperature=[0.0, 0.8], top_k=[0, 5], top_p=[1.0, 0.9])
    batch = Batch(random_logits(len(params), 1000, seed=11), params)
    tokens, _ = batch.draw()
    wider = torch.full((len(params), 1037), float("nan"), device=DEVICE)
    wider[:, :1000] = batch.logits
    batch.logits = wider[:, :1000]
    assert torch.equal(batch.draw()[0], tokens)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("vocab_size", [2048, 151936])
def test_large_rows_of_every_mix(vocab_size):
    params = mixes(
        temperature=[0.0, 1e-5, 0.6, 1.0, 5.0, 100.0], top_k=TOP_K, top_p=[1.0, 0.95, 0.1], min_p=[0.0, 0.05]
    )
    assert_draws_what_the_sampler_draws(random_logits(len(params), vocab_size, seed=12), params)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_one_captured_graph_serves_any_parameters():
    first = Batch(random_logits(24, VOCAB, seed=13), mixes(temperature=[0.0], times=24))
    tokens, scores = first.draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(first.logits, first.device_params, first.positions, tokens, scores)
    rows = mixes(temperature=[0.0, 0.8], top_k=[0, 40, 400], top_p=[1.0, 0.9], min_p=[0.0, 0.1])
    for step in range(4):
        batch = Batch(random_logits(24, VOCAB, seed=14 + step), rows, range(step, step + 24))
        first.logits.copy_(batch.logits)
        first.positions.copy_(batch.positions)
        for kept, new in zip(first.device_params, batch.device_params, strict=True):
            kept.copy_(new)
        graph.replay()
        expected_tokens, _ = batch.expected()
        assert torch.equal(tokens, expected_tokens)
