"""Which JSON field of a request is which field of GenerateRequest, and what is told to whoever sends something else.

Types are checked here; ranges where gRPC's requests are checked too, and `param_of` finds the way back from there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from common.errors import InvalidArgument
from pdserve.v1 import router_pb2

Json = dict[str, Any]
Reader = Callable[[str, object], Any]


def refuse(param: str, expected: str, given: object) -> NoReturn:
    """Raises InvalidArgument."""
    shown = _WORDS.get(type(given)) or f"{given!r:.80}"
    raise InvalidArgument(f"{param} must be {expected}, got {shown}", field=param)


_WORDS: dict[type, str] = {list: "a list", dict: "an object", type(None): "null"}


def boolean(param: str, value: object) -> bool:
    return value if isinstance(value, bool) else refuse(param, "true or false", value)


def number(param: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(param, "a number", value)
    try:
        return float(value)
    except OverflowError:
        refuse(param, "a number that a double can hold", value)


def whole(minimum: int, maximum: int) -> Reader:
    """A whole number; 3.0 is one, as JSON knows no other kind of number."""

    def read(param: str, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            refuse(param, f"a whole number from {minimum:,} to {maximum:,}", value)
        return value

    return read


count = whole(0, 2**32 - 1)


def seed(param: str, value: object) -> int:
    """Negative ones, which OpenAI's are allowed to be, are those of the same 64 bits."""
    return whole(-(2**63), 2**64 - 1)(param, value) % 2**64


def text(param: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(param, "a string", value)
    # JSON can spell half of a surrogate pair, which no text holds.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidArgument(f"{param} must be Unicode text, got a lone surrogate", field=param)
    return value


def objects(param: str, value: object) -> Json:
    return value if isinstance(value, dict) else refuse(param, "an object", value)


def listed(param: str, value: object) -> list[Any]:
    return value if isinstance(value, list) else refuse(param, "a list", value)


def texts(param: str, value: object) -> list[str]:
    """A string, or a list of them."""
    return [text(param, one) for one in (value if isinstance(value, list) else [value])]


def token_ids(param: str, value: object) -> list[int]:
    return [count(param, one) for one in listed(param, value)]


def token_weights(param: str, value: object) -> dict[int, float]:
    """An object whose keys are token ids, which JSON has to write as strings."""
    weights = {}
    for key, weight in objects(param, value).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            refuse(param, "an object with token ids for keys", key)
        weights[count(param, int(key))] = number(param, weight)
    return weights


def variables(param: str, value: object) -> dict[str, str]:
    """An object's values, each as JSON again."""
    return {
        text(param, name): text(param, json.dumps(one, ensure_ascii=False))
        for name, one in objects(param, value).items()
    }


class Field(NamedTuple):
    read: Reader
    # In GenerateRequest.
    path: str


# What both kinds of completion have, OpenAI's own first.
FIELDS: Mapping[str, Field] = {
    "model": Field(text, "model"),
    "max_tokens": Field(count, "stopping.max_tokens"),
    "stop": Field(texts, "stopping.stop"),
    "temperature": Field(number, "sampling.temperature"),
    "top_p": Field(number, "sampling.top_p"),
    "seed": Field(seed, "sampling.seed"),
    "presence_penalty": Field(number, "sampling.presence_penalty"),
    "frequency_penalty": Field(number, "sampling.frequency_penalty"),
    "logit_bias": Field(token_weights, "sampling.logit_bias"),
    "top_k": Field(count, "sampling.top_k"),
    "min_p": Field(number, "sampling.min_p"),
    "repetition_penalty": Field(number, "sampling.repetition_penalty"),
    "min_tokens": Field(count, "stopping.min_tokens"),
    "stop_token_ids": Field(token_ids, "stopping.stop_token_ids"),
    "ignore_eos": Field(boolean, "stopping.ignore_eos"),
    "include_stop_in_output": Field(boolean, "stopping.include_stop_in_output"),
    "priority": Field(whole(-(2**31), 2**31 - 1), "priority"),
    "cache_salt": Field(text, "cache_salt"),
}
OF_CHAT: Mapping[str, Field] = {
    "max_completion_tokens": Field(count, "stopping.max_tokens"),
    "chat_template_kwargs": Field(variables, "chat.template_kwargs"),
}

# Parameters of OpenAI's that nobody serves here, and the values with which they ask for nothing.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
}


def fill(message: router_pb2.GenerateRequest, body: Json, fields: Mapping[str, Field]) -> None:
    """Puts what `body` says of `fields` into `message`; null is as good as nothing. Raises InvalidArgument."""
    for param, (read, path) in fields.items():
        if body.get(param) is None:
            continue
        value = read(param, body[param])
        *parents, name = path.split(".")
        target = message
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, list):
            getattr(target, name).extend(value)
        elif isinstance(value, dict):
            getattr(target, name).update(value)
        else:
            setattr(target, name, value)


def check_names(body: Json, known: set[str]) -> None:
    """Raises InvalidArgument for what would have to be ignored."""
    for param, value in body.items():
        if param in known or value is None:
            continue
        if param not in UNSUPPORTED:
            near = difflib.get_close_matches(param, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument(f"there is no parameter {param[:80]!r} here{hint}", field=param[:80])
        if not any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[param]):
            raise InvalidArgument(f"{param} is not supported here: leave it out", field=param)


_PARAMS = {field.path: param for param, field in (*OF_CHAT.items(), *FIELDS.items())} | {
    "prompt_token_ids.ids": "prompt",
    "chat": "messages",
    "request_id": "X-Request-Id",
}


def param_of(field: str, body: Json) -> str:
    """What a field of GenerateRequest, as errors name it, is called in the body that it came from."""
    if field == "num_logprobs":
        return "top_logprobs" if "top_logprobs" in body else "logprobs"
    if field == "num_prompt_logprobs":
        return "logprobs"
    if field == "stopping.max_tokens" and "max_completion_tokens" in body:
        return "max_completion_tokens"
    return _PARAMS.get(field, field.replace("chat.messages", "messages"))
