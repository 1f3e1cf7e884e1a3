"""Workers and routers that leave service while they are needed: real processes, real gloo, exact tokens."""

from __future__ import annotations

import threading

import grpc
import pytest

from pdserve.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from tests.support.processes import Service
from tests.support.streams import PROMPT, Stream, serving, wait_until_listed

LONG_PROMPT = PROMPT * 200
SAMPLED = types_pb2.SamplingParams(temperature=0.9, top_p=0.95, seed=7)
EXIT_S = 30.0


def restart(service: Service) -> None:
    """As a rolling update does: SIGTERM, its own end, a new process at the same address."""
    service.process.terminate()
    assert service.process.wait(EXIT_S) == 0
    service.start()
    service.wait_ready()


@pytest.mark.promise(13)
def test_a_prefill_worker_that_is_told_to_end_ships_what_it_computes_first(whole):
    stream = Stream(whole.routers[0], LONG_PROMPT, max_tokens=2)
    leaving = whole.named(serving(stream, types_pb2.ROLE_PREFILL))
    leaving.process.terminate()
    stream.read()
    assert leaving.process.wait(EXIT_S) == 0
    assert whole.named(stream.path.prefill_worker) is leaving
    assert stream.path.kv_path == types_pb2.KV_PATH_REMOTE


@pytest.mark.promise(13)
def test_a_decode_worker_that_is_told_to_end_finishes_its_streams_first(whole):
    stream = Stream(whole.routers[0], max_tokens=300).read(20)
    leaving = whole.named(serving(stream, types_pb2.ROLE_DECODE))
    leaving.process.terminate()
    wait_until_listed(whole.routers[0], [leaving], types_pb2.WORKER_STATE_DRAINING)
    later = Stream(whole.routers[0], max_tokens=2).read()
    stream.read()
    assert leaving.process.wait(EXIT_S) == 0
    assert (whole.named(stream.path.decode_worker), stream.path.num_resumptions) == (leaving, 0)
    assert whole.named(later.path.decode_worker) is not leaving


@pytest.mark.promise(12, 13)
def test_a_stream_that_a_drain_cannot_wait_for_is_handed_over_and_no_token_differs(whole):
    undisturbed = Stream(whole.routers[0], max_tokens=300, sampling=SAMPLED).read()
    stream = Stream(whole.routers[0], max_tokens=300, sampling=SAMPLED).read(20)
    leaving = whole.named(serving(stream, types_pb2.ROLE_DECODE))
    with grpc.insecure_channel(leaving.address) as channel:
        request = worker_pb2.DrainRequest(deadline_s=0.0)
        assert [step.done for step in worker_pb2_grpc.WorkerServiceStub(channel).Drain(request, timeout=EXIT_S)][-1]
    stream.read()
    assert stream.token_ids == undisturbed.token_ids
    assert stream.path.num_resumptions == 1
    assert whole.named(stream.path.decode_worker) is not leaving
    leaving.process.terminate()
    assert leaving.process.wait(EXIT_S) == 0


@pytest.mark.slow
@pytest.mark.promise(13, 14)
def test_a_rolling_restart_of_every_process_under_load_loses_no_request(whole):
    """Clients stay away from a router that is about to end; one that came too late is refused, and goes to another."""
    expected = Stream(whole.routers[0], max_tokens=40, sampling=SAMPLED).read().token_ids
    available, is_over, failures, num_done = list(whole.routers), threading.Event(), [], [0] * 8

    def served(number: int) -> Stream:
        while True:
            router = available[number % len(available)]
            stream = Stream(router, max_tokens=40, sampling=SAMPLED)
            try:
                return stream.read()
            except grpc.RpcError as error:
                was_refused = error.code() is grpc.StatusCode.UNAVAILABLE and not stream.token_ids
                if not was_refused or router in available:
                    raise

    def client(number: int) -> None:
        try:
            while not is_over.is_set():
                assert served(number).token_ids == expected
                num_done[number] += 1
        except Exception as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(num_done))]
    for one in clients:
        one.start()
    for service in (*whole.workers, *whole.routers):
        if service in available:
            available.remove(service)
        restart(service)
        if service in whole.routers:
            available.append(service)
        for router in available:
            wait_until_listed(router, whole.workers, types_pb2.WORKER_STATE_SERVING)
    is_over.set()
    for one in clients:
        one.join(EXIT_S)
    assert failures == []
    print(f"{sum(num_done)} requests, one to each of them: {num_done}")
    assert min(num_done) > 10
