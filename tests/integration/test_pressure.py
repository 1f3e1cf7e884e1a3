"""An overloaded decode worker holds prompts back before their KV piles up."""

import asyncio
import threading

import pytest

from common.load import PressureReason
from tests.fakes.cluster import Reply, eventually
from tests.support.cluster import RealCluster

NUM_BLOCKS, NUM_SMALL = 96, 40
SETTINGS = {
    "decode_num_blocks": NUM_BLOCKS,
    "decode_pressure_enter_free_share": 0.4,
    "decode_pressure_leave_free_share": 0.5,
}


class Tight(RealCluster):
    """Keeps every load that the decode worker tells, and can stop prefill between two steps."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**SETTINGS, **settings)
        self.loads = []
        self.may_prefill = threading.Event()

    def stop_prefill(self) -> None:
        self.prefills[0].worker.engine.submit(self.may_prefill.wait)

    def listen(self) -> None:
        front = self.decodes[0].worker.front
        tell = front.set_load
        front.set_load = lambda load: (self.loads.append(load), tell(load))

    def metric(self, name: str) -> float:
        return self.router.metrics.registry.get_sample_value(f"pdserve_router_{name}")


@pytest.mark.parametrize("decode_pipeline", ["static", "disabled"])
async def test_prompts_wait_in_the_router_while_decode_has_few_free_blocks(decode_pipeline):
    async with Tight(decode_pipeline=decode_pipeline).running() as cluster:
        cluster.listen()
        cluster.stop_prefill()
        # 65 of 96 blocks are promised to this one, and nothing comes to fill them.
        large = cluster.start(list(range(100, 1124)), max_tokens=16, ignore_eos=True)
        await eventually(lambda: cluster.router.fleet.decode[0].is_pressed)
        assert cluster.router.fleet.decode[0].identity.num_spare_blocks == 39
        calls = [
            cluster.start([3 + number] * 40, max_tokens=24, ignore_eos=True, timeout=60.0)
            for number in range(NUM_SMALL)
        ]
        await eventually(lambda: cluster.metric("held_requests") == NUM_SMALL)
        told = cluster.loads[-1]
        assert told.pressure == (PressureReason.FEW_FREE_BLOCKS,)
        assert (told.num_reserved, told.num_waiting, told.num_free_blocks) == (1, 0, NUM_BLOCKS - 65)
        cluster.may_prefill.set()
        replies = await asyncio.gather(*map(Reply.of, (large, *calls)))
        assert [len(reply.token_ids) for reply in replies] == [16, *[24] * NUM_SMALL]
        # Later, too, no more have begun than have blocks: a small one is promised 4.
        assert max(load.num_reserved for load in cluster.loads) <= NUM_BLOCKS // 4
        assert cluster.metric("held_seconds_count") >= NUM_SMALL
        await cluster.settled()
        assert cluster.decodes[0].worker.front.load.pressure == ()
