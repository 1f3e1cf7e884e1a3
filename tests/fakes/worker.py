"""What both fake workers share: a real server on a free port, an identity, and a load stream with faults."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import grpc.aio

from common import rpc
from common.errors import FailedPrecondition, Unavailable
from pdserve.v1 import types_pb2, worker_pb2, worker_pb2_grpc

HEARTBEAT_S = 0.05
_names = itertools.count()


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Answers WatchLoad. Faults are attributes, to be set at any time; `told` fields stand over what is counted."""

    role = types_pb2.ROLE_UNSPECIFIED

    def __init__(self, **identity: object) -> None:
        name = f"fake-{next(_names)}"
        self.identity = worker_pb2.WorkerIdentity(
            **{
                "role": self.role,
                "instance_id": name,
                "boot_id": f"{name}-boot",
                "model_id": "tiny",
                "model_fingerprint": "fingerprint",
                "protocol_version": 1,
                "context_length": 2048,
                "vocab_size": 2048,
                "block_size": 16,
                "num_total_blocks": 1000,
                "max_num_seqs": 64,
                "eos_token_ids": [2, 0],
                **identity,
            }
        )
        self.address = ""
        self.told: dict[str, object] = {}
        # The load stream goes on, but nothing comes.
        self.is_silent = False
        self.is_draining = False
        # Refuses new work as when it drains, but its load stream has yet to say so.
        self.refuses = False
        self.num_refused = 0
        # Work waits, and the step counter does not move.
        self.is_wedged = False
        # Calls at work in this moment.
        self.num_active = 0
        # Calls that were meant for a worker of another fingerprint.
        self.num_misdirected = 0
        # What the router did that no router may do; asserted to be empty when the cluster stops.
        self.violations: list[str] = []
        self._step_counter = 0
        self._load_changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Listens: at a free port first, at the same one again after `kill`."""
        self._server = rpc.create_server()
        self.add_to(self._server)
        port = rpc.bind(self._server, self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def kill(self) -> None:
        """Every call breaks off at once, as when the process dies."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def restart(self) -> None:
        """Another process at the same address."""
        await self.kill()
        self.identity.boot_id += "+"
        await self.start()

    def tell_load(self, **told: object) -> None:
        """Overrides fields of the load from here on, and tells at once."""
        self.told |= told
        self._wake()

    def drain(self) -> None:
        self.is_draining = True
        self._wake()

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        identity: worker_pb2.WorkerIdentity | None = self.identity
        while True:
            changed = self._load_changed
            if not self.is_silent:
                yield self._load(identity)
                identity = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()

    @contextlib.contextmanager
    def _working(self, model_fingerprint: str):
        """Around a call that was meant for a worker of that fingerprint."""
        if model_fingerprint != self.identity.model_fingerprint:
            self.num_misdirected += 1
            raise FailedPrecondition(f"{model_fingerprint} was asked for", reason="FINGERPRINT_MISMATCH")
        if self.is_draining or self.refuses:
            self.num_refused += 1
            raise Unavailable("draining", reason="DRAINING")
        self.num_active += 1
        self._wake()
        try:
            yield
        finally:
            self.num_active -= 1
            self._wake()

    def _wake(self) -> None:
        self._load_changed.set()
        self._load_changed = asyncio.Event()

    def _load(self, identity: worker_pb2.WorkerIdentity | None) -> worker_pb2.WatchLoadResponse:
        self._step_counter += not self.is_wedged
        state = types_pb2.WORKER_STATE_DRAINING if self.is_draining else types_pb2.WORKER_STATE_SERVING
        counted = {
            "num_free_blocks": self.identity.num_total_blocks,
            "num_running": self.num_active,
            "step_counter": self._step_counter,
            "num_watchers": 1,
        }
        return worker_pb2.WatchLoadResponse(identity=identity, state=state, **{**counted, **self.told})
