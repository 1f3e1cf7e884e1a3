"""Fake workers with a real router before them, all behind real servers in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc.aio

from common import rpc
from common.config import TINY_MODEL, RouterConfig
from common.tokenization import Tokenizer
from common.tracing import OFF, Tracer
from pdserve.v1 import router_pb2, router_pb2_grpc
from router.router import Router
from tests.fakes.decode import FakeDecode
from tests.fakes.names import FakeNames
from tests.fakes.prefill import FakePrefill

PATIENCE_S = 10.0
# Names that lead to all workers of a kind.
PREFILL_NAME, DECODE_NAME = "prefill:50052", "decode:50053"
BY_NAME = {"prefill": (PREFILL_NAME,), "decode": (DECODE_NAME,), "resolve_s": 0.02}


class FakeCluster:
    """`decode` and `prefill` are the first of each; tests give more, or set knobs, before `running` begins."""

    def __init__(self, *, num_decode: int = 1, num_prefill: int = 1, tracer: Tracer = OFF, **identity: object) -> None:
        self._decode_by_address: dict[str, FakeDecode] = {}
        self.decodes = [FakeDecode(**identity) for _ in range(num_decode)]
        self.prefills = [FakePrefill(self._decode_by_address, **identity) for _ in range(num_prefill)]
        self.names = FakeNames()
        self._tracer = tracer
        self.tokenizer: Tokenizer | None = Tokenizer.load(TINY_MODEL)
        self.router: Router
        self.stub: router_pb2_grpc.RouterServiceStub

    @property
    def decode(self) -> FakeDecode:
        return self.decodes[0]

    @property
    def prefill(self) -> FakePrefill:
        return self.prefills[0]

    @contextlib.asynccontextmanager
    async def running(self, **config: object) -> AsyncIterator[FakeCluster]:
        """Everything is up and has met; `config` are settings of the router, such as BY_NAME."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._kill_all)
            for worker in self.workers:
                await self._start(worker)
            settings = RouterConfig(
                **{
                    "prefill": tuple(worker.address for worker in self.prefills) or ("127.0.0.1:1",),
                    "decode": tuple(worker.address for worker in self.decodes) or ("127.0.0.1:1",),
                    "heartbeat_timeout_s": 0.6,
                    "replace_wait_s": 1.0,
                    "startup_grace_s": 0.0,
                    **config,
                }
            )
            self.router = Router(settings, self.tokenizer, look_up=self.names, tracer=self._tracer)
            await stack.enter_async_context(self.router.running())
            server = rpc.create_server()
            self.router.add_to(server)
            port = rpc.bind(server, "127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = rpc.connect(f"127.0.0.1:{port}")
            stack.push_async_callback(channel.close)
            self.stub = router_pb2_grpc.RouterServiceStub(channel)
            await eventually(lambda: self.num_serving == len(self.workers))
            yield self
        violations = [violation for worker in self.workers for violation in worker.violations]
        assert not violations, violations

    @property
    def workers(self) -> list[FakeDecode | FakePrefill]:
        return [*self.decodes, *self.prefills]

    @property
    def num_serving(self) -> int:
        """Workers that the router would use."""
        return sum(worker.is_serving for worker in self.router.fleet.workers)

    async def add_decode(self, **identity: object) -> FakeDecode:
        """Another one comes up, and its name leads to it too."""
        self.decodes.append(FakeDecode(**identity))
        await self._start(self.decodes[-1])
        return self.decodes[-1]

    async def add_prefill(self, **identity: object) -> FakePrefill:
        """Another one comes up, and its name leads to it too."""
        self.prefills.append(FakePrefill(self._decode_by_address, **identity))
        await self._start(self.prefills[-1])
        return self.prefills[-1]

    def unname(self, worker: FakeDecode | FakePrefill) -> None:
        """No name leads to it any more."""
        for addresses in self.names.answers.values():
            if worker.address in addresses:
                addresses.remove(worker.address)

    async def _start(self, worker: FakeDecode | FakePrefill) -> None:
        await worker.start()
        is_decode = isinstance(worker, FakeDecode)
        if is_decode:
            self._decode_by_address[worker.address] = worker
        self.names.answers.setdefault(DECODE_NAME if is_decode else PREFILL_NAME, []).append(worker.address)

    async def _kill_all(self) -> None:
        for worker in self.workers:
            await worker.kill()

    async def generate(self, prompt: str | list[int] = "Once", *, timeout: float = PATIENCE_S, **fields) -> Reply:
        """One whole completion. Keywords are fields of GenerateRequest; those of `stopping` may stand alone."""
        return await Reply.of(self.start(prompt, timeout=timeout, **fields))

    def start(self, prompt: str | list[int] = "Once", *, timeout: float | None = PATIENCE_S, **fields):
        """The call, to be read by the test."""
        return self.stub.Generate(generate_request(prompt, **fields), timeout=timeout)


class Reply:
    """A stream of responses, read to its end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list = []
        self.prompt_logprobs: list = []
        self.num_messages = 0
        self.request_ids: list[str] = []
        self.completion: router_pb2.Completion | None = None

    @classmethod
    async def of(cls, call) -> Reply:
        reply = cls()
        async for response in call:
            reply.add(response)
        assert reply.completion is not None, "a stream that ends well ends with its completion"
        return reply

    def add(self, response: router_pb2.GenerateResponse) -> None:
        assert self.completion is None, "the completion comes last"
        self.num_messages += 1
        if response.HasField("request_id"):
            self.request_ids.append(response.request_id)
        if response.HasField("completion"):
            self.completion = response.completion
        else:
            self.token_ids += response.chunk.token_ids
            self.text += response.chunk.text
            self.logprobs += response.chunk.logprobs
            self.prompt_logprobs += response.chunk.prompt_logprobs


_STOPPING = {"max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_in_output"}


def generate_request(prompt: str | list[int] = "Once", **fields) -> router_pb2.GenerateRequest:
    stopping = {name: fields.pop(name) for name in _STOPPING & fields.keys()}
    request = router_pb2.GenerateRequest(**fields)
    if stopping:
        request.stopping.MergeFrom(type(request.stopping)(**stopping))
    if request.WhichOneof("input") is None and prompt is not None:
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.ids.extend(prompt)
    return request


async def eventually(condition: Callable[[], object], *, within_s: float = PATIENCE_S) -> None:
    """Until `condition()` holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  (conditions of every kind; none of them tells)
            await asyncio.sleep(0.002)


def code_of(error: grpc.aio.AioRpcError) -> str:
    return error.code().name
