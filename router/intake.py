"""From a GenerateRequest to a validated Request, or to the field that is wrong and the limit it breaks."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace

from common.errors import FailedPrecondition, InvalidArgument, NotFound
from common.identities import bound_salt
from common.params import MAX_CACHE_SALT_BYTES, MAX_LOGPROBS, MAX_REQUEST_ID_BYTES, StoppingParams
from common.tokenization import ChatMessage, Tokenizer
from common.tokenization.stop_strings import MAX_STOP_STRING_LENGTH
from common.wire import sampling_from_proto, stopping_from_proto
from pdserve.v1 import router_pb2
from router.fleet import ServedModel
from router.request import Arrival, Request

MAX_PRIORITY = 100
MAX_CHAT_MESSAGES = 4096
MAX_ROLE_BYTES = 64
MAX_TEMPLATE_VARIABLES = 64
MAX_TEMPLATE_VARIABLE_BYTES = 64 * 1024
# Tokenising this many characters takes a millisecond or so; longer texts must not hold up the event loop.
INLINE_CHARACTERS = 4096


class Intake:
    """Knows the tokenizer and what the operator allows."""

    def __init__(self, tokenizer: Tokenizer | None, *, model_id: str, max_prompt_tokens: int) -> None:
        """`max_prompt_tokens` 0: what the model's context allows."""
        self._tokenizer = tokenizer
        self._model_id = model_id
        self._max_prompt_tokens = max_prompt_tokens

    def check(self, message: router_pb2.GenerateRequest) -> str:
        """What can be said of a request without knowing the model; returns its id, drawn when unset.

        Raises InvalidArgument, naming the field and the limit.
        """
        if message.HasField("request_id"):
            _check_length("request_id", message.request_id, 1, MAX_REQUEST_ID_BYTES)
        _check_length("cache_salt", message.cache_salt, 0, MAX_CACHE_SALT_BYTES)
        if abs(message.priority) > MAX_PRIORITY:
            _refuse("priority", f"in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", message.priority)
        for field in ("num_logprobs", "num_prompt_logprobs"):
            if getattr(message, field) > MAX_LOGPROBS:
                _refuse(field, f"at most {MAX_LOGPROBS}", getattr(message, field))
        if message.WhichOneof("input") is None:
            raise InvalidArgument("one of prompt, prompt_token_ids and chat must be set", field="input")
        _check_chat(message.chat)
        return message.request_id if message.HasField("request_id") else str(uuid.uuid4())

    async def admit(
        self,
        message: router_pb2.GenerateRequest,
        model: ServedModel,
        request_id: str,
        arrival: Arrival,
    ) -> Request:
        """A checked message as a Request for `model`.

        Raises:
            NotFound: it is for another model.
            InvalidArgument: naming the field and the limit.
            FailedPrecondition: it needs a tokenizer or a chat template, and there is none.
        """
        if message.HasField("model") and message.model not in {self._model_id, *model.model_ids}:
            raise NotFound(f"no model {message.model!r} here; there is {self._model_id!r}", field="model")
        sampling = sampling_from_proto(message.sampling)
        sampling.validate(model.vocab_size)
        if not message.sampling.HasField("seed"):
            sampling = replace(sampling, seed=secrets.randbits(64))
        stopping = stopping_from_proto(message.stopping)
        stopping.validate(model.vocab_size)
        self._check_stop_strings(stopping)
        field, token_ids = await self._token_ids(message)
        self._check_tokens(field, token_ids, model)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            stopping=_bounded(stopping, len(token_ids), model, is_default=not message.stopping.HasField("max_tokens")),
            num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
            num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
            cache_salt=bound_salt(arrival.caller, message.cache_salt),
            priority=message.priority,
            arrival=arrival,
        )

    async def _token_ids(self, message: router_pb2.GenerateRequest) -> tuple[str, Sequence[int]]:
        """The field that the prompt is in, and its tokens."""
        match message.WhichOneof("input"):
            case "prompt_token_ids":
                return "prompt_token_ids.ids", list(message.prompt_token_ids.ids)
            case "chat":
                return "chat", await self._encode(self._render(message.chat), "chat", add_special_tokens=False)
            case _:
                return "prompt", await self._encode(message.prompt, "prompt", add_special_tokens=True)

    def _render(self, chat: router_pb2.Chat) -> str:
        template = self._tokenizer.chat_template if self._tokenizer else None
        if template is None:
            raise FailedPrecondition(
                "this router has no chat template: send a prompt, or give the router a --model folder that has one",
                field="chat",
            )
        if not chat.messages:
            raise InvalidArgument("a conversation needs at least one message", field="chat.messages")
        messages = [ChatMessage(message.role, message.content) for message in chat.messages]
        return template.render(messages, chat.template_kwargs)

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise FailedPrecondition(
                "this router has no tokenizer: send prompt_token_ids, or give the router a --model folder that has one",
                field=field,
            )
        if len(text) <= INLINE_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def _check_stop_strings(self, stopping: StoppingParams) -> None:
        if stopping.stop and self._tokenizer is None:
            raise FailedPrecondition(
                "this router has no tokenizer, so it cannot see stop strings: use stop_token_ids", field="stopping.stop"
            )
        longest = max(map(len, stopping.stop), default=0)
        if longest > MAX_STOP_STRING_LENGTH:
            _refuse("stopping.stop", f"at most {MAX_STOP_STRING_LENGTH:,} characters each", f"{longest:,} characters")

    def _check_tokens(self, field: str, token_ids: Sequence[int], model: ServedModel) -> None:
        if not token_ids:
            raise InvalidArgument(f"{field} has no tokens", field=field)
        longest = min(self._max_prompt_tokens or model.context_length - 1, model.context_length - 1)
        if len(token_ids) > longest:
            limit = (
                f"the context of {model.context_length:,} tokens, one of which is for output"
                if longest == model.context_length - 1
                else f"{longest:,} tokens (max_prompt_tokens)"
            )
            raise InvalidArgument(f"{field} has {len(token_ids):,} tokens, more than {limit}", field=field)
        highest = max(token_ids)
        if highest >= model.vocab_size:
            limit = f"token ids below the vocabulary size {model.vocab_size:,}"
            _refuse(field, limit, f"{highest:,} at position {token_ids.index(highest):,}")


def _bounded(
    stopping: StoppingParams, num_prompt_tokens: int, model: ServedModel, *, is_default: bool
) -> StoppingParams:
    """max_tokens within what the context leaves; the default also within what a decode worker can hold."""
    room = model.context_length - num_prompt_tokens
    if is_default:
        room = max(1, min(room, model.num_kv_tokens - num_prompt_tokens))
    max_tokens = min(stopping.max_tokens, room)
    return replace(stopping, max_tokens=max_tokens, min_tokens=min(stopping.min_tokens, max_tokens))


def _check_chat(chat: router_pb2.Chat) -> None:
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        _refuse("chat.messages", f"at most {MAX_CHAT_MESSAGES:,}", f"{len(chat.messages):,}")
    for message in chat.messages:
        _check_length("chat.messages.role", message.role, 0, MAX_ROLE_BYTES)
    if len(chat.template_kwargs) > MAX_TEMPLATE_VARIABLES:
        _refuse("chat.template_kwargs", f"at most {MAX_TEMPLATE_VARIABLES} variables", len(chat.template_kwargs))
    for name, value in chat.template_kwargs.items():
        _check_length("chat.template_kwargs", name, 0, MAX_ROLE_BYTES)
        _check_length("chat.template_kwargs", value, 0, MAX_TEMPLATE_VARIABLE_BYTES)


def _check_length(field: str, text: str, minimum: int, maximum: int) -> None:
    length = len(text.encode())
    if not minimum <= length <= maximum:
        _refuse(field, f"{minimum} to {maximum} bytes", f"{length} bytes")


def _refuse(field: str, limit: str, given: object) -> None:
    raise InvalidArgument(f"{field} must be {limit}, got {given}", field=field)
