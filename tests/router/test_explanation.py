"""How requests were placed, and how one would be."""

from types import SimpleNamespace

import grpc.aio
import pytest

from common.clock import FakeClock
from common.errors import InvalidArgument, NotFound, Unavailable, from_rpc_error
from pdserve.v1 import router_pb2, types_pb2
from router.explanation import MAX_CANDIDATES, MAX_PLACINGS, MAX_REQUESTS, PlacementLog
from router.local_prefill import ENOUGH, Prospect
from router.placement import Choice, DecodeTerms, Demand
from router.ranking import Ranking
from router.workers import Role
from tests.fakes.cluster import BY_NAME, FakeCluster, eventually, generate_request
from tests.router.values import worker

PROMPT = list(range(1, 33))


async def _explain(cluster: FakeCluster, request_id: str = "", prompt=PROMPT) -> router_pb2.ExplainResponse:
    subject = {"request_id": request_id} if request_id else {"prompt": generate_request(prompt)}
    return await cluster.stub.Explain(router_pb2.ExplainRequest(**subject), timeout=5)


async def _refusals(cluster: FakeCluster) -> dict[str, int]:
    """Of decode workers, by address."""
    decode = (await _explain(cluster)).placings[0]
    return {one.address: one.refusal for one in decode.candidates}


async def test_a_request_that_was_placed_is_explained():
    async with FakeCluster(num_decode=2).running() as cluster:
        path = (await cluster.generate(PROMPT, request_id="r", max_tokens=1)).completion.path
        decode, prefill = (await _explain(cluster, "r")).placings
        names = {one.address: one.identity.instance_id for one in cluster.workers}
        assert (decode.role, names[decode.chosen]) == (types_pb2.ROLE_DECODE, path.decode_worker)
        assert (prefill.role, names[prefill.chosen]) == (types_pb2.ROLE_PREFILL, path.prefill_worker)
        assert {one.address for one in decode.candidates} == {one.address for one in cluster.decodes}
        assert decode.candidates[0].address == decode.chosen
        assert [one.num_free_blocks for one in decode.candidates] == [1000, 1000]
        assert (decode.num_tokens, prefill.num_tokens) == (32, 32)
        assert (prefill.way.is_local, prefill.way.reason) == (False, router_pb2.PREFILL_WAY_REASON_UNMEASURED)


async def test_a_prompt_is_placed_in_thought_where_it_would_go():
    async with FakeCluster(num_decode=2).running() as cluster:
        thought = await _explain(cluster)
        assert all(decode.opened == [] for decode in cluster.decodes)
        await cluster.generate(PROMPT, request_id="r", max_tokens=1)
        done = await _explain(cluster, "r")
        assert [one.chosen for one in thought.placings] == [one.chosen for one in done.placings]
        assert (thought.placings[0].age_s, thought.num_queued_requests) == (pytest.approx(0, abs=0.1), 0)


async def test_what_was_sent_before_is_told_as_cached():
    async with FakeCluster().running() as cluster:
        await cluster.generate(PROMPT, max_tokens=1)
        decode, prefill = (await _explain(cluster)).placings
        assert [one.candidates[0].num_cached_tokens for one in (decode, prefill)] == [32, 32]


async def test_every_reason_that_keeps_a_worker_from_a_prompt_is_told():
    async with FakeCluster(num_decode=4).running() as cluster:
        draining, pressed, full, good = cluster.decodes
        draining.drain()
        pressed.tell_load(pressure=[types_pb2.PRESSURE_REASON_SLOW_STEPS])
        full.tell_load(num_running=64)
        other = cluster.router.fleet.decode
        await eventually(lambda: sum(one.is_serving and not one.is_pressed and one.has_place for one in other) == 1)
        assert await _refusals(cluster) == {
            draining.address: router_pb2.REFUSAL_DRAINING,
            pressed.address: router_pb2.REFUSAL_PRESSURE,
            full.address: router_pb2.REFUSAL_NO_PLACE,
            good.address: router_pb2.REFUSAL_UNSPECIFIED,
        }


async def test_a_worker_of_another_model_is_told_as_such():
    async with FakeCluster().running(**BY_NAME) as cluster:
        other = await cluster.add_prefill(model_fingerprint="other")
        await eventually(lambda: cluster.num_serving == 3)
        prefill = (await _explain(cluster)).placings[1]
        assert {one.address: one.refusal for one in prefill.candidates} == {
            cluster.prefill.address: router_pb2.REFUSAL_UNSPECIFIED,
            other.address: router_pb2.REFUSAL_OTHER_MODEL,
        }


async def test_who_was_tried_before_is_told_for_the_next_attempt():
    async with FakeCluster(num_prefill=2).running() as cluster:
        first, second = sorted(cluster.prefills, key=lambda prefill: prefill.address)
        first.failures = [Unavailable("a fault")]
        await cluster.generate(PROMPT, request_id="r", max_tokens=1)
        _, before, after = (await _explain(cluster, "r")).placings
        assert (before.chosen, after.chosen) == (first.address, second.address)
        assert {one.address: one.refusal for one in after.candidates} == {
            first.address: router_pb2.REFUSAL_TRIED_BEFORE,
            second.address: router_pb2.REFUSAL_UNSPECIFIED,
        }


def test_of_many_candidates_the_cheapest_and_the_chosen_are_kept():
    workers = [worker(address=f"{number:03}") for number in range(100)]
    fleet = SimpleNamespace(ranking={Role.DECODE: Ranking(workers)}, members=lambda role: workers)
    placings, demand = PlacementLog(fleet, FakeClock()), Demand(PROMPT, request_id="r")
    workers[99].take(num_blocks=1)
    placings.note_decode(demand, DecodeTerms(()), Choice(workers[99], 0, 0.0))
    [placing] = placings.of("r")
    assert [one.address for one in placing.candidates] == [*(f"{n:03}" for n in range(MAX_CANDIDATES)), "099"]
    assert placing.num_more_candidates == 100 - MAX_CANDIDATES - 1


async def test_a_local_prompt_is_explained_with_what_both_ways_would_take():
    async with FakeCluster().running() as cluster:
        policy, kind = cluster.router.parts.local_prefill, cluster.router.fleet.decode[0].kind
        for _ in range(ENOUGH):
            policy.first_token(Prospect(kind, 32, 32), is_local=True, seconds=0.001)
            policy.first_token(Prospect(kind, 32, 32), is_local=False, seconds=100.0)
            policy.computed(kind, 32, 1.0)
        await cluster.generate(PROMPT, request_id="r", max_tokens=1)
        prefill = (await _explain(cluster, "r")).placings[1]
        assert (prefill.chosen, prefill.way.is_local) == ("", True)
        assert prefill.way.reason == router_pb2.PREFILL_WAY_REASON_LESS_WAITING
        assert (prefill.way.local_ms, prefill.way.remote_ms, prefill.way.harm_ms) == pytest.approx((1, 1e5, 0))


async def test_a_request_id_that_is_used_again_and_again_is_remembered_by_its_latest_placings():
    async with FakeCluster().running() as cluster:
        for _ in range(MAX_PLACINGS):
            await cluster.generate(PROMPT, request_id="always", max_tokens=1)
        placings = (await _explain(cluster, "always")).placings
        assert len(placings) == MAX_PLACINGS
        assert [one.role for one in placings[-2:]] == [types_pb2.ROLE_DECODE, types_pb2.ROLE_PREFILL]


async def test_only_the_latest_requests_are_remembered():
    async with FakeCluster().running() as cluster:
        placings = cluster.router.parts.placings
        for number in range(MAX_REQUESTS + 1):
            await cluster.generate(PROMPT, request_id=f"r{number}", max_tokens=1)
        with pytest.raises(NotFound):
            placings.of("r0")
        assert len(placings.of("r1")) == len(placings.of(f"r{MAX_REQUESTS}")) == 2


@pytest.mark.parametrize(
    ("subject", "error"), [({"request_id": "unheard of"}, NotFound), ({}, InvalidArgument)], ids=["unknown", "nothing"]
)
async def test_what_cannot_be_explained_is_refused(subject, error):
    async with FakeCluster().running() as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.Explain(router_pb2.ExplainRequest(**subject), timeout=5)
        assert isinstance(from_rpc_error(caught.value), error)


async def test_each_placing_is_a_line_in_the_log(caplog):
    caplog.set_level("DEBUG", logger="router.explanation")
    async with FakeCluster().running() as cluster:
        await cluster.generate(PROMPT, max_tokens=1)
    decode, prefill = (record.getMessage() for record in caplog.records if record.name == "router.explanation")
    assert decode.startswith(f"decode goes to {cluster.decode.address}; considered: {cluster.decode.address}: costs ")
    assert prefill.startswith(f"prefill goes to {cluster.prefill.address}, remote (unmeasured; nothing is measured)")
