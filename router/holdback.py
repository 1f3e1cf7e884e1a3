"""Holds back the tokens and the text that a stop string may still take away. Knows one text, never a request."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from common.tokenization import StopMatch, StopMatcher, StopStrings


class Token(NamedTuple):
    """A token and its log-probability, None unless asked for."""

    token_id: int
    logprob: Any


class HoldBack:
    """Between the detokenizer and the client: a token goes on once no stop string can reach back into its text."""

    def __init__(self, stops: Iterable[str], *, include_stop: bool) -> None:
        """`include_stop`: the matched stop string goes on too, with every token that has a part of it."""
        self._matcher = StopMatcher(StopStrings(tuple(stops)))
        self._include_stop = include_stop
        # Each with the character of the text up to which it reaches.
        self._tokens: deque[tuple[Token, int]] = deque()
        self._text = ""
        self.match: StopMatch | None = None

    def add(self, token: Token, text: str, *, is_partial: bool, may_match: bool) -> tuple[list[Token], str]:
        """One more token and the text that it completes; returns what goes on because of it.

        `is_partial`: the token ends inside a character, so it reaches into the next one. Not after a match.
        """
        self._tokens.append((token, self._matcher.num_read + len(text) + is_partial))
        return self.read(text, may_match=may_match)

    def read(self, text: str, *, may_match: bool) -> tuple[list[Token], str]:
        """More text of the tokens so far; returns what goes on because of it."""
        assert self.match is None, "nothing follows a stop string"
        self._text += text
        text_begin = self._matcher.num_read + len(text) - len(self._text)
        self.match = self._matcher.feed(text, may_match=may_match)
        if self.match is None:
            text_end = tokens_end = self._matcher.num_settled
        elif self._include_stop:
            text_end, tokens_end = self.match.end, self._tokens[-1][1]
        else:
            text_end = tokens_end = self.match.start
        return self._tokens_up_to(tokens_end), self._text_up_to(text_end - text_begin)

    def end(self) -> tuple[list[Token], str]:
        """There is no more text, so nothing needs to be held back."""
        return self._tokens_up_to(self._tokens[-1][1] if self._tokens else 0), self._text_up_to(len(self._text))

    def _tokens_up_to(self, character: int) -> list[Token]:
        tokens = []
        while self._tokens and self._tokens[0][1] <= character:
            tokens.append(self._tokens.popleft()[0])
        return tokens

    def _text_up_to(self, length: int) -> str:
        text, self._text = self._text[:length], self._text[length:]
        return text
