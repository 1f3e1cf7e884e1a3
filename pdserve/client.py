"""An asyncio client of one router or several.

async with AsyncClient("127.0.0.1:50051") as client:
    async for event in client.generate("Once upon a time", max_tokens=64):
        ...
    reply = await client.complete("Once upon a time", max_tokens=64)

Every call has a deadline; every failure is a class of `common.errors`, after the tries that `pdserve.retrying` allows.
What it shows and believes (TLS, a token) is an `Access`, taken from the environment when none is given.
`pdserve.sync_client` is the same without asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from common import errors
from common.clock import Clock, monotonic
from pdserve.access import Access
from pdserve.connection import Connection
from pdserve.request import Chat, Options, Prompt, Turn, request_to_proto
from pdserve.results import (
    Chunk,
    Completion,
    Explanation,
    Model,
    Reply,
    Workers,
    event_from_proto,
    explanation_from_proto,
    model_from_proto,
    workers_from_proto,
)
from pdserve.retrying import Attempts, RetryPolicy
from pdserve.targets import Rotation, targets_of
from pdserve.v1 import router_pb2, router_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"
GENERATE_TIMEOUT_S = 600.0
LOOKUP_TIMEOUT_S = 10.0

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class AsyncClient:
    """RouterService, of whichever router serves. Connections are made by the first calls, in the event loop that runs
    then, and closed at the end of `async with` or by `close`."""

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        access: Access | None = None,
        retries: int | RetryPolicy = 5,
        clock: Clock = monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`target`: HOST:PORT of a router; several are a list, or one text with commas. A name may lead to many.

        `access`: what to show and believe; None: what the environment says (`Access.from_environment`).
        `retries`: how often a call waits and tries again, 0 for never. `clock` and `sleep` are time itself.
        Raises ConfigError for what cannot be used, or would send a token in plaintext.
        """
        access = Access.from_environment() if access is None else access
        self._connections = {one: Connection(one, access=access) for one in targets_of(target)}
        self._policy = RetryPolicy.of(retries)
        self._rotation = Rotation(tuple(self._connections), clock, self._policy.chance)
        self._clock, self._sleep = clock, sleep

    @property
    def targets(self) -> tuple[str, ...]:
        return self._rotation.targets

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is under way. Nothing can be called afterwards."""
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    async def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """One completion: its chunks as they come, then exactly one Completion. Sent when the first is asked for.

        Closing the iterator before its end cancels the work everywhere. Leaving an `async for` early closes it as soon
        as Python collects it; `async with contextlib.aclosing(client.generate(...)) as events` does so at once.

        Raises:
            PdserveError: as the router says; InvalidArgument also for an option that its field cannot hold. Once an
                event is out, nothing is tried again.
        """
        request = request_to_proto(prompt, options)
        attempts = self._attempts(timeout_s)
        has_output = False
        while True:
            target, left_s = attempts.begin()
            try:
                async with contextlib.aclosing(_events(self._connections[target], request, left_s)) as events:
                    async for event in events:
                        has_output = True
                        yield event
                return
            except errors.PdserveError as error:
                wait_s = attempts.wait_s(error, has_output=has_output)
                if wait_s is None:
                    raise
            await self._sleep(wait_s)

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        on_chunk: Callable[[Chunk], None] | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """One whole completion. Cancelling it cancels the work everywhere.

        `on_chunk` is called with each chunk as it comes, with all of them again when the call has to be made again.

        Raises:
            PdserveError: as `generate`; but a call that is lost in the middle is made again, from the beginning.
        """
        return await self._retrying(partial(_whole, request_to_proto(prompt, options), on_chunk), timeout_s)

    async def chat(
        self,
        messages: Sequence[Turn],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[Options],
    ) -> Reply:
        """The whole answer to a conversation; `generate(Chat(messages), ...)` streams it."""
        return await self.complete(Chat(messages, template_kwargs or {}), timeout_s=timeout_s, **options)

    async def get_model(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Model:
        request = router_pb2.GetModelRequest()
        return model_from_proto(await self._unary("GetModel", request, timeout_s))

    async def list_workers(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Workers:
        """As one of the routers sees them."""
        request = router_pb2.ListWorkersRequest()
        return workers_from_proto(await self._unary("ListWorkers", request, timeout_s))

    async def explain(
        self, prompt: Prompt, *, timeout_s: float = LOOKUP_TIMEOUT_S, **options: Unpack[Options]
    ) -> Explanation:
        """How the router would place this prompt at this moment; nothing is generated."""
        request = router_pb2.ExplainRequest(prompt=request_to_proto(prompt, options))
        return explanation_from_proto(await self._unary("Explain", request, timeout_s))

    async def explain_request(self, request_id: str, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Explanation:
        """How it placed a request of late. Raises NotFound when it knows of none."""
        request = router_pb2.ExplainRequest(request_id=request_id)
        return explanation_from_proto(await self._unary("Explain", request, timeout_s))

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Returns once a router answers health and is ready for work.

        Raises:
            Unavailable: none was within `timeout_s`; the message says whether anything answered.
            FailedPrecondition: what listens there does not serve grpc.health.v1.
        """
        waiting = [asyncio.ensure_future(one.wait_until_ready(timeout_s)) for one in self._connections.values()]
        try:
            for done in asyncio.as_completed(waiting):
                with contextlib.suppress(errors.PdserveError):
                    return await done
            await waiting[0]
        finally:
            for one in waiting:
                one.cancel()

    async def _unary(self, method: str, request: Any, timeout_s: float) -> Any:
        async def once(connection: Connection, left_s: float) -> Any:
            with connection.failures():
                call = getattr(router_pb2_grpc.RouterServiceStub(connection.channel), method)
                return await call(request, timeout=left_s, metadata=connection.metadata)

        return await self._retrying(once, timeout_s)

    async def _retrying(self, once: Callable[[Connection, float], Awaitable[T]], timeout_s: float) -> T:
        attempts = self._attempts(timeout_s)
        while True:
            target, left_s = attempts.begin()
            try:
                return await once(self._connections[target], left_s)
            except errors.PdserveError as error:
                wait_s = attempts.wait_s(error)
                if wait_s is None:
                    raise
            await self._sleep(wait_s)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._policy, self._rotation, timeout_s, self._clock)


async def _events(
    connection: Connection, request: router_pb2.GenerateRequest, timeout_s: float
) -> AsyncGenerator[Chunk | Completion, None]:
    """One try."""
    stub = router_pb2_grpc.RouterServiceStub(connection.channel)
    call = stub.Generate(request, timeout=timeout_s, metadata=connection.metadata)
    request_id, complete = "", False
    try:
        with connection.failures():
            async for message in call:
                request_id = message.request_id or request_id
                event = event_from_proto(message, request_id)
                complete = complete or isinstance(event, Completion)
                if event is not None:
                    yield event
    finally:
        call.cancel()
    if not complete:
        raise errors.Internal(f"{connection.target} ended the stream without a completion", reason="NO_COMPLETION")


async def _whole(
    request: router_pb2.GenerateRequest,
    on_chunk: Callable[[Chunk], None] | None,
    connection: Connection,
    timeout_s: float,
) -> Reply:
    """One try."""
    chunks: list[Chunk] = []
    async with contextlib.aclosing(_events(connection, request, timeout_s)) as events:
        async for event in events:
            if isinstance(event, Completion):
                return Reply.of(chunks, event)
            chunks.append(event)
            if on_chunk is not None:
                on_chunk(event)
    raise AssertionError("a stream that ended well has no completion")
