"""What a completion can be asked for, and the message that asks. Meaning, ranges and defaults of every option stand in
`protos/pdserve/v1/types.proto` and `router.proto`; an option that is left out or None is the service's default."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from common.errors import InvalidArgument
from pdserve.v1 import router_pb2, types_pb2


class Message(NamedTuple):
    """One turn of a conversation; `role` is "system", "user", "assistant", or what else the model's template knows."""

    role: str
    content: str


# {"role": ..., "content": ...} is the same.
Turn = Message | Mapping[str, str]


class Chat(NamedTuple):
    """A conversation, rendered through the model's chat template. Extra variables of the template are JSON values."""

    messages: Sequence[Turn]
    template_kwargs: Mapping[str, Any] = {}


# Text as it stands, token ids as they stand, or a conversation.
Prompt = str | Sequence[int] | Chat


class Options(TypedDict, total=False):
    """Names and groups as in `GenerateRequest`."""

    request_id: str | None
    model: str | None
    priority: int | None
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    cache_salt: str | None

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None

    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_in_output: bool | None


_SAMPLING = types_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_STOPPING = types_pb2.StoppingParams.DESCRIPTOR.fields_by_name


def request_to_proto(prompt: Prompt, options: Options) -> router_pb2.GenerateRequest:
    """The request, range checks left to the router.

    Raises:
        InvalidArgument: a value that its field cannot hold at all, such as a negative count.
    """
    request = router_pb2.GenerateRequest()
    _merge(request, *_input(prompt))
    for name, value in options.items():
        if value is None:
            continue
        if name in _SAMPLING:
            _merge(request.sampling, name, value, "sampling.")
        elif name in _STOPPING:
            _merge(request.stopping, name, value, "stopping.")
        else:
            _merge(request, name, value)
    return request


def _input(prompt: Prompt) -> tuple[str, Any]:
    if isinstance(prompt, str):
        return "prompt", prompt
    if isinstance(prompt, Chat):
        variables = {name: json.dumps(value) for name, value in prompt.template_kwargs.items()}
        return "chat", {"messages": [_turn(one) for one in prompt.messages], "template_kwargs": variables}
    return "prompt_token_ids", {"ids": prompt}


def _turn(turn: Turn) -> dict[str, str]:
    return turn._asdict() if isinstance(turn, Message) else dict(turn)


def _merge(message: Any, name: str, value: Any, prefix: str = "") -> None:
    assert name in message.DESCRIPTOR.fields_by_name, f"no option {name!r}"
    try:
        message.MergeFrom(type(message)(**{name: value}))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{prefix}{name} cannot be {reprlib.repr(value)}: {error}", field=prefix + name) from None
