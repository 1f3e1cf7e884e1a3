"""Renders a conversation the way the model was trained to read it.

Runs the folder's Jinja template with what Transformers gives it (`raise_exception`, `strftime_now`, `tojson`, loop
controls, the special tokens), in a sandbox: the template comes with the model, from outside.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import FailedPrecondition, InvalidArgument

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


# What a template raises for a conversation that it was not written for.
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatMessage(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """From `chat_template.jinja`, else from `tokenizer_config.json`; None when the folder has no template.

        Raises FailedPrecondition, naming the folder, for a file that cannot be used.
        """
        try:
            config = _read_json(folder / "tokenizer_config.json")
            source = _read_text(folder / "chat_template.jinja") or _default(config.get("chat_template"))
            return None if source is None else cls(source, _special_tokens(config))
        except (OSError, ValueError, jinja2.TemplateSyntaxError) as error:
            raise FailedPrecondition(f"the chat template of {folder} cannot be used: {error}") from error

    def render(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, str] | None = None) -> str:
        """The prompt that asks for the assistant's next turn.

        `kwargs` are extra variables for the template, each a JSON value; they stand over all others but `messages`.
        Raises InvalidArgument for what the template refuses.
        """
        variables = {
            **self._special_tokens,
            "add_generation_prompt": True,
            **{name: _json_value(name, text) for name, text in (kwargs or {}).items()},
            "messages": [message._asdict() for message in messages],
        }
        try:
            return self._template.render(variables)
        except _REFUSALS as error:
            raise InvalidArgument(f"the chat template refuses this conversation: {error}", field="chat") from error


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _json_value(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        field = f"chat.template_kwargs[{name!r}]"
        raise InvalidArgument(f"{field} must be a JSON value, got {text[:80]!r}: {error}", field=field) from None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    given = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in given.items()}


def _default(template: Any) -> str | None:
    """A folder may carry several named templates; the one for conversations is named "default"."""
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    return {} if text is None else json.loads(text)
