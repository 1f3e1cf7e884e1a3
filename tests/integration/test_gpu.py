"""The whole system on a CUDA device: what only a device has. The other integration tests run there as well."""

import random

import pytest
import torch

from common.config import TINY_MODEL
from common.engine.buckets import batch_buckets
from common.model.loader import load_model
from pdserve.v1 import types_pb2
from tests.common.model.paged import PagedRunner
from tests.decode_service.test_device_runner import PARAMS
from tests.support.cluster import RealCluster
from tests.support.engine import HandTurnedEngine
from tests.support.models import VOCAB, make_request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = {"device": "cuda", "gpu_memory_fraction": 0.2}
PROMPT = "The for statement is used to iterate over the elements of a sequence"


def mixed_requests(count, *, longer=0):
    draw = random.Random(count)
    return [
        make_request(
            [draw.randrange(VOCAB - 1) for _ in range(draw.randrange(1, 60))],
            max_tokens=8 + index % 30 + longer,
            **PARAMS[index % len(PARAMS)],
        )
        for index in range(count)
    ]


def test_graphs_give_the_tokens_of_eager_steps():
    settings = {**CUDA, "dtype": "bfloat16", "deterministic": True, "max_num_seqs": 16}
    eager = HandTurnedEngine(**settings).run_all(mixed_requests(24))
    captured = HandTurnedEngine(captured=True, **settings)
    assert captured.run_all(mixed_requests(24)) == eager


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_tokens_do_not_depend_on_the_batch_or_on_a_resumption(dtype):
    settings = {**CUDA, "dtype": dtype, "deterministic": True}
    together = HandTurnedEngine(captured=True, num_blocks=600, max_num_seqs=32, **settings)
    expected = together.run_all(mixed_requests(24, longer=70))
    alone = HandTurnedEngine(captured=True, num_blocks=400, max_num_seqs=8, prefix_cache=False, **settings)
    for sequence, tokens in zip(mixed_requests(24, longer=70), expected, strict=True):
        assert alone.run_all([sequence])[0] == tokens
    tight = HandTurnedEngine(captured=True, num_blocks=24, max_num_seqs=32, **settings)
    assert tight.run_all(mixed_requests(24, longer=70)) == expected
    assert tight.scheduler.num_preemptions > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:Warning. Profiler clears events")
def test_a_steady_step_copies_nothing_to_the_device_and_never_waits_for_it():
    engine = HandTurnedEngine(captured=True, **CUDA, dtype="bfloat16", max_num_seqs=8)
    sequences = [make_request(range(5, 5 + 17), max_tokens=200) for _ in range(4)]
    for sequence in sequences:
        engine.open(sequence, local=True)
    while len(engine.tokens(sequences[-1])) < 24:
        engine.turn()
    engine.settle()
    decoding = engine.scheduler.schedule().decoding
    # No sequence gets a block in these steps: 17 prompt tokens and some 24 more lie in the middle of a block.
    assert len(decoding) == 4
    assert all(4 < reservation.sequence.num_computed % 16 < 12 for reservation in decoding)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            with torch.inference_mode():
                for _ in range(3):
                    engine.runner.launch(decoding)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in profile.events()]
    assert not [name for name in names if "HtoD" in name]
    assert sum("DtoH" in name for name in names) == 3


def test_the_newest_position_of_a_full_context_is_reached_and_not_passed():
    engine = HandTurnedEngine(captured=True, **CUDA, num_blocks=64, max_num_seqs=4)
    context_length = engine.parts.identity.context_length
    sequence = make_request(range(VOCAB - 1), max_tokens=context_length)
    tokens = engine.run_all([sequence])[0]
    assert len(tokens) == context_length - (VOCAB - 1)


def test_bfloat16_logits_are_as_near_to_float32_as_transformers_are():
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).cuda()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.bfloat16).cuda()
    from common.engine.device import choose_operations
    from common.model.config import ModelConfig

    device = torch.device("cuda")
    operations = choose_operations(ModelConfig.from_folder(TINY_MODEL), device, deterministic=False)
    model = load_model(TINY_MODEL, dtype="bfloat16", device=device, operations=operations)
    draw = random.Random(1)
    ours, theirs = [], []
    for _ in range(16):
        prompt = [draw.randrange(3, 2048) for _ in range(draw.randrange(2, 200))]
        ids = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            exact = reference(ids).logits[0]
            theirs.append((rounded(ids).logits[0].float() - exact).norm() / exact.norm())
        paged = PagedRunner(model, num_blocks=32, block_size=16)
        logits = model.forward(paged.batch([(paged.admit(prompt), len(prompt))]), paged.cache)
        ours.append((logits - exact).norm() / exact.norm())
    assert sum(ours) <= 1.1 * sum(theirs)


async def test_kv_moves_between_two_workers_of_one_device():
    async with RealCluster(**CUDA, dtype="bfloat16", max_num_seqs=16).running() as cluster:
        reply = await cluster.generate(PROMPT, max_tokens=12, ignore_eos=True, sampling={"temperature": 0})
        local = RealCluster(num_prefill=0, **CUDA, dtype="bfloat16", max_num_seqs=16)
        async with local.running() as alone:
            expected = await alone.generate(PROMPT, max_tokens=12, ignore_eos=True, sampling={"temperature": 0})
        assert reply.completion.path.kv_path == types_pb2.KV_PATH_REMOTE
        assert reply.completion.path.kv_bytes > 0
        assert reply.token_ids == expected.token_ids


def test_every_batch_size_has_a_graph():
    engine = HandTurnedEngine(captured=True, **CUDA, max_num_seqs=24, num_blocks=256)
    sequences = [make_request(range(index + 2), max_tokens=index + 2) for index in range(24)]
    engine.run_all(sequences)
    assert engine.pipeline.num_graphs == len(batch_buckets(24))
