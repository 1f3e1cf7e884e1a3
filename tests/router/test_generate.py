"""A completion from the request to its last message, over fake workers."""

import asyncio

import pytest

from pdserve.v1 import router_pb2, types_pb2
from router.session import Session
from tests.fakes.cluster import FakeCluster, Reply, eventually
from tests.router.values import request


@pytest.fixture
async def cluster():
    async with FakeCluster().running() as cluster:
        yield cluster


def _say(cluster: FakeCluster, text: str) -> list[int]:
    """Makes the decode worker say `text`."""
    cluster.decode.script = cluster.tokenizer.encode(text)
    return cluster.decode.script


async def test_tokens_and_text_stream_and_the_completion_comes_last(cluster):
    script = _say(cluster, "upon a time, there was a fox")
    reply = await cluster.generate("Once", max_tokens=len(script))
    assert (reply.token_ids, reply.text) == (script, "upon a time, there was a fox")
    assert reply.completion.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert reply.num_messages <= len(script) + 1


async def test_the_request_id_stands_on_the_first_message_alone(cluster):
    assert (await cluster.generate(request_id="mine", max_tokens=3)).request_ids == ["mine"]
    [drawn] = (await cluster.generate(max_tokens=3)).request_ids
    assert len(drawn) == 36


async def test_text_is_never_half_a_character(cluster):
    script = _say(cluster, "né 中🎉!")
    call = cluster.start(max_tokens=len(script))
    texts = [response.chunk.text async for response in call]
    assert "".join(texts) == "né 中🎉!"
    assert not any("�" in text for text in texts)


async def test_workers_get_what_was_asked_for(cluster):
    await cluster.generate(
        [5, 6, 7],
        max_tokens=2,
        sampling=types_pb2.SamplingParams(seed=7, top_k=5),
        cache_salt="salt",
        priority=3,
    )
    [opening], [prefill] = cluster.decode.opened, cluster.prefill.requests
    for message in (opening, prefill):
        assert list(message.token_ids.ids) == [5, 6, 7]
        assert message.num_prompt_tokens == 3
        assert (message.sampling.seed, message.sampling.top_k) == (7, 5)
        assert (message.cache_salt, message.model_fingerprint) == ("salt", "fingerprint")
    assert (prefill.reservation, prefill.attempt, prefill.priority) == (1, 1, 3)


async def test_one_seed_is_drawn_for_all_workers(cluster):
    await cluster.generate(max_tokens=1)
    await cluster.generate(max_tokens=1)
    seeds = [opening.sampling.seed for opening in cluster.decode.opened]
    assert seeds == [prefill.sampling.seed for prefill in cluster.prefill.requests]
    assert seeds[0] != seeds[1]


async def test_prefill_dials_the_endpoint_that_decode_names_else_the_one_the_router_dialled(cluster):
    await cluster.generate(max_tokens=1)
    cluster.decode.pair_endpoint = cluster.decode.address.replace("127.0.0.1", "localhost")
    cluster.prefill._decodes[cluster.decode.pair_endpoint] = cluster.decode
    await cluster.generate(max_tokens=1)
    endpoints = [prefill.pair_endpoint for prefill in cluster.prefill.requests]
    assert endpoints == [cluster.decode.address, cluster.decode.pair_endpoint]


async def test_prefill_ships_only_what_decode_lacks(cluster):
    cluster.decode.num_cached_tokens = 16
    await cluster.generate(list(range(40)), max_tokens=1)
    assert cluster.prefill.requests[0].num_cached_tokens == 16


async def test_every_hop_gets_what_is_left_of_the_deadline(cluster):
    await cluster.generate(max_tokens=1, timeout=5.0)
    assert 4.0 < cluster.decode.time_remaining_s < 5.1
    assert 4.0 < cluster.prefill.time_remaining_s < 5.1


async def test_the_completion_proves_its_path(cluster):
    path = (await cluster.generate(max_tokens=2)).completion.path
    assert path.prefill_worker == cluster.prefill.identity.instance_id
    assert path.decode_worker == cluster.decode.identity.instance_id
    assert (path.kv_path, path.kv_bytes, path.kv_transport) == (types_pb2.KV_PATH_REMOTE, 4096, "fake")
    assert (path.prefill_ms, path.kv_transfer_ms, path.first_decode_ms) == (3.0, 1.5, 4.0)
    assert path.queue_ms >= 3.0, "decode's 1 ms and prefill's 2 ms, and what the router took"
    assert path.num_resumptions == 0


@pytest.mark.promise(17)
async def test_usage_counts_every_token_once(cluster):
    cluster.prefill.num_cached_tokens = 2
    usage = (await cluster.generate([1, 2, 3], max_tokens=4)).completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens) == (3, 4, 2)


async def test_a_prefill_answer_that_comes_after_the_last_token_is_waited_for(cluster):
    cluster.prefill.may_answer.clear()
    call = cluster.start(max_tokens=1)
    reply = Reply()
    reply.add(await call.read())
    cluster.prefill.may_answer.set()
    reply.add(await call.read())
    assert reply.completion.path.prefill_ms == 3.0


async def test_max_tokens_is_256_unless_asked_for_and_never_more_than_the_context_leaves(cluster):
    await cluster.generate([1] * 4)
    await cluster.generate([1] * 2000)
    await cluster.generate([1] * 2000, max_tokens=100, min_tokens=60)
    bounds = [(opening.stopping.max_tokens, opening.stopping.min_tokens) for opening in cluster.decode.opened]
    assert bounds == [(256, 0), (48, 0), (48, 48)]


async def test_logprobs_stay_beside_their_tokens(cluster):
    reply = await cluster.generate([4, 5, 6], max_tokens=3, num_logprobs=1, num_prompt_logprobs=0)
    assert [logprob.token_id for logprob in reply.logprobs] == reply.token_ids == [100, 101, 102]
    assert [logprob.token_id for logprob in reply.prompt_logprobs] == [5, 6]


async def test_a_stop_string_ends_the_completion_and_decode_is_told(cluster):
    _say(cluster, "the quick brown fox jumps over the lazy dog")
    reply = await cluster.generate(max_tokens=40, stop=["own f"])
    assert reply.text == "the quick br"
    assert reply.completion.stop_string == "own f"
    assert reply.completion.finish_reason == types_pb2.FINISH_REASON_STOP
    await eventually(lambda: cluster.decode.num_finishes == 1)
    assert cluster.tokenizer.detokenizer().feed(reply.token_ids) in ("the quick br", "the quick", "the quick b")


async def test_a_stop_string_can_be_part_of_the_output(cluster):
    script = _say(cluster, "the quick brown fox jumps")
    reply = await cluster.generate(max_tokens=40, stop=["own f"], include_stop_in_output=True)
    assert reply.text == "the quick brown f"
    assert reply.token_ids == script[: reply.completion.usage.completion_tokens]


async def test_a_stop_string_does_not_end_a_completion_that_is_too_short(cluster):
    script = _say(cluster, "a b a b a b a b")
    reply = await cluster.generate(max_tokens=len(script), min_tokens=5, stop=["b"])
    assert reply.completion.usage.completion_tokens >= 5
    assert reply.text.startswith("a b a ")


async def test_a_stop_token_is_counted_and_not_shown(cluster):
    cluster.decode.script = [*cluster.tokenizer.encode("the end"), 2]
    reply = await cluster.generate()
    assert reply.text == "the end"
    assert reply.token_ids == cluster.decode.script[:-1]
    assert reply.completion.stop_token_id == 2
    assert reply.completion.usage.completion_tokens == len(cluster.decode.script)


async def test_an_end_token_is_output_like_any_other_when_ends_are_ignored(cluster):
    cluster.decode.script = [2, 2]
    reply = await cluster.generate(max_tokens=3, ignore_eos=True)
    assert reply.token_ids == [2, 2, 102]


async def test_a_chat_is_rendered_through_the_template(cluster):
    chat = router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="Hi")])
    await cluster.generate(chat=chat, max_tokens=1)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert list(cluster.decode.opened[0].token_ids.ids) == cluster.tokenizer.encode(prompt)


async def test_a_long_prompt_is_tokenised_like_a_short_one(cluster):
    prompt = "once upon a time " * 300
    await cluster.generate(prompt, max_tokens=1)
    assert list(cluster.decode.opened[0].token_ids.ids) == cluster.tokenizer.encode(prompt)


async def test_without_a_tokenizer_tokens_go_in_and_out():
    cluster = FakeCluster()
    cluster.tokenizer = None
    async with cluster.running():
        reply = await cluster.generate([1, 2], max_tokens=3)
        assert (reply.token_ids, reply.text) == ([100, 101, 102], "")
        assert not (await cluster.stub.GetModel(router_pb2.GetModelRequest())).has_tokenizer


async def test_tokens_gather_while_the_client_is_slow(cluster):
    may_go_on = asyncio.Event()
    pieces: list[list[int]] = []

    async def slow_client(piece):
        pieces.append(piece.token_ids)
        await may_go_on.wait()

    cluster.decode.chunk_size = 1
    asked = request("slow", max_tokens=50, deadline_s=cluster.router.parts.clock() + 60)
    session = asyncio.create_task(Session(asked, cluster.router.parts).run(slow_client))
    await eventually(lambda: cluster.decode.opened and not cluster.decode.num_active)
    may_go_on.set()
    await session
    assert len(pieces) == 2
    assert [token_id for piece in pieces for token_id in piece] == list(range(100, 150))
