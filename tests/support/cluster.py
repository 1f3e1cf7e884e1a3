"""Real workers and a real router in one event loop: real gRPC, real gloo, real engines, and their books at hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from common import rpc
from common.config import TINY_MODEL, DecodeConfig, PrefillConfig, RouterConfig
from common.engine.setup import build
from common.identities import gate_of
from common.tls import Tls, server_credentials_of
from common.tokenization import Tokenizer
from common.tracing import OFF, Tracer
from decode_service.worker import DecodeWorker
from pdserve.v1 import decode_pb2_grpc, prefill_pb2_grpc, router_pb2_grpc
from prefill_service.worker import PrefillWorker
from router.router import Router
from tests.fakes.cluster import PATIENCE_S, Reply, eventually, generate_request
from tests.support.device import WORKER_SETTINGS

Worker = PrefillWorker | DecodeWorker


class Served:
    """A worker behind a server of its own."""

    server: grpc.aio.Server
    channel: grpc.aio.Channel
    address = "127.0.0.1:0"

    def __init__(self, worker: Worker, config: PrefillConfig | DecodeConfig) -> None:
        self.worker = worker
        self._config = config
        self._credentials = server_credentials_of(config)

    async def listen(self) -> None:
        """At a free port first, at the same one again after `kill`."""
        self.server = rpc.create_server(gate=gate_of(self._config))
        self.worker.add_to(self.server)
        port = rpc.bind(self.server, self.address, credentials=self._credentials)
        self.address = f"127.0.0.1:{port}"
        await self.server.start()

    def raw(self, method: str):
        """A call with bytes in both directions."""
        return self.channel.stream_stream(method)

    async def kill(self) -> None:
        """Ends its streams without a word, as far as one process can do that to itself."""
        await self.server.stop(None)

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop(None)
        await self.worker.stop()


async def serve_worker(config: PrefillConfig | DecodeConfig, tls: Tls | None = None, tracer: Tracer = OFF) -> Served:
    parts = await asyncio.to_thread(build, config)
    worker: Worker
    if isinstance(config, PrefillConfig):
        worker = PrefillWorker(config, parts, tracer=tracer)
    else:
        worker = DecodeWorker(config, parts, tracer=tracer)
    await asyncio.to_thread(worker.prepare)
    served = Served(worker, config)
    await served.listen()
    worker.start()
    served.channel = rpc.connect(served.address, tls)
    return served


class RealCluster:
    """`running` starts everything; at its end every block must be back on both sides."""

    def __init__(
        self,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        model: str = TINY_MODEL,
        tls: Tls | None = None,
        tracer: Tracer = OFF,
        **settings: object,
    ) -> None:
        """`settings` go to all workers; those named prefill_… or decode_… to that kind alone. `tls` is what the tests
        dial with."""
        self.tls = tls
        self._tracer = tracer
        self._num = {PrefillConfig: num_prefill, DecodeConfig: num_decode}
        self._settings = {"num_blocks": 512, "num_threads": 1, "model": model, **WORKER_SETTINGS, **settings}
        self._model = model
        self.prefills: list[Served] = []
        self.decodes: list[Served] = []
        self.router: Router
        self.address = ""
        self.stub: router_pb2_grpc.RouterServiceStub

    @property
    def decode_stub(self) -> decode_pb2_grpc.DecodeServiceStub:
        return decode_pb2_grpc.DecodeServiceStub(self.decodes[0].channel)

    @property
    def prefill_stub(self) -> prefill_pb2_grpc.PrefillServiceStub:
        return prefill_pb2_grpc.PrefillServiceStub(self.prefills[0].channel)

    @contextlib.asynccontextmanager
    async def running(self, **router_settings: object) -> AsyncIterator[RealCluster]:
        async with contextlib.AsyncExitStack() as stack:
            for kind, served in ((PrefillConfig, self.prefills), (DecodeConfig, self.decodes)):
                for index in range(self._num[kind]):
                    one = await serve_worker(self._config(kind, index), self.tls, self._tracer)
                    stack.push_async_callback(one.stop)
                    served.append(one)
            config = RouterConfig(
                model=self._model,
                prefill=tuple(one.address for one in self.prefills) or ("127.0.0.1:1",),
                decode=tuple(one.address for one in self.decodes) or ("127.0.0.1:1",),
                # Where a prompt is computed is not to depend on what was measured of this machine.
                **{"local_prefill": "never", **router_settings},
            )
            self.router = Router(config, Tokenizer.load(self._model), tracer=self._tracer)
            await stack.enter_async_context(self.router.running())
            server = rpc.create_server(gate=gate_of(config))
            self.router.add_to(server)
            port = rpc.bind(server, "127.0.0.1:0", credentials=server_credentials_of(config))
            await server.start()
            stack.push_async_callback(server.stop, None)
            self.address = f"127.0.0.1:{port}"
            channel = rpc.connect(self.address, self.tls)
            stack.push_async_callback(channel.close)
            self.stub = router_pb2_grpc.RouterServiceStub(channel)
            # A call with bytes in both directions.
            self.raw = channel.unary_stream
            total = len(self.prefills) + len(self.decodes)
            await eventually(lambda: sum(one.is_serving for one in self.router.fleet.workers) == total)
            yield self
            await self.settled()

    async def settled(self, *, within_s: float = PATIENCE_S) -> None:
        """Waits until no worker holds a block, and has each prove that its books balance."""
        workers = [one.worker for one in (*self.prefills, *self.decodes)]
        await eventually(
            lambda: all(not worker.engine.scheduler.pool.num_held for worker in workers), within_s=within_s
        )
        for worker in workers:
            checked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            worker.engine.submit(lambda worker=worker, checked=checked: _check(worker, checked))
            async with asyncio.timeout(PATIENCE_S):
                await checked

    async def generate(self, prompt: str | list[int] = "Once", *, timeout: float = 30.0, **fields) -> Reply:
        """One whole completion; keywords as `generate_request` takes them."""
        return await Reply.of(self.start(prompt, timeout=timeout, **fields))

    def start(self, prompt: str | list[int] = "Once", *, timeout: float | None = 30.0, **fields):
        """The call, to be read by the test."""
        return self.stub.Generate(generate_request(prompt, **fields), timeout=timeout)

    def _config(self, kind: type[PrefillConfig] | type[DecodeConfig], index: int) -> PrefillConfig | DecodeConfig:
        settings = {"instance_id": f"{kind.role}-{index}"}
        for name, value in self._settings.items():
            role, _, rest = name.partition("_")
            if role not in ("prefill", "decode") or name in kind.__dataclass_fields__:
                settings[name] = value
            elif role == kind.role:
                settings[rest] = value
        return kind(**settings)


def _check(worker: Worker, checked: asyncio.Future[None]) -> None:
    """Runs in the engine thread, between two steps."""
    loop = checked.get_loop()
    try:
        worker.engine.check()
    except AssertionError as error:
        loop.call_soon_threadsafe(checked.set_exception, error)
    else:
        loop.call_soon_threadsafe(checked.set_result, None)
