"""Where prompts are computed, with simulated times and a fake clock; and with fake workers, end to end."""

import random

import pytest

from common.clock import FakeClock
from pdserve.v1 import types_pb2
from router.local_prefill import ENOUGH, EXPLORE_EVERY, STALE_S, LocalPrefill, Mode, Prospect, Reason, Way
from tests.fakes.cluster import FakeCluster, Reply, eventually

KIND = ("fingerprint", 1)
NUM_LEARNING = 40 * EXPLORE_EVERY


class Deployment:
    """Prefill workers take 20 ms and 0.05 ms a token; decode takes 4 ms and 0.2 ms a token. Times vary by a fifth."""

    def __init__(self, mode: Mode = Mode.AUTO, *, noise: float = 0.2) -> None:
        self.clock = FakeClock()
        self.policy = LocalPrefill(mode, self.clock)
        self.base_ms = 20.0
        self._noise = noise
        self._draw = random.Random(0)

    def serve(self, num_tokens: int, **prospect: float) -> Way:
        """One request, from the choice to its end."""
        given = Prospect(KIND, num_tokens, num_tokens, **prospect)
        way = self.policy.choose(given)
        compute_ms = 0.2 * num_tokens
        ms = 4 + compute_ms if way.is_local else self.base_ms + 0.05 * num_tokens + given.remote_wait_ms
        ms *= self._draw.uniform(1 - self._noise, 1 + self._noise)
        self.policy.first_token(given, is_local=way.is_local, seconds=ms / 1e3)
        if way.is_local:
            self.policy.computed(KIND, num_tokens, compute_ms)
        self.clock.advance(0.1)
        return way

    def learn(self, number: int = NUM_LEARNING) -> list[Way]:
        return [self.serve(self._draw.randrange(1, 400)) for _ in range(number)]

    def judge(self, num_tokens: int, **prospect: float) -> Way:
        return self.policy.judge(Prospect(KIND, num_tokens, num_tokens, **prospect))


def test_nothing_is_computed_at_decode_before_both_ways_are_measured():
    deployment = Deployment()
    ways = [deployment.serve(10) for _ in range(EXPLORE_EVERY * (ENOUGH - 1))]
    assert {(way.is_local, way.reason) for way in ways} == {(False, Reason.UNMEASURED), (True, Reason.EXPLORING)}


def test_the_crossover_is_found():
    """4 + 0.2 n = 0.9 (20 + 0.05 n) at 90 tokens."""
    deployment = Deployment(noise=0.0)
    deployment.learn()
    assert deployment.judge(100).crossover_tokens == pytest.approx(90, rel=0.02)
    assert [deployment.judge(n).is_local for n in (1, 85, 95, 400)] == [True, True, False, False]


def test_a_choice_does_not_flap():
    deployment = Deployment()
    deployment.learn()
    short = [deployment.serve(30) for _ in range(500)]
    long = [deployment.serve(300) for _ in range(500)]
    assert {way.is_local for way in short if way.reason is Reason.LESS_WAITING} == {True}
    assert {way.is_local for way in long if way.reason is Reason.LESS_WAITING} == {False}


def test_few_requests_explore():
    ways = Deployment().learn()
    assert 0 < sum(way.reason is Reason.EXPLORING for way in ways) <= len(ways) / EXPLORE_EVERY


def test_a_choice_that_is_clear_is_not_explored():
    deployment = Deployment()
    deployment.learn()
    assert all(deployment.serve(1000).reason is Reason.LESS_WAITING for _ in range(2 * EXPLORE_EVERY))


def test_a_deployment_that_changes_is_learnt_anew():
    deployment = Deployment(noise=0.0)
    deployment.learn()
    deployment.base_ms = 60.0
    deployment.learn()
    assert deployment.judge(200).is_local
    deployment.base_ms = 6.0
    deployment.learn()
    assert not deployment.judge(30).is_local


def test_what_was_not_taken_for_long_is_explored_again():
    deployment = Deployment()
    deployment.learn()
    deployment.clock.advance(STALE_S)
    ways = [deployment.serve(1) for _ in range(2 * EXPLORE_EVERY)]
    assert [way.is_local for way in ways if way.reason is Reason.EXPLORING] == [False]


def test_sequences_that_run_at_decode_are_spared():
    deployment = Deployment()
    deployment.learn()
    idle, busy = deployment.judge(50), deployment.judge(50, num_running=10)
    assert (idle.is_local, busy.is_local) == (True, False)
    assert busy.harm_ms == pytest.approx(10 * 0.2 * 50, rel=0.2)
    assert busy.crossover_tokens < idle.crossover_tokens


def test_a_queue_at_prefill_lets_decode_compute_longer_prompts():
    deployment = Deployment()
    deployment.learn()
    assert not deployment.judge(200).is_local
    assert deployment.judge(200, remote_wait_ms=100.0).is_local


def test_prompts_that_decode_has_yet_to_compute_count_as_waiting():
    deployment = Deployment()
    deployment.learn()
    assert deployment.judge(30).is_local
    assert not deployment.judge(30, num_waiting_tokens=200).is_local


def test_what_decode_has_cached_need_not_be_computed_there():
    deployment = Deployment()
    deployment.learn()
    assert not deployment.policy.judge(Prospect(KIND, num_local_tokens=300, num_remote_tokens=300)).is_local
    assert deployment.policy.judge(Prospect(KIND, num_local_tokens=12, num_remote_tokens=300)).is_local


def test_models_are_measured_apart():
    deployment = Deployment()
    deployment.learn()
    assert deployment.policy.judge(Prospect(("other", 1), 1, 1)).reason is Reason.UNMEASURED


def test_one_pair_that_takes_long_to_make_does_not_move_the_crossover_far():
    deployment = Deployment(noise=0.0)
    deployment.learn()
    deployment.policy.first_token(Prospect(KIND, 200, 200), is_local=False, seconds=5.0)
    assert deployment.judge(100).crossover_tokens < 150


@pytest.mark.parametrize(("mode", "is_local"), [(Mode.NEVER, False), (Mode.ALWAYS, True)])
def test_a_setting_stands_over_what_is_measured(mode, is_local):
    ways = Deployment(mode).learn()
    assert {(way.is_local, way.reason) for way in ways} == {(is_local, Reason.SETTING)}


def test_without_a_prefill_worker_decode_computes_whatever_the_setting_says():
    assert LocalPrefill(Mode.NEVER, FakeClock()).choose(None) == Way(True, Reason.DEGRADED)


def _ways(cluster: FakeCluster, way: str, reason: str) -> float:
    name = "pdserve_router_prefill_ways_total"
    return cluster.router.metrics.registry.get_sample_value(name, {"way": way, "reason": reason}) or 0.0


async def _measure(cluster: FakeCluster, *, local_ms: float, remote_ms: float) -> None:
    """As though the router had seen so much."""
    policy = cluster.router.parts.local_prefill
    kind = cluster.router.fleet.decode[0].kind
    for num_tokens in range(1, ENOUGH + 1):
        prospect = Prospect(kind, num_tokens, num_tokens)
        policy.first_token(prospect, is_local=True, seconds=local_ms / 1e3)
        policy.first_token(prospect, is_local=False, seconds=remote_ms / 1e3)
        policy.computed(kind, num_tokens, local_ms)


async def test_a_prompt_is_computed_at_decode_where_that_is_quicker_and_the_path_says_so():
    async with FakeCluster().running() as cluster:
        await _measure(cluster, local_ms=1.0, remote_ms=1e5)
        path = (await cluster.generate(max_tokens=2)).completion.path
        assert (path.kv_path, path.prefill_worker) == (types_pb2.KV_PATH_LOCAL, path.decode_worker)
        assert cluster.prefill.requests == []
        assert (_ways(cluster, "local", "less_waiting"), _ways(cluster, "local", "degraded")) == (1, 0)


async def test_a_prompt_is_computed_at_prefill_where_that_is_quicker():
    async with FakeCluster().running() as cluster:
        await _measure(cluster, local_ms=1e5, remote_ms=1.0)
        path = (await cluster.generate(max_tokens=2)).completion.path
        assert path.kv_path == types_pb2.KV_PATH_REMOTE
        assert _ways(cluster, "remote", "less_waiting") == 1


async def test_prompts_that_wait_at_decode_send_the_next_one_to_prefill():
    async with FakeCluster().running() as cluster:
        await _measure(cluster, local_ms=8.0, remote_ms=20.0)
        policy, decode = cluster.router.parts.local_prefill, cluster.router.fleet.decode[0]
        for num_tokens in (100, 200, 300):
            policy.computed(decode.kind, num_tokens, 0.1 * num_tokens)
        cluster.decode.go.clear()
        calls = [cluster.start([n] * 320, max_tokens=1) for n in range(3)]
        await eventually(lambda: len(cluster.prefill.requests) == 2)
        cluster.decode.go.set()
        paths = [(await Reply.of(call)).completion.path.kv_path for call in calls]
        assert sorted(paths) == [types_pb2.KV_PATH_REMOTE, types_pb2.KV_PATH_REMOTE, types_pb2.KV_PATH_LOCAL]
        assert decode.num_waiting_tokens == 0


async def test_local_because_nobody_else_is_alive_is_told_apart():
    async with FakeCluster(num_prefill=0).running() as cluster:
        assert (await cluster.generate(max_tokens=2)).completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        assert _ways(cluster, "local", "degraded") == 1


async def test_live_traffic_is_measured_until_both_ways_are_known():
    async with FakeCluster().running(heartbeat_timeout_s=30.0) as cluster:
        for number in range(ENOUGH + ENOUGH * EXPLORE_EVERY):
            await cluster.generate([number] * 16, max_tokens=1)
        assert _ways(cluster, "local", "exploring") == ENOUGH
        assert cluster.router.metrics.registry.get_sample_value("pdserve_router_local_crossover_tokens") is not None
        way = cluster.router.parts.local_prefill.judge(Prospect(cluster.router.fleet.decode[0].kind, 16, 16))
        assert way.reason is Reason.LESS_WAITING


@pytest.mark.parametrize(("setting", "kv_path"), [("never", "KV_PATH_REMOTE"), ("always", "KV_PATH_LOCAL")])
async def test_the_setting_decides(setting, kv_path):
    async with FakeCluster().running(local_prefill=setting) as cluster:
        path = (await cluster.generate(max_tokens=2)).completion.path
        assert path.kv_path == types_pb2.KvPath.Value(kv_path)
