"""Which workers a router watches where there are many: simulated, with the figures that the documentation gives."""

from collections import Counter

import pytest

from router.subset import FEWEST, MOST, SubsetSize, subset

MIN_WATCHED = 64


class Simulation:
    """Routers that choose in turns, each by what the workers told after the turn before."""

    def __init__(self, *, num_routers: int, num_workers: int) -> None:
        self.workers = [f"10.{n // 65536}.{n // 256 % 256}.{n % 256}:50053" for n in range(num_workers)]
        self.sizes = {f"router-{n}-50051": SubsetSize(MIN_WATCHED) for n in range(num_routers)}
        self.choices: dict[str, list[str]] = {}

    def turn(self) -> None:
        watchers = self.watchers
        for router, size in self.sizes.items():
            size.adjust(len(self.workers), [watchers[worker] for worker in self.choices.get(router, ())])
            self.choices[router] = subset(self.workers, of=router, size=size.size)

    @property
    def watchers(self) -> Counter[str]:
        return Counter(worker for choice in self.choices.values() for worker in choice)

    @property
    def num_streams(self) -> int:
        return self.watchers.total()

    @property
    def fewest(self) -> int:
        return min(self.watchers[worker] for worker in self.workers)


def settled(num_routers: int, num_workers: int) -> Simulation:
    simulation = Simulation(num_routers=num_routers, num_workers=num_workers)
    for _ in range(3):
        simulation.turn()
    return simulation


def test_a_thousand_workers_and_fifty_routers():
    simulation = settled(50, 1000)
    assert 12_000 <= simulation.num_streams <= 24_000, "of 50,000 if each watched all"
    assert simulation.fewest >= 5
    assert max(simulation.watchers.values()) <= 40
    before = simulation.choices.copy()
    simulation.turn()
    assert simulation.choices == before, "it stays as it is"


@pytest.mark.parametrize("num_routers", [1, 3, 10, 50, 200])
@pytest.mark.parametrize("num_workers", [65, 1000])
def test_every_worker_is_watched_and_streams_grow_with_the_workers_alone(num_routers, num_workers):
    simulation = settled(num_routers, num_workers)
    assert simulation.fewest >= min(num_routers, 3)
    assert simulation.num_streams <= max(num_routers * MIN_WATCHED, (MOST + 1) * num_workers)


def test_routers_that_come_and_go_are_allowed_for():
    simulation = settled(50, 1000)
    left = [router for router in simulation.sizes if not router.endswith("0-50051")]
    for router in left:
        del simulation.sizes[router], simulation.choices[router]
    for _ in range(3):
        simulation.turn()
    assert simulation.fewest == len(simulation.sizes) == 5, "so few watch all"
    for router in left:
        simulation.sizes[router] = SubsetSize(MIN_WATCHED)
    for _ in range(3):
        simulation.turn()
    assert simulation.fewest >= 3
    assert FEWEST <= simulation.num_streams / 1000 <= MOST + 1


def test_few_workers_are_all_watched():
    addresses = [f"worker-{n}:1" for n in range(MIN_WATCHED)]
    assert subset([*addresses, *addresses], of="router", size=MIN_WATCHED) == addresses


def test_one_worker_more_or_less_changes_one_place_of_a_choice_at_most():
    simulation = settled(50, 1000)
    for joined in ("10.9.9.9:50053", "10.9.9.8:50053"):
        for router, choice in simulation.choices.items():
            size = simulation.sizes[router].size
            after = subset([*simulation.workers, joined], of=router, size=size)
            assert len(set(choice) - set(after)) == len(set(after) - set(choice)) == (joined in after)


def test_a_router_that_sees_nobody_else_watches_all():
    size = SubsetSize(MIN_WATCHED)
    size.adjust(1000, [1] * MIN_WATCHED)
    assert size.size == 1000
    size.adjust(1000, [17] * 1000)
    assert size.size == 1000, "others have come, as many as there should be"
    size.adjust(1000, [51] * 1000)
    assert size.size == 320


def test_what_nobody_told_changes_nothing():
    size = SubsetSize(MIN_WATCHED)
    size.adjust(1000, [])
    assert size.size == MIN_WATCHED
