"""How a choice looks in a reply: in events as it goes on, or whole."""

from __future__ import annotations

from collections.abc import Iterable

from router.http.asked import Asked
from router.http.choices import Choice
from router.http.fields import Json
from router.http.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, join
from router.output import Piece
from router.session import Completed

NOTHING = Piece([], "", [], [])


class Shape:
    """Of one choice; told its pieces in order. `end` is where the path that it took is proven."""

    id_prefix: str
    object: str
    event_object: str

    def __init__(self, choice: Choice, asked: Asked, names: TokenNames) -> None:
        self._choice = choice
        self._asked = asked
        self._names = names
        self._has_begun = False

    def event(self, piece: Piece) -> Json:
        """The choice in the event that carries `piece`."""
        return {**self._shown(piece, self._begin()), "finish_reason": None}

    def last_event(self, completed: Completed) -> Json:
        return {**self._shown(NOTHING, self._begin()), **self._end(completed)}

    def whole(self, pieces: Iterable[Piece], completed: Completed) -> Json:
        """The choice in a reply without events."""
        return {**self._shown(_merged(pieces), self._begin()), **self._end(completed)}

    def _shown(self, piece: Piece, is_first: bool) -> Json:
        raise NotImplementedError

    def _begin(self) -> bool:
        has_begun, self._has_begun = self._has_begun, True
        return not has_begun

    def _token_ids(self, piece: Piece, is_first: bool) -> Json:
        if not self._asked.with_token_ids:
            return {}
        of_prompt = {"prompt_token_ids": list(self._choice.prompt.token_ids)} if is_first else {}
        return {**of_prompt, "token_ids": piece.token_ids}

    def _end(self, completed: Completed) -> Json:
        ending, path = completed.ending, completed.path
        proof = {
            "request_id": self._choice.request_id,
            "stop_string": ending.stop_string,
            "stop_token_id": ending.stop_token_id,
            **path._asdict(),
            "kv_path": path.kv_path.name,
        }
        reason = "length" if self._asked.hides_output else ending.reason.value
        return {"finish_reason": reason, "pdserve": proof}


class CompletionShape(Shape):
    """Of /v1/completions, whose events look like the whole."""

    id_prefix = "cmpl-"
    object = event_object = "text_completion"

    def __init__(self, choice: Choice, asked: Asked, names: TokenNames) -> None:
        super().__init__(choice, asked, names)
        self._logprobs = CompletionLogprobs(names)

    def _shown(self, piece: Piece, is_first: bool) -> Json:
        if self._asked.hides_output:
            piece = NOTHING
        prompt = self._choice.prompt
        text, blocks = piece.text, []
        if is_first and self._asked.echo:
            text = self._prompt_text() + text
            if prompt.message.HasField("num_prompt_logprobs"):
                blocks.append(self._logprobs.of_prompt(prompt.token_ids, prompt.logprobs))
        if piece.logprobs:
            blocks.append(self._logprobs.of_output(piece.token_ids, piece.logprobs))
        return {
            "index": self._choice.index,
            "text": text,
            "logprobs": join(blocks) or None,
            **self._token_ids(piece, is_first),
        }

    def _prompt_text(self) -> str:
        message = self._choice.prompt.message
        return message.prompt if message.HasField("prompt") else self._names.text_of(message.prompt_token_ids.ids)


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    event_object = "chat.completion.chunk"

    def whole(self, pieces: Iterable[Piece], completed: Completed) -> Json:
        shown = super().whole(pieces, completed)
        message = {**shown.pop("delta"), "refusal": None}
        return {"index": shown.pop("index"), "message": message, **shown}

    def _shown(self, piece: Piece, is_first: bool) -> Json:
        delta: Json = {"role": "assistant"} if is_first else {}
        if is_first or piece.text:
            delta["content"] = piece.text
        return {
            "index": self._choice.index,
            "delta": delta,
            "logprobs": chat_logprobs(self._names, piece.logprobs) if piece.logprobs else None,
            **self._token_ids(piece, is_first),
        }


def usage_of(choices: Iterable[Choice], asked: Asked) -> Json:
    """Tokens of a prompt count once, however many choices it has."""
    prompt_tokens = completion_tokens = cached_tokens = 0
    for choice in choices:
        assert choice.completed is not None, "usage is of what has ended well"
        usage = choice.completed.usage
        completion_tokens += 0 if asked.hides_output else usage.completion_tokens
        if choice.is_first:
            prompt_tokens += usage.prompt_tokens
            cached_tokens += usage.cached_prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _merged(pieces: Iterable[Piece]) -> Piece:
    merged = Piece([], "", [], [])
    texts = []
    for piece in pieces:
        merged.token_ids.extend(piece.token_ids)
        merged.logprobs.extend(piece.logprobs)
        texts.append(piece.text)
    return merged._replace(text="".join(texts))
