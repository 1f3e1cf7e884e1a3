"""Completions and workers' states as a test of processes follows them, one step after another."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

import grpc

from common.rpc import CHANNEL_OPTIONS
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.support.processes import Service

PROMPT = "Return a list of the names in the"
GREEDY = types_pb2.SamplingParams(temperature=0)
SETTLE_S = 20.0


class Stream:
    """One completion, read as the test goes on."""

    def __init__(
        self, router: Service, prompt: str = PROMPT, *, max_tokens: int, sampling=GREEDY, cache_salt: str = ""
    ) -> None:
        # With keepalive, as pdserve's own client: without, a client whose link was cut waits for its deadline.
        self._channel = grpc.insecure_channel(router.address, options=CHANNEL_OPTIONS)
        self.router, self.request_id = router, str(uuid.uuid4())
        request = router_pb2.GenerateRequest(
            request_id=self.request_id, prompt=prompt, sampling=sampling, cache_salt=cache_salt
        )
        request.stopping.max_tokens = max_tokens
        request.stopping.ignore_eos = True
        self._call = router_pb2_grpc.RouterServiceStub(self._channel).Generate(request, timeout=60)
        self.token_ids: list[int] = []
        self.text = ""
        self.path: types_pb2.ServingPath | None = None
        # When each message came.
        self.arrivals_s: list[float] = []

    def read(self, num_tokens: int = 2**32) -> Stream:
        """Up to so many tokens, or to the end."""
        while len(self.token_ids) < num_tokens and self.path is None:
            response = next(self._call)
            self.arrivals_s.append(time.monotonic())
            self.token_ids += response.chunk.token_ids
            self.text += response.chunk.text
            if response.HasField("completion"):
                self.path = response.completion.path
                self._channel.close()
        return self

    def leave(self) -> None:
        """The client goes away."""
        self._call.cancel()
        self._channel.close()


def serving(stream: Stream, role: int) -> str:
    """The instance id of the worker of that role that was chosen for the stream, once it has something to do."""
    with grpc.insecure_channel(stream.router.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            chosen = _chosen(stub, stream.request_id, role)
            workers = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5).workers
            for worker in workers:
                if worker.address == chosen and worker.num_running:
                    return worker.instance_id
        raise AssertionError(f"no worker of role {role} works on {stream.request_id}")


def _chosen(stub: router_pb2_grpc.RouterServiceStub, request_id: str, role: int) -> str:
    """Address of the worker; empty while none is chosen."""
    try:
        placings = stub.Explain(router_pb2.ExplainRequest(request_id=request_id), timeout=5).placings
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return ""
    return next((placing.chosen for placing in reversed(placings) if placing.role == role), "")


def wait_until_listed(router: Service, workers: list[Service], state: int) -> None:
    """Until `router` sees all of them so."""
    with grpc.insecure_channel(router.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        addresses = {worker.address for worker in workers}
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            listed = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5, wait_for_ready=True).workers
            if addresses <= {one.address for one in listed if one.state == state}:
                return
            assert time.monotonic() < deadline_s, f"{addresses} are not all in state {state}: {listed}"
            time.sleep(0.02)


def wait_until_free(workers: Iterable[Service]) -> None:
    """Until no worker holds a block or works on anything."""
    for worker in workers:
        with grpc.insecure_channel(worker.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            for load in stub.WatchLoad(worker_pb2.WatchLoadRequest(), timeout=SETTLE_S, wait_for_ready=True):
                if load.HasField("identity"):
                    total = load.identity.num_total_blocks
                if load.num_free_blocks == total and not load.num_running:
                    break
