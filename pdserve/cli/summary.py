"""How one completion went: what this side timed, and the serving path in words."""

from __future__ import annotations

from rich.text import Text

from common.clock import Clock, monotonic
from pdserve.cli.terminal import counted
from pdserve.results import Completion, ServingPath


class Stopwatch:
    """Runs from its making; `count` notes tokens as they come."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._first: float | None = None
        self._last = self._started
        self._num_first = 0
        self.num_tokens = 0

    def count(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        self._last = self._clock()
        if self._first is None:
            self._first, self._num_first = self._last, num_tokens
        self.num_tokens += num_tokens

    @property
    def first_token_ms(self) -> float | None:
        """None before the first token."""
        return None if self._first is None else (self._first - self._started) * 1e3

    @property
    def tokens_per_s(self) -> float | None:
        """Pace of the tokens after the first chunk; None when there were none."""
        if self._first is None or self._last == self._first:
            return None
        return (self.num_tokens - self._num_first) / (self._last - self._first)


def summary(completion: Completion, stopwatch: Stopwatch) -> list[Text]:
    """The lines that `pdserve generate` ends with."""
    usage, path = completion.usage, completion.path
    prompt = f"{counted(usage.prompt_tokens, 'prompt token')} ({usage.cached_prompt_tokens:,} cached)"
    pace = [_ms(stopwatch.first_token_ms)] if stopwatch.first_token_ms is not None else ["none came"]
    if stopwatch.tokens_per_s is not None:
        pace.append(f"then {stopwatch.tokens_per_s:,.0f} tokens/s")
    times = f"queue {_ms(path.queue_ms)} · prefill {_ms(path.prefill_ms)} · transfer {_ms(path.kv_transfer_ms)}"
    return [
        _line("first token", ", ".join(pace)),
        _line("tokens", f"{usage.completion_tokens:,} from {prompt}"),
        _line("finished", _ending(completion)),
        _line("path", _workers(path)),
        _line("KV", f"{path.kv_path}: {_kv_in_words(path)}"),
        _line("times", f"{times} · first decode {_ms(path.first_decode_ms)}"),
    ]


def _line(label: str, value: str) -> Text:
    return Text.assemble((f"{label:<12}", "dim"), value)


def _ending(completion: Completion) -> str:
    if completion.stop_string is not None:
        return f"STOP: the string {completion.stop_string!r} came"
    if completion.stop_token_id is not None:
        return f"STOP: the end token {completion.stop_token_id} came"
    return {"LENGTH": "LENGTH: max_tokens, or the end of the context"}.get(
        completion.finish_reason, completion.finish_reason
    )


def _kv_in_words(path: ServingPath) -> str:
    crossed = f"{counted(path.kv_bytes, 'byte')} over {path.kv_transport}" if path.kv_bytes else "no bytes crossed"
    match path.kv_path:
        case "REMOTE":
            return f"computed by prefill, {crossed}"
        case "LOCAL":
            return f"computed by the decode worker itself, {crossed}"
        case "CACHED":
            return f"decode held all of it already, {crossed}"
        case "RECOMPUTED":
            return f"lost on the way and computed again, {crossed} in all"
    return crossed


def _workers(path: ServingPath) -> str:
    alone = path.prefill_worker == path.decode_worker
    words = f"{path.decode_worker} alone" if alone else f"{path.prefill_worker} → {path.decode_worker}"
    return f"{words}, {counted(path.num_resumptions, 'resumption')}" if path.num_resumptions else words


def _ms(value: float) -> str:
    """Three figures at least, seconds from one second on."""
    if value >= 1000:
        return f"{value / 1000:,.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
