"""What is read of any JSON whatever: what is asked, or the parameter at fault."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from router.http import asked
from router.http.failures import body_of
from router.http.fields import FIELDS, OF_CHAT, UNSUPPORTED

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "text", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [*FIELDS, *OF_CHAT, *UNSUPPORTED, "n", "stream", "stream_options", "user", "logprobs", "prompt", "echo", "best_of"]
)
TURNS = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), JSON), max_size=3)


few = settings(max_examples=60)


def refusal(read: Callable[[Any], Any], given: Any) -> InvalidArgument | None:
    """None: it is understood."""
    try:
        read(given)
    except InvalidArgument as error:
        return error
    return None


@few
@given(st.dictionaries(NAMES, JSON, max_size=5), st.just("x") | JSON)
def test_any_completion_is_understood_within_limits_or_refused(body, prompt):
    with contextlib.suppress(InvalidArgument):
        understood = asked.completion({"prompt": prompt, **body})
        assert 1 <= understood.num_choices * len(understood.prompts) <= asked.MAX_CHOICES
        assert all(message.WhichOneof("input") for message in understood.prompts)


@few
@given(st.dictionaries(NAMES, JSON, max_size=5), TURNS | JSON)
def test_any_chat_is_understood_within_limits_or_refused(body, messages):
    with contextlib.suppress(InvalidArgument):
        understood = asked.chat({"messages": messages, **body})
        assert 1 <= understood.num_choices <= asked.MAX_CHOICES
        assert [message.WhichOneof("input") for message in understood.prompts] == ["chat"]


@few
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused_in_words_that_can_be_sent(raw):
    error = refusal(asked.parse, raw)
    assert error is None or json.dumps(body_of(error, {})).isascii()


@few
@given(NAMES, JSON)
def test_a_refusal_names_the_parameter_that_was_sent(name, value):
    body = {"prompt": "x"} | {name: value}
    error = refusal(asked.completion, body)
    assert error is None or body_of(error, body)["error"]["param"] == name
