"""Prompts through router, prefill and decode, as users send them."""

import asyncio
import random

import pytest

from pdserve.v1 import types_pb2
from tests.fakes.cluster import Reply
from tests.support.cluster import RealCluster

PROMPT = "The for statement is used to iterate over the elements of a sequence"
GREEDY = {"temperature": 0}


@pytest.mark.promise(15)
async def test_a_prompt_is_served_and_its_path_proven():
    async with RealCluster().running() as cluster:
        reply = await cluster.generate(PROMPT, max_tokens=12, ignore_eos=True, sampling=GREEDY)
        path = reply.completion.path
        assert (path.prefill_worker, path.decode_worker) == ("prefill-0", "decode-0")
        assert path.kv_path == types_pb2.KV_PATH_REMOTE
        assert path.kv_bytes > 0
        assert path.kv_transport == "gloo"
        assert min(path.queue_ms, path.prefill_ms, path.kv_transfer_ms, path.first_decode_ms) > 0
        assert reply.completion.usage.completion_tokens == len(reply.token_ids) == 12
        assert reply.text


async def test_without_a_prefill_worker_decode_prefills_locally_and_says_so():
    async with RealCluster().running() as remote:
        expected = await remote.generate(PROMPT, max_tokens=12, sampling=GREEDY)
    async with RealCluster(num_prefill=0).running() as cluster:
        reply = await cluster.generate(PROMPT, max_tokens=12, sampling=GREEDY)
        assert reply.token_ids == expected.token_ids
        assert reply.completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        assert reply.completion.path.kv_bytes == 0


async def test_a_prompt_that_decode_computes_by_choice_has_the_same_tokens_and_its_path_says_so():
    async with RealCluster().running(local_prefill="never") as remote:
        expected = await remote.generate(PROMPT, max_tokens=12, sampling=GREEDY)
    async with RealCluster().running(local_prefill="always") as cluster:
        reply = await cluster.generate(PROMPT, max_tokens=12, sampling=GREEDY)
        path = reply.completion.path
        assert reply.token_ids == expected.token_ids
        assert (path.kv_path, path.prefill_worker, path.kv_bytes) == (types_pb2.KV_PATH_LOCAL, "decode-0", 0)
        assert not cluster.router.fleet.is_degraded


async def test_a_prompt_of_whole_cached_blocks_moves_no_kv():
    async with RealCluster().running() as cluster:
        prompt = list(range(100, 164))
        first = await cluster.generate(prompt, max_tokens=4, sampling=GREEDY)
        again = await cluster.generate(prompt, max_tokens=4, sampling=GREEDY)
        assert again.token_ids == first.token_ids
        assert again.completion.path.kv_path == types_pb2.KV_PATH_CACHED
        assert again.completion.path.kv_bytes == 0
        assert again.completion.usage.cached_prompt_tokens == 48


async def test_only_the_blocks_that_decode_lacks_are_shipped():
    async with RealCluster().running() as cluster:
        first = await cluster.generate(list(range(100, 180)), max_tokens=4, sampling=GREEDY)
        longer = await cluster.generate(list(range(100, 196)), max_tokens=4, sampling=GREEDY)
        assert longer.completion.path.kv_bytes * 5 == first.completion.path.kv_bytes


@pytest.mark.promise(17)
async def test_prompt_logprobs_cross_the_handover():
    async with RealCluster().running() as cluster:
        prompt = list(range(100, 140))
        remote = await cluster.generate(prompt, max_tokens=3, sampling=GREEDY, num_logprobs=2, num_prompt_logprobs=1)
    async with RealCluster(num_prefill=0).running() as cluster:
        local = await cluster.generate(prompt, max_tokens=3, sampling=GREEDY, num_logprobs=2, num_prompt_logprobs=1)
    for reply in (remote, local):
        assert [entry.token_id for entry in reply.prompt_logprobs] == prompt[1:]
        assert [entry.token_id for entry in reply.logprobs] == reply.token_ids
        assert all(entry.rank == 1 and len(entry.top) == 2 for entry in reply.logprobs)
    for one, other in zip(remote.prompt_logprobs, local.prompt_logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


async def test_a_stop_string_ends_the_text_before_it():
    async with RealCluster().running() as cluster:
        whole = await cluster.generate(PROMPT, max_tokens=40, ignore_eos=True, sampling=GREEDY)
        stop = whole.text[10:14]
        reply = await cluster.generate(PROMPT, max_tokens=40, ignore_eos=True, sampling=GREEDY, stop=[stop])
        assert reply.text == whole.text[: whole.text.index(stop)]
        assert reply.completion.stop_string == stop
        assert reply.completion.finish_reason == types_pb2.FINISH_REASON_STOP


@pytest.mark.promise(1, 18)
@pytest.mark.parametrize("num_read", [0, 1, 5])
async def test_a_client_that_leaves_frees_the_blocks_on_both_sides(num_read):
    async with RealCluster().running() as cluster:
        call = cluster.start(PROMPT, max_tokens=1500, ignore_eos=True)
        for _ in range(num_read):
            await call.read()
        call.cancel()
        await cluster.settled(within_s=1.0)
        assert (await cluster.generate(PROMPT, max_tokens=4)).completion.path.kv_path


async def test_a_deadline_ends_the_work_on_both_sides():
    async with RealCluster().running() as cluster:
        call = cluster.start(PROMPT, max_tokens=1900, ignore_eos=True, timeout=0.3)
        with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
            await Reply.of(call)
        await cluster.settled(within_s=1.0)


async def test_preempted_sequences_keep_their_tokens():
    prompts = [PROMPT[i:] for i in range(6)]

    async def generate_all(**settings) -> tuple[list[list[int]], set[int]]:
        async with RealCluster(**settings).running() as cluster:
            replies = await asyncio.gather(
                *(
                    cluster.generate(prompt, max_tokens=100, ignore_eos=True, sampling={"seed": 5, "temperature": 0.8})
                    for prompt in prompts
                )
            )
            return [reply.token_ids for reply in replies], {reply.completion.path.kv_path for reply in replies}

    calm, _ = await generate_all()
    tight, paths = await generate_all(decode_num_blocks=24)
    assert tight == calm
    assert types_pb2.KV_PATH_RECOMPUTED in paths


@pytest.mark.promise(2)
async def test_a_prefill_worker_that_dies_is_replaced_on_the_same_reservation():
    async with RealCluster(num_prefill=2).running() as cluster:
        expected = await cluster.generate(PROMPT, max_tokens=8, sampling=GREEDY)
        used = next(one for one in cluster.prefills if one.worker.engine.step_counter and one.worker.pairs.num_pairs)
        await used.kill()
        reply = await cluster.generate(PROMPT + " ", max_tokens=8, sampling=GREEDY)
        assert reply.completion.path.prefill_worker != expected.completion.path.prefill_worker


def mixed_requests(count: int) -> list[dict]:
    draw = random.Random(1)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 20, "presence_penalty": 0.6},
        {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.1},
        {"temperature": 0.6, "frequency_penalty": 0.4},
    ]
    return [
        {
            "prompt": [draw.randrange(3, 2048) for _ in range(draw.choice([1, 5, 17, 60, 200]))],
            "max_tokens": draw.randrange(1, 40),
            "ignore_eos": draw.random() < 0.5,
            "sampling": {**kinds[index % len(kinds)], "seed": index},
        }
        for index in range(count)
    ]


@pytest.mark.promise(12)
async def test_concurrent_requests_get_the_tokens_they_get_alone():
    requests = mixed_requests(40)
    async with RealCluster(num_prefill=2, num_decode=2, decode_num_blocks=400).running() as cluster:
        together = await asyncio.gather(*(cluster.generate(timeout=60.0, **request) for request in requests))
    async with RealCluster(num_prefill=0, prefix_cache=False).running() as cluster:
        alone = [await cluster.generate(**request) for request in requests]
    different = [
        index
        for index, (one, other) in enumerate(zip(together, alone, strict=True))
        if one.token_ids != other.token_ids
    ]
    assert different == []
