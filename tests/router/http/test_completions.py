"""/v1/completions over fake workers: what goes in, and the shape of what comes out."""

import asyncio

import pytest

from pdserve.v1 import types_pb2
from tests.fakes.cluster import FakeCluster, eventually
from tests.support.http_face import http_face

PATH = "/v1/completions"


def say(cluster: FakeCluster, text: str) -> list[int]:
    """Makes the decode worker say `text`."""
    cluster.decode.script = cluster.tokenizer.encode(text)
    return cluster.decode.script


async def test_a_completion_has_its_text_its_counts_and_the_proof_of_its_path(cluster, face):
    script = say(cluster, " upon a time")
    reply = await face.client.completions.create(model="tiny", prompt="Once", max_tokens=len(script))
    [choice] = reply.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, " upon a time", "length", None)
    assert (reply.object, reply.model, reply.id) == ("text_completion", "tiny", f"cmpl-{reply._request_id}")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, len(script))
    assert reply.usage.total_tokens == 2 + len(script)
    assert choice.pdserve["decode_worker"] == cluster.decode.identity.instance_id
    assert (choice.pdserve["kv_path"], choice.pdserve["kv_bytes"]) == ("REMOTE", 4096)


async def test_a_stream_has_the_same_text_piece_by_piece_and_says_how_it_ended(cluster, face):
    script = say(cluster, "né 中🎉! and more")
    stream = await face.client.completions.create(model="tiny", prompt="Once", max_tokens=len(script), stream=True)
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == "né 中🎉! and more"
    assert not any("�" in choice.text for choice in choices)
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == "length"
    assert choices[-1].pdserve["kv_path"] == "REMOTE"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


async def test_every_event_but_the_last_says_that_usage_is_to_come(face):
    body = {"prompt": "Once", "max_tokens": 3, "stream_options": {"include_usage": True}}
    *events, usage, done = [event async for event in face.events(PATH, body)]
    assert done == "[DONE]"
    assert all(event["usage"] is None for event in events)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)


async def test_workers_get_what_was_asked_for(cluster, face):
    await face.client.completions.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=4,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias={"9": -5},
        stop=["x", "y"],
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [8],
            "cache_salt": "salt",
            "priority": 3,
        },
    )
    [opening], [prefill] = cluster.decode.opened, cluster.prefill.requests
    assert list(opening.token_ids.ids) == [5, 6, 7]
    assert opening.sampling == types_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.9,
        seed=7,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias={9: -5.0},
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.5,
    )
    stopping = opening.stopping
    assert (stopping.max_tokens, stopping.min_tokens, stopping.ignore_eos) == (4, 2, True)
    assert list(stopping.stop_token_ids) == [8]
    assert (opening.cache_salt, prefill.priority) == ("salt", 3)


@pytest.mark.parametrize("stop", ["own f", ["zzz", "own f"]])
async def test_a_stop_string_ends_the_text_before_it_and_is_named(cluster, face, stop):
    say(cluster, "the quick brown fox jumps over the lazy dog")
    reply = await face.client.completions.create(model="tiny", prompt="Once", max_tokens=40, stop=stop)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason, choice.pdserve["stop_string"]) == ("the quick br", "stop", "own f")


async def test_choices_of_a_prompt_have_seeds_in_a_row_and_its_tokens_count_once(cluster, face):
    reply = await face.client.completions.create(model="tiny", prompt=[1, 2, 3], n=3, max_tokens=2, seed=2**63 - 1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    seeds = [opening.sampling.seed for opening in cluster.decode.opened]
    assert (seeds[0], sorted(seeds)) == (2**63 - 1, [2**63 - 1, 2**63, 2**63 + 1])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 6)
    ids = [choice.pdserve["request_id"] for choice in reply.choices]
    assert ids == [f"{reply._request_id}-{index}" for index in range(3)]


async def test_choices_without_a_seed_have_seeds_of_their_own(cluster, face):
    await face.client.completions.create(model="tiny", prompt="Once", n=3, max_tokens=1)
    assert len({opening.sampling.seed for opening in cluster.decode.opened}) == 3


async def test_a_negative_seed_is_the_one_with_the_same_bits(cluster, face):
    await face.client.completions.create(model="tiny", prompt="Once", seed=-1, max_tokens=1)
    assert cluster.decode.opened[0].sampling.seed == 2**64 - 1


async def test_the_other_choices_of_a_prompt_begin_with_the_first_token_of_the_first(cluster, face):
    cluster.decode.go.clear()
    cluster.decode.pause_at = 1
    stream = face.events(PATH, {"prompt": "Once", "n": 3, "max_tokens": 2})
    first = await anext(stream)
    assert first["choices"][0]["index"] == 0
    cluster.decode.go.set()
    indices = [event["choices"][0]["index"] async for event in stream if event != "[DONE]"]
    assert set(indices) == {0, 1, 2}
    assert len(cluster.decode.opened) == 3


async def test_a_prompt_is_held_by_one_decode_stream_until_its_first_token(cluster, face):
    """So that the others find it in the prefix cache."""
    cluster.decode.go.clear()
    call = asyncio.create_task(face.post(PATH, {"prompt": "Once", "n": 3, "max_tokens": 1}))
    await eventually(lambda: cluster.decode.num_active)
    assert len(cluster.decode.opened) == 1
    cluster.decode.go.set()
    assert (await call).status == 200
    assert len(cluster.decode.opened) == 3


async def test_every_prompt_of_a_list_has_its_choices_in_a_row(cluster, face):
    reply = await face.client.completions.create(
        model="tiny", prompt=["Once", "upon a time"], n=2, max_tokens=1, echo=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    prompts = [choice.text[: len("upon")] for choice in reply.choices]
    assert prompts == ["Once", "Once", "upon", "upon"]
    assert reply.usage.prompt_tokens == sum(len(cluster.tokenizer.encode(text)) for text in ("Once", "upon a time"))


async def test_prompts_may_be_lists_of_token_ids(cluster, face):
    await face.client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=1)
    assert sorted(list(opening.token_ids.ids) for opening in cluster.decode.opened) == [[5, 6], [7]]


async def test_echo_puts_the_prompt_before_the_text_once(cluster, face):
    script = say(cluster, " upon a time")
    body = {"prompt": "Once", "max_tokens": len(script), "echo": True}
    whole = (await face.post(PATH, body)).json
    streamed = [event async for event in face.events(PATH, body) if event != "[DONE]"]
    assert whole["choices"][0]["text"] == "Once upon a time"
    assert "".join(event["choices"][0]["text"] for event in streamed) == "Once upon a time"


async def test_echoed_token_ids_are_their_text_with_special_tokens_by_name(cluster, face):
    token_ids = [*cluster.tokenizer.encode("né 中"), 2]
    reply = (await face.post(PATH, {"prompt": token_ids, "max_tokens": 0, "echo": True})).json
    assert reply["choices"][0]["text"] == "né 中" + cluster.tokenizer.bytes_of(2).decode()


async def test_logprobs_stand_beside_their_tokens_with_the_places_in_the_text(cluster, face):
    script = say(cluster, " né 中")
    body = {"prompt": "Once upon", "max_tokens": len(script), "echo": True, "logprobs": 0}
    [choice] = (await face.post(PATH, body)).json["choices"]
    logprobs = choice["logprobs"]
    prompt = cluster.tokenizer.encode("Once upon")
    assert len(logprobs["tokens"]) == len(prompt) + len(script)
    assert logprobs["token_logprobs"] == [None] + [-2.0] * (len(prompt) - 1) + [-1.0] * len(script)
    assert logprobs["top_logprobs"][0] is None
    assert [list(top) for top in logprobs["top_logprobs"][1:]] == [[token] for token in logprobs["tokens"][1:]]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


async def test_streamed_logprobs_are_those_of_the_whole_reply(cluster, face):
    script = say(cluster, " né 中🎉")
    body = {"prompt": "Once upon", "max_tokens": len(script), "echo": True, "logprobs": 1}
    whole = (await face.post(PATH, body)).json["choices"][0]["logprobs"]
    joined: dict[str, list] = {name: [] for name in whole}
    async for event in face.events(PATH, body):
        if event != "[DONE]":
            for name, values in (event["choices"][0]["logprobs"] or {}).items():
                joined[name] += values
    assert joined == whole
    assert "bytes:\\xf0" in whole["tokens"]


async def test_all_choices_show_the_prompt_s_logprobs_and_one_computes_them(cluster, face):
    body = {"prompt": [4, 5, 6], "max_tokens": 1, "n": 2, "echo": True, "logprobs": 0}
    choices = (await face.post(PATH, body)).json["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[None, -2.0, -2.0, -1.0]] * 2
    asked = [opening.HasField("num_prompt_logprobs") for opening in cluster.decode.opened]
    assert asked == [True, False]


async def test_a_prompt_alone_can_be_scored(cluster, face):
    """As evaluation harnesses do."""
    body = {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1}
    reply = (await face.post(PATH, body)).json
    [choice] = reply["choices"]
    num_tokens = len(cluster.tokenizer.encode("Once upon a time"))
    assert (choice["text"], choice["finish_reason"]) == ("Once upon a time", "length")
    assert len(choice["logprobs"]["tokens"]) == reply["usage"]["prompt_tokens"] == num_tokens
    assert reply["usage"]["completion_tokens"] == 0


async def test_token_ids_come_along_when_they_are_asked_for(cluster, face):
    body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True}
    [choice] = (await face.post(PATH, body)).json["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], [100, 101, 102])


async def test_without_a_tokenizer_token_ids_go_in_and_out():
    cluster = FakeCluster()
    cluster.tokenizer = None
    async with cluster.running(), http_face(cluster.router) as face:
        body = {"prompt": [5, 6], "max_tokens": 2, "logprobs": 0, "return_token_ids": True}
        [choice] = (await face.post(PATH, body)).json["choices"]
        assert (choice["text"], choice["token_ids"]) == ("", [100, 101])
        assert choice["logprobs"]["tokens"] == ["token_id:100", "token_id:101"]
        refusal = await face.post(PATH, {"prompt": "Once"})
        assert (refusal.status, refusal.error["code"]) == (400, "FAILED_PRECONDITION")
