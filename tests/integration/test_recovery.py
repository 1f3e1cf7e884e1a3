"""Workers and routers that are killed or stopped under requests: real processes, real gloo, exact tokens."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import grpc
import pytest

from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.support.processes import Cluster, Service, running_cluster

PROMPT = "Return a list of the names in the"
LONG_PROMPT = PROMPT * 200
GREEDY = types_pb2.SamplingParams(temperature=0)
SAMPLED = types_pb2.SamplingParams(temperature=0.9, top_p=0.95, seed=7, presence_penalty=0.3)
SETTLE_S = 20.0
KILLED = pytest.param(signal.SIGKILL, id="killed")
STOPPED = pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    # In small chunks a prompt is long enough under way to be struck.
    with running_cluster(num_routers=2, worker_args=["--num-blocks", "1024", "--max-batch-tokens", "32"]) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """Whole before and after each test: who was killed is started again, and no block is held anywhere."""
    yield started
    for service in (*started.workers, *started.routers):
        if service.process.poll() is not None:
            service.start()
            service.wait_ready()
    for worker in started.workers:
        wait_until(worker, lambda load, total: load.num_free_blocks == total and not load.num_running)
    for router in started.routers:
        wait_until_listed(router, started.workers, types_pb2.WORKER_STATE_SERVING)


def wait_until(worker: Service, condition) -> None:
    """Follows a worker's load until `condition(load, num_total_blocks)` holds."""
    with grpc.insecure_channel(worker.address) as channel:
        loads = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(
            worker_pb2.WatchLoadRequest(), timeout=SETTLE_S, wait_for_ready=True
        )
        for load in loads:
            if load.HasField("identity"):
                total = load.identity.num_total_blocks
            if condition(load, total):
                return


def wait_until_listed(router: Service, workers: list[Service], state: int) -> None:
    """Until `router` sees all of them so."""
    waiting = threading.Event()
    with grpc.insecure_channel(router.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        addresses = {worker.address for worker in workers}
        for _ in range(int(SETTLE_S / 0.02)):
            listed = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5, wait_for_ready=True).workers
            if addresses <= {one.address for one in listed if one.state == state}:
                return
            waiting.wait(0.02)
    pytest.fail(f"{addresses} are not all {types_pb2.WorkerState.Name(state)}: {listed}")


class Stream:
    """One completion, read as the test goes on."""

    def __init__(self, router: Service, prompt: str = PROMPT, *, max_tokens: int, sampling=GREEDY) -> None:
        self._channel = grpc.insecure_channel(router.address)
        request = router_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
        request.stopping.max_tokens = max_tokens
        request.stopping.ignore_eos = True
        self._call = router_pb2_grpc.RouterServiceStub(self._channel).Generate(request, timeout=60)
        self.token_ids: list[int] = []
        self.text = ""
        self.path: types_pb2.ServingPath | None = None

    def read(self, num_tokens: int = 2**32) -> Stream:
        """Up to so many tokens, or to the end."""
        while len(self.token_ids) < num_tokens and self.path is None:
            response = next(self._call)
            self.token_ids += response.chunk.token_ids
            self.text += response.chunk.text
            if response.HasField("completion"):
                self.path = response.completion.path
                self._channel.close()
        return self


def serving(router: Service, role: int) -> str:
    """The one worker of that role that has something to do, by its instance id."""
    with grpc.insecure_channel(router.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        while True:
            workers = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5).workers
            for worker in workers:
                if worker.role == role and worker.num_running:
                    return worker.instance_id


@pytest.mark.promise(12)
@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", [KILLED, STOPPED])
def test_a_stream_goes_on_where_its_decode_worker_was_lost_and_no_token_differs(cluster, fault, sampling):
    router = cluster.routers[0]
    undisturbed = Stream(router, max_tokens=200, sampling=sampling).read()
    stream = Stream(router, max_tokens=200, sampling=sampling).read(20)
    victim = cluster.named(serving(router, types_pb2.ROLE_DECODE))
    os.kill(victim.process.pid, fault)
    stream.read()
    if fault == signal.SIGSTOP:
        os.kill(victim.process.pid, signal.SIGCONT)
    else:
        victim.process.wait(10)
    assert (stream.token_ids, stream.text) == (undisturbed.token_ids, undisturbed.text)
    assert (stream.path.num_resumptions, stream.path.kv_path) == (1, types_pb2.KV_PATH_RECOMPUTED)
    assert cluster.named(stream.path.decode_worker) is not victim


@pytest.mark.promise(2, 12)
@pytest.mark.parametrize("fault", [KILLED, STOPPED])
def test_a_prompt_is_computed_elsewhere_where_its_prefill_worker_was_lost(cluster, fault):
    router = cluster.routers[0]
    undisturbed = Stream(router, LONG_PROMPT[1:], max_tokens=20).read()
    stream = Stream(router, LONG_PROMPT[1:] + " ", max_tokens=1)
    victim = cluster.named(serving(router, types_pb2.ROLE_PREFILL))
    os.kill(victim.process.pid, fault)
    stream.read()
    again = Stream(router, LONG_PROMPT[1:], max_tokens=20).read()
    if fault == signal.SIGSTOP:
        os.kill(victim.process.pid, signal.SIGCONT)
    else:
        victim.process.wait(10)
    assert cluster.named(stream.path.prefill_worker) is not victim
    assert again.token_ids == undisturbed.token_ids
    assert cluster.named(again.path.prefill_worker) is not victim


@pytest.mark.slow
@pytest.mark.promise(4, 10)
def test_without_a_prefill_worker_decode_stays_ready_and_prefills_until_one_comes_back(cluster):
    router = cluster.routers[0]
    expected = Stream(router, max_tokens=20).read()
    for prefill in cluster.prefills:
        prefill.kill()
    wait_until_listed(router, cluster.prefills, types_pb2.WORKER_STATE_UNREACHABLE)
    degraded = Stream(router, max_tokens=20).read()
    assert (degraded.path.kv_path, degraded.token_ids) == (types_pb2.KV_PATH_LOCAL, expected.token_ids)
    for decode in cluster.decodes:
        decode.wait_ready(timeout_s=0.0)
    cluster.prefills[0].start()
    wait_until_listed(router, cluster.prefills[:1], types_pb2.WORKER_STATE_SERVING)
    recovered = Stream(router, max_tokens=20).read()
    assert recovered.path.prefill_worker == "prefill-0"
    assert recovered.path.kv_path != types_pb2.KV_PATH_LOCAL


@pytest.mark.promise(1, 5)
def test_a_router_that_is_killed_costs_its_own_requests_and_leaves_no_block_behind(cluster):
    own, other = cluster.routers
    lost, kept = Stream(own, max_tokens=300), Stream(other, max_tokens=300)
    lost.read(20)
    kept.read(20)
    own.kill()
    with pytest.raises(grpc.RpcError) as caught:
        lost.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    kept.read()
    assert (len(kept.token_ids), kept.path.num_resumptions) == (300, 0)
