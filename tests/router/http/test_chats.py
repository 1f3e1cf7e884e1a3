"""/v1/chat/completions and /v1/models over fake workers, asked by the openai package."""

import asyncio

import openai
import pytest

from tests.fakes.cluster import FakeCluster

PATH = "/v1/chat/completions"
HI = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]


def say(cluster: FakeCluster, text: str) -> list[int]:
    cluster.decode.script = [*cluster.tokenizer.encode(text), 2]
    return cluster.decode.script


async def test_a_chat_is_answered_by_the_assistant(cluster, face):
    script = say(cluster, "Hello there")
    reply = await face.client.chat.completions.create(model="tiny", messages=HI)
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello there", "stop")
    assert (reply.object, reply.id) == ("chat.completion", f"chatcmpl-{reply._request_id}")
    assert choice.pdserve["stop_token_id"] == 2
    assert reply.usage.completion_tokens == len(script)


async def test_the_conversation_is_rendered_by_the_template(cluster, face):
    await face.client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=1)
    [opening] = cluster.decode.opened
    prompt = b"".join(map(cluster.tokenizer.bytes_of, opening.token_ids.ids)).decode()
    assert prompt == ("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


async def test_content_may_be_a_list_of_texts_and_the_template_has_variables(cluster, face):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await face.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": parts}],
        max_tokens=1,
        extra_body={"chat_template_kwargs": {"add_generation_prompt": False}},
    )
    [opening] = cluster.decode.opened
    prompt = b"".join(map(cluster.tokenizer.bytes_of, opening.token_ids.ids)).decode()
    assert prompt == "<|im_start|>user\nab<|im_end|>\n"


async def test_a_streamed_chat_says_the_role_once_and_joins_to_the_whole(cluster, face):
    say(cluster, "Hello 🎉 there")
    stream = await face.client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "Hello 🎉 there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len(cluster.decode.script))


async def test_a_chat_that_ends_at_once_still_has_its_role_and_no_text(cluster, face):
    cluster.decode.script = [2]
    reply = await face.client.chat.completions.create(model="tiny", messages=HI)
    assert reply.choices[0].message.content == ""
    stream = await face.client.chat.completions.create(model="tiny", messages=HI, stream=True)
    [chunk] = [chunk async for chunk in stream]
    assert (chunk.choices[0].delta.role, chunk.choices[0].finish_reason) == ("assistant", "stop")


async def test_logprobs_have_the_bytes_of_each_token(cluster, face):
    cluster.decode.script = cluster.tokenizer.encode("né")
    reply = await face.client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=len(cluster.decode.script), logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == "né"
    assert {token.logprob for token in content} == {-1.0}
    assert cluster.decode.opened[0].num_logprobs == 2


async def test_choices_of_a_streamed_chat_are_told_apart_by_their_index(cluster, face):
    say(cluster, "Hello there")
    stream = await face.client.chat.completions.create(model="tiny", messages=HI, n=3, stream=True)
    texts = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == dict.fromkeys(range(3), "Hello there")


async def test_the_openai_package_s_own_stream_helper_understands_it(cluster, face):
    say(cluster, "Hello there")
    async with face.client.chat.completions.stream(model="tiny", messages=HI) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello there"


async def test_the_synchronous_client_does_too(cluster, face):
    script = say(cluster, "Hello there")

    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{face.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            whole = client.chat.completions.create(model="tiny", messages=HI).choices[0].message.content
            stream = client.completions.create(model="tiny", prompt="Once", max_tokens=len(script), stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(ask) == ("Hello there", "Hello there")


async def test_the_model_is_listed_and_found(face):
    models = (await face.client.models.list()).data
    assert [(model.id, model.owned_by, model.max_model_len) for model in models] == [("tiny", "pdserve", 2048)]
    assert (await face.client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
        await face.client.models.retrieve("some/other")
