"""Log-probabilities of a choice, in the two forms that OpenAI has for them.

completions   {"tokens": […], "token_logprobs": […], "top_logprobs": [{token: logprob}], "text_offset": […]}
chat          {"content": [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}]}
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from common.tokenization import Detokenizer, Tokenizer

_Decoder = codecs.getincrementaldecoder("utf-8")
# JSON has no infinity.
_LEAST = -1e30


class TokenNames:
    """What tokens are called in replies."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token_id: int) -> bytes:
        """Empty without a tokenizer, and for ids without a token."""
        return self._tokenizer.bytes_of(token_id) if self._tokenizer else b""

    def detokenizer(self) -> Detokenizer | None:
        """Of one completion; None without a tokenizer."""
        return self._tokenizer.detokenizer() if self._tokenizer else None

    def text_of(self, token_ids: Iterable[int]) -> str:
        """As a prompt that had these tokens, special ones by name."""
        return b"".join(map(self.bytes_of, token_ids)).decode(errors="replace")

    def unique(self, token_id: int) -> str:
        """A name that no other token has: half a character is written as `bytes:\\xf0\\x9f`."""
        raw = self.bytes_of(token_id)
        if not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """Of one choice of /v1/completions, as it goes on: knows how much text there was."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._detokenizer = names.detokenizer()
        self._num_characters = 0

    def of_prompt(self, token_ids: Sequence[int], logprobs: Sequence[Any]) -> dict[str, list[Any]]:
        """`logprobs` of every token but the first, for which there is none."""
        decoder = _Decoder("replace")
        offsets = [self._offset(decoder.decode(self._names.bytes_of(token_id))) for token_id in token_ids]
        # An incomplete character ends with the prompt.
        self._offset(decoder.decode(b"", final=True))
        values, top = self._values(logprobs)
        return self._block(token_ids, [None, *values], [None, *top], offsets)

    def of_output(self, token_ids: Sequence[int], logprobs: Sequence[Any]) -> dict[str, list[Any]]:
        """`logprobs` one for each of `token_ids`, as TokenLogprob of the protocol."""
        feed = self._detokenizer.feed if self._detokenizer else lambda _: ""
        offsets = [self._offset(feed([token_id])) for token_id in token_ids]
        return self._block(token_ids, *self._values(logprobs), offsets)

    def _values(self, logprobs: Sequence[Any]) -> tuple[list[float], list[dict[str, float]]]:
        unique = self._names.unique
        top = [{unique(entry.token_id): _finite(entry.logprob) for entry in (*one.top, one)} for one in logprobs]
        return [_finite(one.logprob) for one in logprobs], top

    def _block(
        self, token_ids: Sequence[int], values: list[Any], top: list[Any], offsets: list[int]
    ) -> dict[str, list[Any]]:
        tokens = [self._names.unique(token_id) for token_id in token_ids]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _offset(self, text: str) -> int:
        """Where `text` begins, which comes next."""
        offset = self._num_characters
        self._num_characters += len(text)
        return offset


def join(blocks: Iterable[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """One block of several that follow one another."""
    joined: dict[str, list[Any]] = {}
    for block in blocks:
        for name, values in block.items():
            joined.setdefault(name, []).extend(values)
    return joined


def chat_logprobs(names: TokenNames, logprobs: Sequence[Any]) -> dict[str, Any]:
    """Of some more output of a chat; `logprobs` as TokenLogprob of the protocol."""
    return {
        "content": [{**_entry(names, one), "top_logprobs": [_entry(names, top) for top in one.top]} for one in logprobs]
    }


def _entry(names: TokenNames, one: Any) -> dict[str, Any]:
    raw = names.bytes_of(one.token_id)
    token = raw.decode(errors="replace") if raw else names.unique(one.token_id)
    return {"token": token, "logprob": _finite(one.logprob), "bytes": list(raw) or None}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
