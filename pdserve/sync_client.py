"""A client of one router or several, without asyncio: `AsyncClient` on an event loop in the background.

with Client("127.0.0.1:50051") as client:
    print(client.complete("Once upon a time", max_tokens=64).text)
    for event in client.generate("Once upon a time", max_tokens=64):
        ...

May be used by several threads. Calls mean, take and raise what those of `pdserve.client.AsyncClient` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from pdserve.access import Access
from pdserve.background import background_loop
from pdserve.client import DEFAULT_TARGET, GENERATE_TIMEOUT_S, LOOKUP_TIMEOUT_S, AsyncClient
from pdserve.request import Options, Prompt, Turn
from pdserve.results import Chunk, Completion, Explanation, Model, Reply, Workers
from pdserve.retrying import RetryPolicy


class Client:
    """RouterService, of whichever router serves; closed at the end of `with` or by `close`."""

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        access: Access | None = None,
        retries: int | RetryPolicy = 5,
    ) -> None:
        """As AsyncClient's. Raises ConfigError for what cannot be used, or would send a token in plaintext."""
        self._client = AsyncClient(target, access=access, retries=retries)
        self._loop = background_loop()

    @property
    def targets(self) -> tuple[str, ...]:
        return self._client.targets

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way. Nothing can be called afterwards."""
        self._loop.run(self._client.close())

    def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **options: Unpack[Options]
    ) -> Iterator[Chunk | Completion]:
        """One completion: its chunks as they come, then exactly one Completion. Sent when the first is asked for.

        Leaving the loop early cancels the work everywhere.
        """
        return self._loop.iterate(partial(self._client.generate, prompt, timeout_s=timeout_s, **options))

    def complete(self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **options: Unpack[Options]) -> Reply:
        """One whole completion."""
        return self._loop.run(self._client.complete(prompt, timeout_s=timeout_s, **options))

    def chat(
        self,
        messages: Sequence[Turn],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[Options],
    ) -> Reply:
        """The whole answer to a conversation; `generate(Chat(messages), ...)` streams it."""
        answer = self._client.chat(messages, template_kwargs=template_kwargs, timeout_s=timeout_s, **options)
        return self._loop.run(answer)

    def get_model(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Model:
        return self._loop.run(self._client.get_model(timeout_s=timeout_s))

    def list_workers(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Workers:
        """As one of the routers sees them."""
        return self._loop.run(self._client.list_workers(timeout_s=timeout_s))

    def explain(
        self, prompt: Prompt, *, timeout_s: float = LOOKUP_TIMEOUT_S, **options: Unpack[Options]
    ) -> Explanation:
        """How the router would place this prompt at this moment; nothing is generated."""
        return self._loop.run(self._client.explain(prompt, timeout_s=timeout_s, **options))

    def explain_request(self, request_id: str, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Explanation:
        """How it placed a request of late. Raises NotFound when it knows of none."""
        return self._loop.run(self._client.explain_request(request_id, timeout_s=timeout_s))

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once a router answers health and is ready for work; raises Unavailable when none is in time."""
        self._loop.run(self._client.wait_until_ready(timeout_s))
