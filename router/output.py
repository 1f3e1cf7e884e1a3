"""What a completion puts out: the text of its tokens, without what stopped it.

Knows tokens and text, never workers. Log-probabilities pass through unseen, one beside each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from common.params import StoppingParams
from common.tokenization import Tokenizer
from router.holdback import HoldBack, Token


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


class Ending(NamedTuple):
    """Why a completion ended; at most one of the stops is set."""

    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


class Piece(NamedTuple):
    """Some more output. The text may lag behind the tokens by an incomplete character."""

    token_ids: list[int]
    text: str
    # Empty unless asked for.
    logprobs: list[Any]
    prompt_logprobs: list[Any]


class Output:
    """One completion's tokens in (`push`), pieces out (`take`).

    Without stop strings a token goes out at once. With them it waits until no stop string can reach back into it. A
    token that may be the stop token waits for what decode says next.
    """

    def __init__(self, stopping: StoppingParams, stop_token_ids: frozenset[int], tokenizer: Tokenizer | None) -> None:
        """`stop_token_ids`: the request's and, unless ignored, the model's own. Stop strings need a tokenizer."""
        self._stopping = stopping
        self._stop_token_ids = stop_token_ids
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._holdback = (
            HoldBack(stopping.stop, include_stop=stopping.include_stop_in_output) if stopping.stop else None
        )
        # Every token that counts, in order: up to the one that completes a stop string.
        self.token_ids: list[int] = []
        self._stop_candidate: Token | None = None
        self._ready_ids: list[int] = []
        self._ready_text = ""
        self._ready_logprobs: list[Any] = []
        self._ready_prompt_logprobs: list[Any] = []

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the completion."""
        match = self._holdback.match if self._holdback else None
        return match.stop if match else None

    @property
    def ending(self) -> Ending | None:
        """How the completion ends, when its tokens alone say so."""
        if self.stop_string is not None:
            return Ending(FinishReason.STOP, stop_string=self.stop_string)
        num_tokens = len(self.token_ids)
        if self._stop_candidate is not None and num_tokens + 1 >= self._stopping.min_tokens:
            return Ending(FinishReason.STOP, stop_token_id=self._stop_candidate.token_id)
        if num_tokens >= self._stopping.max_tokens:
            return Ending(FinishReason.LENGTH)
        return None

    def push(self, token_ids: list[int], logprobs: Sequence[Any] = (), prompt_logprobs: Sequence[Any] = ()) -> None:
        """The next tokens that decode drew. `logprobs` is empty or as long as `token_ids`."""
        self.go_on()
        self._ready_prompt_logprobs.extend(prompt_logprobs)
        if token_ids and token_ids[-1] in self._stop_token_ids:
            self._stop_candidate = Token(token_ids[-1], logprobs[-1] if logprobs else None)
            token_ids, logprobs = token_ids[:-1], logprobs[:-1]
        self._accept(token_ids, logprobs)

    def go_on(self) -> None:
        """Decode has more to say, so its last token was no stop token."""
        if self._stop_candidate is not None:
            candidate, self._stop_candidate = self._stop_candidate, None
            self._accept([candidate.token_id], [] if candidate.logprob is None else [candidate.logprob])

    def resume(self) -> None:
        """Another worker goes on after `token_ids`: a last token that may be a stop token is drawn again."""
        self._stop_candidate = None

    def take(self) -> Piece | None:
        """What may go out by now; None when there is nothing."""
        if not (self._ready_ids or self._ready_text or self._ready_prompt_logprobs):
            return None
        piece = Piece(self._ready_ids, self._ready_text, self._ready_logprobs, self._ready_prompt_logprobs)
        self._ready_ids, self._ready_text, self._ready_logprobs, self._ready_prompt_logprobs = [], "", [], []
        return piece

    def finish(self, ending: Ending) -> Ending:
        """No token follows: what was held back is ready, but for the stop.

        Returns the ending, in which text has the last word: an incomplete character becomes U+FFFD, which may complete
        a stop string.
        """
        if ending.stop_token_id is None:
            self.go_on()
        if self.stop_string is None:
            self._end_text()
        if self.stop_string is not None:
            return Ending(FinishReason.STOP, stop_string=self.stop_string)
        if self._stop_candidate is not None:
            token, self._stop_candidate = self._stop_candidate, None
            self.token_ids.append(token.token_id)
            if self._stopping.include_stop_in_output:
                text = self._detokenizer.feed(token[:1]) + self._detokenizer.flush() if self._detokenizer else ""
                self._add([token], text)
        return ending

    def _accept(self, token_ids: Sequence[int], logprobs: Sequence[Any]) -> None:
        if self._holdback is not None:
            for place, token_id in enumerate(token_ids):
                if self._holdback.match is None:
                    self._hold(self._holdback, Token(token_id, logprobs[place] if logprobs else None))
            return
        self.token_ids += token_ids
        self._ready_ids += token_ids
        self._ready_logprobs += logprobs
        if self._detokenizer:
            self._ready_text += self._detokenizer.feed(token_ids)

    def _hold(self, holdback: HoldBack, token: Token) -> None:
        assert self._detokenizer is not None, "stop strings need a tokenizer"
        self.token_ids.append(token.token_id)
        text = self._detokenizer.feed(token[:1])
        is_partial = self._detokenizer.has_partial_character
        self._add(*holdback.add(token, text, is_partial=is_partial, may_match=self._may_stop))

    def _end_text(self) -> None:
        tail = self._detokenizer.flush() if self._detokenizer else ""
        if self._holdback is None:
            self._ready_text += tail
            return
        self._add(*self._holdback.read(tail, may_match=self._may_stop))
        if self._holdback.match is None:
            self._add(*self._holdback.end())

    @property
    def _may_stop(self) -> bool:
        return len(self.token_ids) >= self._stopping.min_tokens

    def _add(self, tokens: list[Token], text: str) -> None:
        self._ready_ids += [token.token_id for token in tokens]
        self._ready_logprobs += [token.logprob for token in tokens if token.logprob is not None]
        self._ready_text += text
