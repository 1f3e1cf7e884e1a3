"""What is left of a request: its line in the access log and its part in the metrics."""

import asyncio
import logging

import grpc.aio
import pytest

from tests.fakes.cluster import FakeCluster, Reply, eventually


@pytest.fixture
async def cluster():
    async with FakeCluster().running() as cluster:
        yield cluster


def _line(caplog) -> logging.LogRecord:
    [line] = [record for record in caplog.records if record.name == "router.access"]
    return line


def _value(cluster: FakeCluster, name: str, **labels: str) -> float | None:
    return cluster.router.metrics.registry.get_sample_value(f"pdserve_router_{name}", labels)


async def test_a_completion_leaves_one_line(cluster, caplog):
    caplog.set_level(logging.INFO)
    await cluster.generate([1, 2], request_id="mine", max_tokens=3)
    line = _line(caplog)
    assert (line.request_id, line.client, line.code) == ("mine", "127.0.0.1", "OK")
    assert (line.prompt_tokens, line.output_tokens, line.reason) == (2, 3, "length")
    assert (line.prefill, line.decode) == (cluster.prefill.identity.instance_id, cluster.decode.identity.instance_id)
    assert (line.kv_path, line.kv_bytes, line.resumptions) == ("remote", 4096, 0)
    assert 0 < line.first_token_ms <= line.total_ms


async def test_a_refusal_leaves_one_line_with_its_error(cluster, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate(max_tokens=0)
    line = _line(caplog)
    assert line.code == "INVALID_ARGUMENT"
    assert "max_tokens" in line.error


async def test_a_client_that_leaves_is_cancelled_in_log_and_metrics(cluster, caplog):
    caplog.set_level(logging.INFO)
    cluster.decode.go.clear()
    call = cluster.start()
    await eventually(lambda: cluster.decode.num_active)
    call.cancel()
    await eventually(lambda: _value(cluster, "requests_total", code="CANCELLED") == 1)
    assert _line(caplog).code == "CANCELLED"


async def test_the_access_log_can_be_turned_off(caplog):
    caplog.set_level(logging.INFO)
    async with FakeCluster().running(access_log=False) as cluster:
        await cluster.generate(max_tokens=1)
    assert not [record for record in caplog.records if record.name == "router.access"]


async def test_metrics_count_requests_tokens_and_paths(cluster):
    await asyncio.gather(*(cluster.generate([1, 2], max_tokens=3) for _ in range(4)))
    await eventually(lambda: _value(cluster, "requests_total", code="OK") == 4)
    assert (_value(cluster, "prompt_tokens_total"), _value(cluster, "output_tokens_total")) == (8, 12)
    assert _value(cluster, "completions_total", kv_path="REMOTE") == 4
    assert _value(cluster, "time_to_first_token_seconds_count") == 4
    assert _value(cluster, "stage_seconds_count", stage="prefill") == 4
    assert _value(cluster, "running_requests") == 0


async def test_metrics_show_what_queues_and_runs(cluster):
    cluster.decode.tell_load(num_waiting=1)
    await eventually(lambda: cluster.router.fleet.decode[0].load.num_waiting)
    call = cluster.start([1, 2, 3], max_tokens=1)
    await eventually(lambda: _value(cluster, "queue_requests") == 1)
    assert _value(cluster, "queue_tokens") == 3
    cluster.decode.tell_load(num_waiting=0)
    await Reply.of(call)
    assert _value(cluster, "queue_requests") == 0


async def test_retries_and_resumptions_are_counted_by_cause(cluster):
    cluster.decode.lose_at = [(2, 1)]
    await cluster.generate(max_tokens=3)
    assert _value(cluster, "retries_total", cause="PREEMPTED") == 1
    assert _value(cluster, "resumptions_total", cause="PREEMPTED") == 1


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [({}, 1), ({"goodput_first_token_ms": 0.001}, 0), ({"goodput_inter_token_ms": 0.0001}, 0)],
)
async def test_a_completion_is_good_within_both_limits(limits, num_good):
    async with FakeCluster().running(**limits) as cluster:
        # The second token is not to come with the first.
        cluster.decode.pause_at = 1
        cluster.decode.go.clear()
        async for _ in cluster.start(max_tokens=3):
            cluster.decode.go.set()
        assert _value(cluster, "good_requests_total") == num_good


async def test_a_failure_is_never_good(cluster):
    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate(max_tokens=0)
    assert _value(cluster, "good_requests_total") == 0
