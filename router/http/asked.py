"""From a JSON body to what is asked: a GenerateRequest for each completion, and the form of the reply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from common.errors import InvalidArgument
from common.params import MAX_LOGPROBS
from pdserve.v1 import router_pb2
from router.http.fields import (
    FIELDS,
    OF_CHAT,
    Field,
    Json,
    boolean,
    check_names,
    count,
    fill,
    listed,
    objects,
    refuse,
    text,
    token_ids,
    whole,
)

# Of all prompts together.
MAX_CHOICES = 128
_OF_BOTH = {"n", "stream", "stream_options", "user", "return_token_ids", "logprobs"}
_OF_COMPLETIONS = {"prompt", "echo", "best_of"}
_OF_CHATS = {"messages", "top_logprobs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What every choice of a reply has in common, and a message for each prompt."""

    # Without seeds and ids of their own.
    prompts: Sequence[router_pb2.GenerateRequest]
    num_choices: int = 1
    is_stream: bool = False
    # Of a stream: one more event with the counts of all choices.
    include_usage: bool = False
    # The prompt is part of the text.
    echo: bool = False
    # Only the prompt is of interest: one token is computed, as ever, and not shown.
    hides_output: bool = False
    with_token_ids: bool = False


def parse(raw: bytes) -> Json:
    """Raises InvalidArgument unless it is a JSON object."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the body must be JSON: {error}", reason="MALFORMED_MESSAGE") from None
    if not isinstance(body, dict):
        raise InvalidArgument("the body must be a JSON object", reason="MALFORMED_MESSAGE")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def completion(body: Json) -> Asked:
    """What is asked of /v1/completions. Raises InvalidArgument, naming the parameter."""
    check_names(body, {*FIELDS, *_OF_BOTH, *_OF_COMPLETIONS})
    common = _common(body, FIELDS)
    echo = _get(body, "echo", boolean, False)
    num_logprobs = _get(body, "logprobs", count, None)
    if num_logprobs is not None:
        common.num_logprobs = num_logprobs
        if echo:
            common.num_prompt_logprobs = num_logprobs
    prompts = [_with_prompt(common, prompt) for prompt in _prompts(body.get("prompt"))]
    num_choices = _num_choices(body, len(prompts))
    if _get(body, "best_of", count, num_choices) != num_choices:
        raise InvalidArgument("best_of is not supported here: leave it out, or let it be n", field="best_of")
    hides_output = echo and common.stopping.HasField("max_tokens") and common.stopping.max_tokens == 0
    if hides_output:
        for prompt in prompts:
            prompt.stopping.max_tokens = 1
    return _asked(body, prompts, num_choices, echo=echo, hides_output=hides_output)


def chat(body: Json) -> Asked:
    """What is asked of /v1/chat/completions. Raises InvalidArgument, naming the parameter."""
    check_names(body, {*FIELDS, *OF_CHAT, *_OF_BOTH, *_OF_CHATS})
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise InvalidArgument(
            "max_tokens and max_completion_tokens are the same: give one of them", field="max_completion_tokens"
        )
    common = _common(body, {**FIELDS, **OF_CHAT})
    has_logprobs = _get(body, "logprobs", boolean, False)
    num_logprobs = _get(body, "top_logprobs", whole(0, MAX_LOGPROBS), 0)
    if has_logprobs:
        common.num_logprobs = num_logprobs
    elif num_logprobs:
        raise InvalidArgument("top_logprobs needs logprobs to be true", field="top_logprobs")
    for place, one in enumerate(listed("messages", body.get("messages"))):
        _add_message(common.chat, f"messages[{place}]", one)
    common.chat.SetInParent()
    return _asked(body, [common], _num_choices(body, 1))


def _get(body: Json, param: str, read: Any, default: Any) -> Any:
    return default if body.get(param) is None else read(param, body[param])


def _common(body: Json, fields: dict[str, Field] | Any) -> router_pb2.GenerateRequest:
    _get(body, "user", text, "")
    message = router_pb2.GenerateRequest()
    fill(message, body, fields)
    return message


def _asked(
    body: Json, prompts: Sequence[router_pb2.GenerateRequest], num_choices: int, **of_completions: bool
) -> Asked:
    is_stream = _get(body, "stream", boolean, False)
    options = _get(body, "stream_options", objects, {})
    if options and not is_stream:
        raise InvalidArgument("stream_options needs stream to be true", field="stream_options")
    for name, value in options.items():
        # Obfuscation would hide how long tokens are; that none is asked for is what there is.
        if name != "include_usage" and not (name == "include_obfuscation" and value is False):
            raise InvalidArgument(f"stream_options.{name[:80]} is not supported here", field="stream_options")
    return Asked(
        prompts=prompts,
        num_choices=num_choices,
        is_stream=is_stream,
        include_usage=_get(options, "include_usage", boolean, False),
        with_token_ids=_get(body, "return_token_ids", boolean, False),
        **of_completions,
    )


def _num_choices(body: Json, num_prompts: int) -> int:
    num_choices = _get(body, "n", whole(1, MAX_CHOICES), 1)
    if num_choices * num_prompts > MAX_CHOICES:
        raise InvalidArgument(
            f"n times the number of prompts must be at most {MAX_CHOICES}, got {num_choices} x {num_prompts:,}",
            field="n",
        )
    return num_choices


def _prompts(given: object) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    if given is None:
        raise InvalidArgument("prompt is missing", field="prompt")
    if not isinstance(given, list):
        return [text("prompt", given)]
    if not given:
        raise InvalidArgument("prompt has no tokens", field="prompt")
    if isinstance(given[0], int):
        return [token_ids("prompt", given)]
    if len(given) > MAX_CHOICES:
        refuse("prompt", f"at most {MAX_CHOICES} prompts", len(given))
    return [token_ids("prompt", one) if isinstance(one, list) else text("prompt", one) for one in given]


def _with_prompt(common: router_pb2.GenerateRequest, prompt: str | list[int]) -> router_pb2.GenerateRequest:
    message = router_pb2.GenerateRequest()
    message.CopyFrom(common)
    if isinstance(prompt, str):
        message.prompt = prompt
    else:
        message.prompt_token_ids.ids.extend(prompt)
        message.prompt_token_ids.SetInParent()
    return message


def _add_message(conversation: router_pb2.Chat, where: str, given: object) -> None:
    message = objects(where, given)
    for name, value in message.items():
        if name not in ("role", "content") and value is not None and value != []:
            raise InvalidArgument(f"{where}.{name[:80]} is not supported here", field=f"{where}.{name[:80]}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{place}]", part) for place, part in enumerate(content))
    conversation.messages.add(
        role=text(f"{where}.role", message.get("role")), content=text(f"{where}.content", content)
    )


def _part(where: str, given: object) -> str:
    part = objects(where, given)
    if part.get("type") != "text":
        raise InvalidArgument(f"{where}.type must be 'text': this model reads nothing else", field=f"{where}.type")
    return text(f"{where}.text", part.get("text"))
