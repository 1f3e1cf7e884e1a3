"""One request from its due time to its end: the only file here that calls a router. Nothing is tried again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from common.clock import Clock
from common.errors import PdserveError
from pdserve.bench.workload import Ask
from pdserve.client import AsyncClient
from pdserve.results import Completion

OK = "OK"
# A call needs a deadline in the future, even where the sender is later than the request may take.
LEAST_S = 0.001


@dataclass
class Sent:
    """What became of a request. Seconds on the machine's monotonic clock."""

    index: int
    is_measured: bool
    # When it was to be sent; in a closed loop, when it was.
    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    # When each message with tokens came, and how many it had.
    messages: list[tuple[float, int]] = field(default_factory=list)
    # OK, or the gRPC status and pdserve's reason.
    status: str = ""
    # Of the completion: usage and serving path, by the names of their fields.
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return self.status == OK

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.messages)


Follow = Callable[[Ask, Sent], Any]


async def follow(client: AsyncClient, ask: Ask, sent: Sent, *, timeout_s: float, clock: Clock) -> None:
    """Sends `ask` and notes in `sent` what comes; whatever it ends with is a status."""
    sent.sent_s = clock()
    left_s = max(LEAST_S, sent.due_s + timeout_s - sent.sent_s)
    try:
        async with contextlib.aclosing(client.generate(ask.prompt, timeout_s=left_s, **ask.options)) as events:
            async for event in events:
                if isinstance(event, Completion):
                    sent.answer = asdict(event.usage) | asdict(event.path)
                elif event.token_ids:
                    sent.messages.append((clock(), len(event.token_ids)))
        sent.status = OK
    except PdserveError as error:
        status = error.code.name
        sent.status = status if error.reason in ("", status) else f"{status} {error.reason}"
    sent.ended_s = clock()
