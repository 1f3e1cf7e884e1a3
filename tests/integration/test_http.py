"""The HTTP face before real workers: the same tokens as over gRPC, and nothing left behind."""

import asyncio
import json
import random

import pytest
import pytest_asyncio

from common.config import TINY_MODEL
from common.identities import hash_of
from common.tokenization import Tokenizer
from tests.fakes.cluster import Reply, eventually
from tests.support.cluster import RealCluster
from tests.support.http_face import Face, http_face

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
PROMPT = "The for statement is used to iterate over the elements of a sequence"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    async with RealCluster().running() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def face(cluster):
    async with http_face(cluster.router) as running:
        yield running


async def streamed(face: Face, body: dict) -> tuple[list[int], str]:
    """Tokens and text of a stream's only choice."""
    token_ids, text = [], ""
    async for event in face.events(COMPLETIONS, {**body, "return_token_ids": True}):
        if event != "[DONE]":
            token_ids += event["choices"][0]["token_ids"]
            text += event["choices"][0]["text"]
    return token_ids, text


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
KNOBS = [
    {"sampling": {"temperature": 0}, "max_tokens": 40},
    {"sampling": SAMPLED, "max_tokens": 40, "ignore_eos": True},
    {"sampling": {**SAMPLED, "repetition_penalty": 1.2, "logit_bias": {14: -5.0}}, "max_tokens": 40},
    {"sampling": SAMPLED, "max_tokens": 200, "stop": ["e "]},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=["greedy", "sampled", "edited", "stopped"])
async def test_a_stream_over_http_has_the_tokens_and_the_text_of_one_over_grpc(cluster, face, knobs):
    expected = await cluster.generate(PROMPT, **knobs)
    body = {"prompt": PROMPT, **knobs["sampling"], **{name: knobs[name] for name in knobs if name != "sampling"}}
    assert await streamed(face, body) == (expected.token_ids, expected.text)
    whole = (await face.post(COMPLETIONS, {**body, "return_token_ids": True})).json["choices"][0]
    assert (whole["token_ids"], whole["text"]) == (expected.token_ids, expected.text)


async def test_the_choices_of_a_seed_are_those_of_the_seeds_after_it_and_find_the_prompt_computed(cluster, face):
    prompt = list(range(100, 180))
    expected = [
        await cluster.generate(prompt, max_tokens=8, sampling={"seed": 50 + number}, cache_salt="elsewhere")
        for number in range(3)
    ]
    body = {"prompt": prompt, "n": 3, "seed": 50, "max_tokens": 8, "return_token_ids": True}
    reply = (await face.post(COMPLETIONS, body)).json
    assert [choice["token_ids"] for choice in reply["choices"]] == [one.token_ids for one in expected]
    assert [choice["pdserve"]["kv_bytes"] > 0 for choice in reply["choices"]] == [True, False, False]
    assert reply["usage"]["prompt_tokens"] == len(prompt)


async def test_logprobs_of_prompt_and_output_are_those_over_grpc(cluster, face):
    prompt = list(range(100, 140))
    fields = {"num_logprobs": 2, "num_prompt_logprobs": 2, "max_tokens": 4, "sampling": {"temperature": 0}}
    expected = await cluster.generate(prompt, **fields)
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 4, "temperature": 0}
    logprobs = (await face.post(COMPLETIONS, body)).json["choices"][0]["logprobs"]
    values = [entry.logprob for entry in [*expected.prompt_logprobs, *expected.logprobs]]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(values, abs=1e-5)
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])


async def test_a_chat_has_the_tokens_of_one_over_grpc(cluster, face):
    turns = [{"role": "user", "content": "What is a list?"}]
    expected = await cluster.generate(None, chat={"messages": turns}, max_tokens=30, sampling={"temperature": 0})
    reply = await face.client.chat.completions.create(model="tiny", messages=turns, max_tokens=30, temperature=0)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens == expected.completion.usage.prompt_tokens


async def test_64_streams_at_once_have_the_tokens_that_each_has_alone(cluster, face):
    draw = random.Random(5)
    vocabulary = Tokenizer.load(TINY_MODEL).vocab_size
    prompts = [[draw.randrange(3, vocabulary) for _ in range(draw.randrange(4, 60))] for _ in range(64)]
    knobs = {"max_tokens": 12, "ignore_eos": True}
    expected = await asyncio.gather(
        *(cluster.generate(prompt, sampling={"seed": 9}, **knobs) for prompt in prompts[:8])
    )
    replies = await asyncio.gather(*(streamed(face, {"prompt": prompt, "seed": 9, **knobs}) for prompt in prompts))
    assert [len(token_ids) for token_ids, _ in replies] == [12] * 64
    assert replies[:8] == [(one.token_ids, one.text) for one in expected]


@pytest.mark.parametrize("num_events", [0, 2], ids=["before the first token", "in the middle"])
async def test_a_caller_that_leaves_frees_every_block_on_both_sides(cluster, face, num_events):
    body = {"prompt": list(range(100, 400)), "max_tokens": 1500, "ignore_eos": True, "n": 3, "stream": True}
    response = await face.session.post(face.url + COMPLETIONS, json=body) if num_events else None
    if response is None:
        call = asyncio.create_task(face.post(COMPLETIONS, body))
        await eventually(lambda: any(one.worker.engine.scheduler.pool.num_held for one in cluster.prefills))
        call.cancel()
    else:
        for _ in range(num_events):
            await response.content.readuntil(b"\n\n")
        assert cluster.decodes[0].worker.engine.scheduler.pool.num_held > 0
        response.close()
    await cluster.settled()


async def test_a_gone_caller_s_place_is_free_for_the_next(cluster, face):
    reply = await Reply.of(cluster.start(PROMPT, max_tokens=2))
    assert reply.completion.usage.completion_tokens == 2


async def test_two_callers_share_no_prefix_over_http_and_grpc(cluster, tmp_path):
    tokens = "".join(f'{name} = "sha256:{hash_of(name)}"\n' for name in ("alice", "bob"))
    (tmp_path / "identities.toml").write_text("[clients]\n" + tokens)
    body = {"prompt": list(range(500, 600)), "max_tokens": 2, "cache_salt": "agreed"}
    async with http_face(cluster.router, identities=str(tmp_path / "identities.toml")) as face:
        cached = []
        for name in ("alice", "bob", "alice"):
            answer = await face.post(COMPLETIONS, body, headers={"Authorization": f"Bearer {name}"})
            cached.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


async def test_random_bodies_are_answered_honestly_and_leave_nothing_behind(cluster, face):
    draw = random.Random(3)
    statuses = []
    for _ in range(15):
        bodies = [nonsense(draw) for _ in range(10)]
        for answer in await asyncio.gather(*(face.post(path, data=raw, headers=JSON) for path, raw in bodies)):
            statuses.append(answer.status)
            assert answer.status in (200, 400, 404), answer
    assert min(statuses.count(200), statuses.count(400)) > 10
    await cluster.settled()


JSON = {"Content-Type": "application/json"}
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    1e300,
    2**63,
    10**30,
    "",
    "x",
    "tiny",
    "\ud800",
    [],
    ["x"],
    [[1]],
    {},
    {"5": 1},
)
NAMES = (
    *("n", "max_tokens", "stop", "seed", "logprobs", "echo", "stream", "user", "top_p", "temperature", "logit_bias"),
    *(
        "best_of",
        "suffix",
        "stream_options",
        "tools",
        "model",
        "priority",
        "min_tokens",
        "stop_token_ids",
        "cache_salt",
    ),
    *("return_token_ids", "chat_template_kwargs", "top_logprobs", "prompt", "messages", "presence_penalty", "what"),
)


def nonsense(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body; every second one or so can be served."""
    chat = [{"role": "user", "content": "Hi"}]
    is_chat = draw.random() < 0.4
    body: dict = {
        "max_tokens": 2,
        **({"messages": chat} if is_chat else {"prompt": draw.choice(["x", [5, 6], ["a", "b"]])}),
    }
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        body[draw.choice(NAMES)] = draw.choice(VALUES)
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.2:
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return "/v1/chat/completions" if is_chat else COMPLETIONS, bytes(raw)
