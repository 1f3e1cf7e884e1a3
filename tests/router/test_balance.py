"""Workers of unequal speed, simulated: placement by what is measured of them gives each what it can bear."""

import random
from collections import Counter

from common.load import Load
from router.placement import DecodeTerms, Demand, PrefillTerms, choose_decode, choose_prefill
from router.ranking import Ranking
from router.workers import Role, Share, Worker, WorkerState
from tests.router.values import identity, worker

KIND = identity().kind
TICK_S = 0.02
NUM_TICKS = 3000
NUM_OUTPUT_TOKENS = 50


class SimulatedDecode:
    """A step takes `base_ms` and a tenth more for each sequence, give or take a twentieth."""

    def __init__(self, address: str, base_ms: float) -> None:
        self.worker = worker(identity(num_total_blocks=10_000), address=address)
        self._base_ms = base_ms
        self._running: list[tuple[Share, float]] = []
        self.num_steps = 0
        self.num_placed = 0

    def place(self) -> None:
        self.num_placed += 1
        share = self.worker.take(num_blocks=5)
        share.counted()
        self._running.append((share, self.num_steps + NUM_OUTPUT_TOKENS))

    def tick(self, now_s: float, draw: random.Random) -> None:
        step_ms = self._base_ms * (1 + 0.1 * len(self._running)) * draw.uniform(0.95, 1.05)
        if self._running:
            self.num_steps += TICK_S * 1e3 / step_ms
        for share, _ in [one for one in self._running if one[1] <= self.num_steps]:
            share.end()
        self._running = [one for one in self._running if one[1] > self.num_steps]
        load = Load(
            step_counter=int(now_s / TICK_S),
            num_running=len(self._running),
            num_free_blocks=10_000 - 5 * len(self._running),
            step_ms=step_ms,
        )
        self.worker.hear(WorkerState.SERVING, load, 0, now_s)


def _placed_by_decode(*base_ms: float) -> list[int]:
    """How many of 3,000 requests each gets; one comes every 20 ms."""
    draw = random.Random(0)
    simulated = {str(place): SimulatedDecode(str(place), ms) for place, ms in enumerate(base_ms)}
    ranking = Ranking([one.worker for one in simulated.values()])
    for tick in range(1, NUM_TICKS + 1):
        for one in simulated.values():
            one.tick(tick * TICK_S, draw)
        choice = choose_decode(ranking, Demand([tick] * 64), DecodeTerms({KIND}))
        simulated[choice.worker.address].place()
    return [one.num_placed for one in simulated.values()]


def test_equal_decode_workers_get_equal_parts_although_their_steps_vary():
    placed = _placed_by_decode(10, 10, 10, 10)
    assert max(placed) < 1.3 * min(placed)


def test_a_decode_worker_of_half_the_speed_gets_less_than_half_as_much():
    slow, *quick = _placed_by_decode(20, 10, 10, 10)
    assert 0 < slow < 0.5 * min(quick)


def test_prompts_are_shared_out_by_the_speed_of_prefill_workers():
    token_ms = {"a": 0.5, "b": 1.0, "c": 1.0}
    workers: dict[str, Worker] = {
        address: worker(role=Role.PREFILL, address=address, load=Load(token_ms=ms)) for address, ms in token_ms.items()
    }
    ranking = Ranking(list(workers.values()))
    placed: Counter[str] = Counter()
    for number in range(400):
        address = choose_prefill(ranking, Demand([number] * 100), PrefillTerms(KIND)).worker.address
        placed[address] += 1
        workers[address].take(num_tokens=100)
    assert placed == {"a": 200, "b": 100, "c": 100}
