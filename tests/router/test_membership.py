"""Workers join, leave and are replaced while requests are on their way; none of those may notice."""

import asyncio

import grpc.aio
import pytest

from common.errors import from_rpc_error
from tests.fakes.cluster import BY_NAME, DECODE_NAME, FakeCluster, Reply, eventually

SCRIPT = list(range(100, 110))


def _known(cluster: FakeCluster) -> set[str]:
    return {worker.address for worker in cluster.router.fleet.workers}


async def test_who_a_name_leads_to_joins_and_gets_requests():
    async with FakeCluster().running(**BY_NAME) as cluster:
        cluster.decode.tell_load(num_running=50)
        joined = await cluster.add_decode()
        await eventually(lambda: cluster.num_serving == 3)
        reply = await cluster.generate(max_tokens=10)
        assert (reply.token_ids, len(joined.opened)) == (SCRIPT, 1)


async def test_who_answers_stays_although_no_name_leads_there():
    async with FakeCluster(num_decode=2).running(**BY_NAME) as cluster:
        cluster.names.answers.clear()
        num_asked = cluster.names.num_asked
        await eventually(lambda: cluster.names.num_asked > num_asked + 2)
        assert cluster.num_serving == 3
        assert (await cluster.generate(max_tokens=10)).token_ids == SCRIPT


async def test_who_is_unreachable_leaves_once_no_name_leads_there():
    async with FakeCluster(num_decode=2).running(**BY_NAME) as cluster:
        gone, stays = cluster.decodes
        await gone.kill()
        await eventually(lambda: cluster.num_serving == 2)
        assert gone.address in _known(cluster), "its name leads there"
        cluster.unname(gone)
        await eventually(lambda: _known(cluster) == {stays.address, cluster.prefill.address})
        assert (await cluster.generate(max_tokens=10)).token_ids == SCRIPT


async def test_who_has_left_may_come_back():
    async with FakeCluster().running(**BY_NAME) as cluster:
        await cluster.decode.kill()
        cluster.unname(cluster.decode)
        await eventually(lambda: cluster.decode.address not in _known(cluster))
        await cluster.decode.restart()
        cluster.names.answers[DECODE_NAME].append(cluster.decode.address)
        await eventually(lambda: cluster.num_serving == 2)
        assert (await cluster.generate(max_tokens=10)).token_ids == SCRIPT


async def test_names_that_cannot_be_looked_up_cost_nobody():
    async with FakeCluster().running(**BY_NAME) as cluster:
        cluster.names.is_failing = True
        await cluster.decode.kill()
        await eventually(lambda: cluster.num_serving == 1)
        await cluster.decode.restart()
        await eventually(lambda: cluster.num_serving == 2)
        assert (await cluster.generate(max_tokens=10)).token_ids == SCRIPT


async def test_a_name_that_leads_nowhere_is_named():
    cluster = FakeCluster(num_decode=0)
    async with cluster.running(**{**BY_NAME, "startup_grace_s": 60.0}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate()
        assert from_rpc_error(caught.value).reason == "NO_WORKER"
        await cluster.add_decode()
        await eventually(lambda: cluster.router.health.is_ready)


async def test_workers_come_and_go_under_traffic_and_no_request_is_lost():
    async with FakeCluster(num_decode=2, num_prefill=2).running(**BY_NAME) as cluster:
        is_over, num_done = asyncio.Event(), 0

        async def client() -> None:
            nonlocal num_done
            while not is_over.is_set():
                assert (await cluster.generate([1, 2, 3], max_tokens=10)).token_ids == SCRIPT
                num_done += 1

        def all_have_worked() -> bool:
            return all(one.opened for one in cluster.decodes) and all(one.requests for one in cluster.prefills)

        async def replace_all() -> None:
            for old, add in [(one, cluster.add_decode) for one in cluster.decodes] + [
                (one, cluster.add_prefill) for one in cluster.prefills
            ]:
                await add()
                await eventually(lambda: cluster.num_serving == 5)
                cluster.unname(old)
                await old.kill()
                await eventually(lambda: len(_known(cluster)) == 4)
                before = num_done
                await eventually(lambda before=before: num_done >= before + 20)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(client())
            await eventually(all_have_worked)
            await replace_all()
            await eventually(all_have_worked)
            is_over.set()


@pytest.mark.promise(14)
async def test_a_rolling_upgrade_mixes_no_fingerprints():
    cluster = FakeCluster(num_decode=2, num_prefill=2)
    async with cluster.running(**BY_NAME):
        old = cluster.workers
        for decode in cluster.decodes:
            decode.go.clear()
            decode.pause_at = 4
        begun = [cluster.start([1, 2, 3], max_tokens=10) for _ in range(6)]
        await eventually(lambda: sum(decode.num_active for decode in cluster.decodes) == 6)
        new = [await cluster.add_decode(model_fingerprint="new"), await cluster.add_prefill(model_fingerprint="new")]
        await eventually(lambda: cluster.num_serving == 6)
        for worker in old:
            worker.drain()
        await eventually(lambda: cluster.num_serving == 2)
        assert (await cluster.generate([1, 2, 3], max_tokens=10)).completion.path.decode_worker == (
            new[0].identity.instance_id
        )
        for decode in cluster.decodes:
            decode.go.set()
        replies = [await Reply.of(call) for call in begun]
        assert all(reply.token_ids == SCRIPT for reply in replies)
        served_by = {(reply.completion.path.decode_worker, reply.completion.path.num_resumptions) for reply in replies}
        assert served_by <= {(worker.identity.instance_id, 0) for worker in old}
        assert sum(worker.num_misdirected for worker in cluster.workers) == 0


@pytest.mark.promise(14)
async def test_a_worker_that_comes_back_with_another_model_before_it_is_missed_loses_no_request():
    async with FakeCluster(num_decode=2, num_prefill=0).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.identity.model_fingerprint = "new"
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.completion.path.decode_worker == second.identity.instance_id
        assert (reply.token_ids, first.num_misdirected) == (SCRIPT, 1)


async def test_of_many_workers_a_router_watches_as_many_as_others_leave_to_it():
    async with FakeCluster(num_decode=6, num_prefill=6).running(min_watched=2, **BY_NAME) as cluster:
        assert cluster.num_serving == 12, "nobody else watches them"
        for worker in cluster.workers:
            worker.tell_load(num_watchers=49)
        await eventually(lambda: len(cluster.router.fleet.decode) == len(cluster.router.fleet.prefill) == 2)
        assert (await cluster.generate(max_tokens=10)).token_ids == SCRIPT
        for worker in cluster.workers:
            worker.tell_load(num_watchers=1)
        await eventually(lambda: cluster.num_serving == 12)


async def test_a_worker_that_is_no_longer_watched_finishes_what_it_has_and_gets_nothing_new():
    async with FakeCluster(num_decode=4, num_prefill=1).running(min_watched=2, **BY_NAME) as cluster:
        for decode in cluster.decodes:
            decode.go.clear()
        begun = [cluster.start([1, 2, 3], max_tokens=10) for _ in range(8)]
        await eventually(lambda: [decode.num_active for decode in cluster.decodes] == [2, 2, 2, 2])
        for decode in cluster.decodes:
            decode.tell_load(num_watchers=49)
        await eventually(lambda: cluster.num_serving == 2 + 1)
        assert len(cluster.router.fleet.decode) == 4
        later = [cluster.start([1, 2, 3], max_tokens=10) for _ in range(4)]
        await eventually(lambda: sum(decode.num_active for decode in cluster.decodes) == 12)
        assert sorted(decode.num_active for decode in cluster.decodes) == [2, 2, 4, 4]
        for decode in cluster.decodes:
            decode.go.set()
        for call in [*begun, *later]:
            assert (await Reply.of(call)).token_ids == SCRIPT
        await eventually(lambda: len(cluster.router.fleet.decode) == 2)
