"""Prompts from a file: JSON lines, or a conversation file as ShareGPT has it.

    {"prompt": "Once upon", "max_tokens": 64}        text; max_tokens is optional everywhere
    {"prompt_token_ids": [5, 17, 4]}                  token ids
    {"messages": [{"role": "user", "content": "Hi"}]} a conversation, through the model's chat template
    {"conversations": [{"from": "human", "value": "Hi"}, …]}   its first human turn, as text
    "Once upon"                                       text

A file that is one JSON list of those is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.settings import ConfigError
from pdserve.request import Chat, Message, Prompt

HUMAN = ("human", "user")


class FilePrompt(NamedTuple):
    """`max_tokens` is None where the file leaves it to the command."""

    prompt: Prompt
    max_tokens: int | None


def read_prompts(path: str) -> tuple[FilePrompt, ...]:
    """Raises ConfigError, which names the line or entry that cannot be used."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path!r}: {getattr(error, 'strerror', None) or error}") from None
    prompts = tuple(_prompt(entry, f"{path}, {place}") for place, entry in _entries(text, path))
    if not prompts:
        raise ConfigError(f"prompts {path!r}: there is none in it")
    return prompts


def _entries(text: str, path: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
        yield from ((f"entry {number}", entry) for number, entry in enumerate(listed, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error.msg}") from None


def _prompt(entry: Any, place: str) -> FilePrompt:
    if isinstance(entry, str):
        return FilePrompt(entry, None)
    try:
        max_tokens = entry.get("max_tokens")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ConfigError(f"{place}: max_tokens has to be a number of tokens, not {max_tokens!r}")
        if "prompt" in entry:
            return FilePrompt(str(entry["prompt"]), max_tokens)
        if "prompt_token_ids" in entry:
            return FilePrompt([int(one) for one in entry["prompt_token_ids"]], max_tokens)
        if "messages" in entry:
            return FilePrompt(Chat([Message(one["role"], one["content"]) for one in entry["messages"]]), max_tokens)
        human = next(turn["value"] for turn in entry["conversations"] if turn["from"] in HUMAN)
        return FilePrompt(str(human), max_tokens)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration):
        expected = "a string, or an object with prompt, prompt_token_ids, messages or conversations"
        raise ConfigError(f"{place}: expected {expected}") from None
