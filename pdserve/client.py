"""An async client of a router. Every call has a deadline; every failure is a class of `common.errors`.

async with Client("127.0.0.1:50051") as client:
    async for event in client.generate("Once upon a time", max_tokens=64):
        ...

What it shows and believes (TLS, a token) is an `Access`, taken from the environment when none is given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Unpack

from common import errors
from pdserve.connection import Connection
from pdserve.request import Options, Prompt, request_to_proto
from pdserve.results import (
    Chunk,
    Completion,
    Explanation,
    Model,
    Workers,
    event_from_proto,
    explanation_from_proto,
    model_from_proto,
    workers_from_proto,
)
from pdserve.v1 import router_pb2, router_pb2_grpc

GENERATE_TIMEOUT_S = 600.0
LOOKUP_TIMEOUT_S = 10.0


class Client(Connection):
    """RouterService of one router (HOST:PORT), used inside `async with`."""

    async def __aenter__(self) -> Client:
        await super().__aenter__()
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)
        return self

    async def generate(
        self, prompt: Prompt, *, timeout_s: float = GENERATE_TIMEOUT_S, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """One completion: its chunks as they come, then exactly one Completion.

        Closing the iterator before its end cancels the work everywhere. Leaving an `async for` early does not close it;
        `async with contextlib.aclosing(client.generate(...)) as events` does.

        Raises:
            PdserveError: as the router says; InvalidArgument also for an option that its field cannot hold.
        """
        call = self._stub.Generate(request_to_proto(prompt, options), timeout=timeout_s, metadata=self._metadata)
        request_id, complete = "", False
        try:
            with self.failures():
                async for message in call:
                    request_id = message.request_id or request_id
                    event = event_from_proto(message, request_id)
                    complete = complete or isinstance(event, Completion)
                    if event is not None:
                        yield event
        finally:
            call.cancel()
        if not complete:
            raise errors.Internal(f"{self.target} ended the stream without a completion", reason="NO_COMPLETION")

    async def get_model(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Model:
        with self.failures():
            request = router_pb2.GetModelRequest()
            return model_from_proto(await self._stub.GetModel(request, timeout=timeout_s, metadata=self._metadata))

    async def list_workers(self, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Workers:
        with self.failures():
            request = router_pb2.ListWorkersRequest()
            return workers_from_proto(await self._stub.ListWorkers(request, timeout=timeout_s, metadata=self._metadata))

    async def explain(
        self, prompt: Prompt, *, timeout_s: float = LOOKUP_TIMEOUT_S, **options: Unpack[Options]
    ) -> Explanation:
        """How the router would place this prompt at this moment; nothing is generated."""
        return await self._explain(router_pb2.ExplainRequest(prompt=request_to_proto(prompt, options)), timeout_s)

    async def explain_request(self, request_id: str, *, timeout_s: float = LOOKUP_TIMEOUT_S) -> Explanation:
        """How it placed a request of late. Raises NotFound when it knows of none."""
        return await self._explain(router_pb2.ExplainRequest(request_id=request_id), timeout_s)

    async def _explain(self, request: router_pb2.ExplainRequest, timeout_s: float) -> Explanation:
        with self.failures():
            response = await self._stub.Explain(request, timeout=timeout_s, metadata=self._metadata)
        return explanation_from_proto(response)
