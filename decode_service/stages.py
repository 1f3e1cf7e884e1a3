"""The stages of one Decode stream as spans: what it waits for, one thing after the other (`common.tracing`).

    queue ─▶ prefill, or KV arriving ─▶ first_decode ─▶ stream
      ▲                   │                   │            │
      └───── retry ◀──────┴───── attempt lost ┴────────────┘

While KV arrives there is no span of its own: the prefill worker has it.
"""

from __future__ import annotations

from types import TracebackType

from common.clock import Clock
from common.errors import Aborted, PdserveError, Unavailable
from common.tracing import Span
from decode_service.events import Completed, Event, Lost, Reserved, Token

_ARRIVING = "KV arriving"


class Stages:
    """A context manager: the stage under way ends with what is inside it. Belongs to the event loop."""

    def __init__(self, span: Span, clock: Clock) -> None:
        self._span = span
        self._clock = clock
        # Empty: none is under way.
        self._stage = ""
        self._since_s = 0.0
        self._attempt = 0
        self._is_local = False

    def asked(self, *, local: bool) -> None:
        """The router wants an attempt; with `local`, one that is computed here."""
        self._end(Aborted("the router asked for another attempt"))
        self._is_local = local
        self._begin("queue")

    def note(self, *events: Event) -> None:
        """`events` have come from the engine."""
        for event in events:
            match event:
                case int():
                    self._token(self._clock())
                case Token():
                    self._token(event.at_s or self._clock())
                case Reserved():
                    self._attempt = event.attempt
                    self._end()
                    self._begin("prefill" if self._is_local else _ARRIVING)
                case Lost():
                    reason = "PREEMPTED" if event.preempted else "PAIR_LOST"
                    self._end(Unavailable(event.detail, reason=reason))
                    self._span.event("attempt_lost", attempt=event.attempt, reason=reason)
                case Completed():
                    self._complete(event)
                case PdserveError():
                    self._end(event)

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def _token(self, at_s: float) -> None:
        if self._stage == "stream":
            return
        is_first = self._stage != "first_decode"
        self._end(at_s=at_s)
        self._begin("first_decode" if is_first else "stream", at_s)

    def _complete(self, completed: Completed) -> None:
        if self._stage != "first_decode":
            self._end()
        # Otherwise there is one token alone, and no step was made for it.
        self._stage = ""
        self._span.set(
            kv_path=completed.kv_path.value,
            kv_bytes=completed.kv_bytes,
            kv_transport=completed.kv_transport,
            num_output_tokens=completed.num_output_tokens,
        )

    def _begin(self, stage: str, at_s: float | None = None) -> None:
        self._stage, self._since_s = stage, self._clock() if at_s is None else at_s

    def _end(self, error: BaseException | None = None, at_s: float | None = None) -> None:
        if self._stage and self._stage != _ARRIVING:
            end_s = self._clock() if at_s is None else at_s
            self._span.stage(self._stage, self._since_s, end_s, error, attempt=self._attempt)
        self._stage = ""
