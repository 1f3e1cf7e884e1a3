import pytest
import torch

from common.engine.philox import WORD, gumbel_noise
from common.engine.sampler import Sampler
from common.engine.sampling_state import SamplingState
from common.params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

VOCAB = 4099
NUM_SEQS = 33
PLAIN = SamplingParams(temperature=0.8)
GRAPHABLE = SamplingParams(temperature=0.8, top_k=40, min_p=0.01, repetition_penalty=1.2, logit_bias={3: 4.0})
EVERYTHING = SamplingParams(temperature=0.8, top_k=400, top_p=0.9, min_p=0.001, frequency_penalty=0.5)


def filled_state(params, device):
    state = SamplingState(NUM_SEQS, VOCAB, device)
    for slot in range(NUM_SEQS):
        values = {name: getattr(params, name) for name in SamplingParams.__slots__}
        state.add(slot, SamplingParams(**values | {"seed": slot << 31}), [5], 90, [1, 2, 3], [4, 4], 5)
    return state


def logits_of_step(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(NUM_SEQS, VOCAB, generator=generator) * 4


def positions_of_step(step):
    return torch.arange(NUM_SEQS) + 90 + step


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), PLAIN, GRAPHABLE, EVERYTHING], ids=repr)
def test_gpu_draws_the_tokens_that_the_cpu_draws(params):
    slots = range(NUM_SEQS)
    states = [filled_state(params, device) for device in ("cpu", "cuda")]
    for step in range(10):
        cpu, gpu = (
            Sampler().sample(logits_of_step(step).to(state.device), state, slots, positions_of_step(step))
            for state in states
        )
        assert cpu.token_ids == gpu.token_ids
        assert [row.rank for row in cpu.logprobs] == [row.rank for row in gpu.logprobs]
        assert [top.token_id for row in cpu.logprobs for top in row.top] == [
            top.token_id for row in gpu.logprobs for top in row.top
        ]


@pytest.mark.parametrize("params", [PLAIN, GRAPHABLE, EVERYTHING], ids=repr)
def test_row_scores_the_same_bits_alone_and_in_a_batch(params):
    state = filled_state(params, "cuda")
    logits, positions = logits_of_step(0).cuda(), positions_of_step(0).cuda()
    together = Sampler().draw(logits, state, range(NUM_SEQS), positions).packed
    scores, logprobs = together[NUM_SEQS : 2 * NUM_SEQS], together[2 * NUM_SEQS :].view(NUM_SEQS, -1)
    state = filled_state(params, "cuda")
    for slot in range(NUM_SEQS):
        alone = Sampler().draw(logits[slot : slot + 1].clone(), state, [slot], positions[slot : slot + 1]).packed
        assert alone[1] == scores[slot]
        assert torch.equal(alone[2:], logprobs[slot])


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), PLAIN, GRAPHABLE], ids=repr)
def test_draw_without_top_p_can_be_captured_in_a_graph(params):
    slots = range(NUM_SEQS)
    state = filled_state(params, "cuda")
    logits, positions = logits_of_step(0).cuda(), positions_of_step(0).cuda()
    Sampler().draw(logits, state, slots, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pending = Sampler().draw(logits, state, slots, positions)
    eager_state = filled_state(params, "cuda")
    Sampler().draw(logits, eager_state, slots, positions)
    for step in range(1, 5):
        logits.copy_(logits_of_step(step))
        positions.copy_(positions_of_step(step))
        graph.replay()
        assert pending.read() == Sampler().sample(logits, eager_state, slots, positions)


def test_triton_kernel_that_follows_the_page_gives_the_same_noise():
    triton = pytest.importorskip("triton")
    from tests.common.engine.triton_noise import noise_kernel

    seeds, positions = [0, 7, 2**63 + 11], [5, 2**31 + 1, 2**33 + 2]
    words = torch.tensor([[seed & WORD, seed >> 32] for seed in seeds], device="cuda")
    positions = torch.tensor(positions, device="cuda")
    noise = torch.empty(3, VOCAB, device="cuda")
    noise_kernel[(3, triton.cdiv(VOCAB, 1024))](words, positions, noise, VOCAB, 1024)
    assert torch.equal(noise, gumbel_noise(words, positions, VOCAB))
