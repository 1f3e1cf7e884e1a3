"""What a router sees of its workers, and tells of them."""

import time

import pytest
from grpc_health.v1 import health_pb2

from pdserve.v1 import router_pb2, types_pb2
from tests.fakes.cluster import FakeCluster, eventually

SERVING, DRAINING = types_pb2.WORKER_STATE_SERVING, types_pb2.WORKER_STATE_DRAINING
UNREACHABLE = types_pb2.WORKER_STATE_UNREACHABLE


@pytest.fixture
async def cluster():
    async with FakeCluster().running() as cluster:
        yield cluster


async def _listed(cluster: FakeCluster) -> list[router_pb2.Worker]:
    return list((await cluster.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5)).workers)


def _decode(cluster: FakeCluster):
    return cluster.router.fleet.decode[0]


async def _is(cluster: FakeCluster, state: int) -> router_pb2.Worker:
    expected = {SERVING: "serving", DRAINING: "draining", UNREACHABLE: "unreachable"}[state]
    await eventually(lambda: _decode(cluster).state.value == expected)
    [decode] = [worker for worker in await _listed(cluster) if worker.role == types_pb2.ROLE_DECODE]
    assert decode.state == state
    return decode


async def test_workers_are_listed_as_they_tell(cluster):
    cluster.decode.tell_load(num_free_blocks=700, num_cached_blocks=50, num_running=3, num_waiting=2, num_pairs=1)
    await eventually(lambda: _decode(cluster).load.num_free_blocks == 700)
    prefill, decode = await _listed(cluster)
    assert (prefill.role, decode.role) == (types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE)
    assert (decode.address, decode.state) == (cluster.decode.address, SERVING)
    identity = cluster.decode.identity
    assert (decode.instance_id, decode.boot_id) == (identity.instance_id, identity.boot_id)
    assert (decode.num_total_blocks, decode.model_fingerprint) == (1000, "fingerprint")
    told = decode.num_free_blocks, decode.num_cached_blocks, decode.num_running, decode.num_waiting, decode.num_pairs
    assert told == (700, 50, 3, 2, 1)


async def test_what_a_worker_has_counted_is_listed_with_its_age(cluster):
    cluster.decode.tell_load(num_output_tokens=2**33, num_prompt_tokens=40, step_ms=2.5, num_reserved=3)
    await eventually(lambda: _decode(cluster).num_output_tokens == 2**33)
    _, decode = await _listed(cluster)
    assert (decode.num_prompt_tokens, decode.step_ms, decode.num_reserved) == (40, 2.5, 3)
    assert 0 <= decode.told_s < 0.6, "a worker that tells nothing for longer is lost"


async def test_a_router_lists_what_it_has_to_do_itself(cluster):
    await cluster.generate("Once", max_tokens=2)
    cluster.decode.tell_load(num_running=64)
    await eventually(lambda: not _decode(cluster).has_place)
    waiting = cluster.start([5, 6, 7], max_tokens=2)
    await eventually(lambda: len(cluster.router.parts.dispatcher.queue) == 1)
    load = (await cluster.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5)).load
    waiting.cancel()
    assert (load.num_queued_requests, load.num_queued_clients, load.num_queued_tokens) == (1, 1, 3)
    assert (load.num_running_requests, dict(load.ended_requests)) == (0, {"OK": 1})
    assert load.boot_id
    assert load.instance_id


async def test_the_model_is_described_as_the_workers_tell(cluster):
    model = await cluster.stub.GetModel(router_pb2.GetModelRequest(), timeout=5)
    assert (model.model_id, model.context_length, model.vocab_size) == ("tiny", 2048, 2048)
    assert model.has_tokenizer
    assert (list(model.model_fingerprints), model.protocol_version) == (["fingerprint"], 1)


@pytest.mark.promise(4)
async def test_a_silent_worker_is_unreachable_until_it_speaks(cluster):
    cluster.decode.is_silent = True
    await _is(cluster, UNREACHABLE)
    assert "nothing was heard of it for 0.6 s" in _decode(cluster).reason
    cluster.decode.is_silent = False
    await _is(cluster, SERVING)


async def test_a_router_that_stood_still_itself_misses_nobody(cluster):
    generation, step = _decode(cluster).generation, _decode(cluster).load.step_counter
    # Nothing is read for longer than a silence may last.
    time.sleep(2 * cluster.router.fleet.heartbeat_timeout_s)  # noqa: ASYNC251
    await eventually(lambda: _decode(cluster).load.step_counter > step + 10)
    assert _decode(cluster).generation == generation


@pytest.mark.promise(6)
async def test_a_wedged_worker_is_unreachable_until_it_steps(cluster):
    cluster.decode.is_wedged = True
    cluster.decode.tell_load(num_running=1)
    await _is(cluster, UNREACHABLE)
    assert "step counter" in _decode(cluster).reason
    cluster.decode.is_wedged = False
    await _is(cluster, SERVING)


async def test_a_dead_worker_is_unreachable_and_met_again_with_its_new_boot_id(cluster):
    await cluster.decode.kill()
    before = await _is(cluster, UNREACHABLE)
    assert before.instance_id == cluster.decode.identity.instance_id, "who it was is still known"
    await cluster.decode.restart()
    after = await _is(cluster, SERVING)
    assert after.boot_id == before.boot_id + "+"


async def test_a_draining_worker_is_shown_as_such(cluster):
    cluster.decode.drain()
    await _is(cluster, DRAINING)


async def test_a_worker_of_the_wrong_role_is_not_used():
    cluster = FakeCluster()
    async with cluster.running() as cluster:
        cluster.decode.identity.role = types_pb2.ROLE_PREFILL
        await cluster.decode.restart()
        await eventually(lambda: _decode(cluster).reason == "it is ROLE_PREFILL, configured as decode")
        await _is(cluster, UNREACHABLE)


@pytest.mark.promise(10)
async def test_the_router_is_ready_while_a_decode_worker_serves(cluster):
    health = cluster.router.health
    assert await health.Check(health_pb2.HealthCheckRequest(), None) == health_pb2.HealthCheckResponse(status="SERVING")
    await cluster.prefill.kill()
    await eventually(lambda: cluster.router.fleet.is_degraded)
    assert health.is_ready
    assert (await cluster.stub.ListWorkers(router_pb2.ListWorkersRequest())).degraded
    await cluster.decode.kill()
    await eventually(lambda: not health.is_ready)
    await cluster.decode.restart()
    await eventually(lambda: health.is_ready)


async def test_the_metrics_show_workers_by_state(cluster):
    def workers(role: str, state: str) -> float:
        return cluster.router.metrics.registry.get_sample_value(
            "pdserve_router_workers", {"role": role, "state": state}
        )

    assert (workers("decode", "serving"), workers("decode", "unreachable")) == (1, 0)
    await cluster.decode.kill()
    await eventually(lambda: workers("decode", "unreachable") == 1)
