"""What the queue makes of overload, a flood and priorities: simulated, on a clock that jumps."""

import random

import pytest

from router.request import Request
from tests.router.simulation import Fate, Simulation, poisson
from tests.router.values import request

PLACES = 8
NUM_TOKENS = 20
LASTS_S = 120.0


def _arrivals(client: str, rate: float, *, until_s: float = LASTS_S, seed: int = 1, patience_s=10.0, **fields):
    def make(name: str, now_s: float) -> Request:
        fields_now = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **fields}
        return request(name, client=client, deadline_s=now_s + patience_s, **fields_now)

    for number, at_s in enumerate(poisson(rate, seed, until_s=until_s)):
        yield at_s, lambda now_s, name=f"{client} {number}": make(name, now_s)


def _one_second(asked: Request) -> float:
    return 1.0


def _uneven(seed: int = 7):
    """Between half a second and a second and a half: a second on average."""
    draw = random.Random(seed)
    return lambda asked: draw.uniform(0.5, 1.5)


def _overloaded(times: float, **knobs) -> Simulation:
    """For a while, so many times what the workers can do arrives."""
    simulation = Simulation(**{"num_places": PLACES, "service_s": _uneven(), **knobs})
    simulation.run(_arrivals("anyone", times * PLACES), until_s=LASTS_S)
    return simulation


@pytest.mark.parametrize("times", [1.5, 2.0, 3.0, 10.0])
def test_overload_takes_nothing_from_what_is_served_in_time(times):
    goodput = _overloaded(times).num(Fate.IN_TIME) / LASTS_S
    assert goodput > 0.9 * PLACES, "of a request for each place and second"


def test_what_is_served_in_overload_is_hardly_ever_served_in_vain():
    simulation = _overloaded(3.0)
    assert simulation.num(Fate.LATE) < 0.02 * simulation.num(Fate.IN_TIME)


def test_where_service_takes_what_it_always_takes_nothing_is_served_in_vain_and_no_place_idles():
    simulation = _overloaded(3.0, service_s=_one_second)
    assert simulation.num(Fate.LATE) == 0
    assert simulation.num(Fate.IN_TIME) > 0.97 * PLACES * LASTS_S


def test_of_requests_that_come_at_once_those_that_cannot_end_in_time_are_turned_away():
    simulation = Simulation(num_places=1, service_s=_one_second)

    def came(number: int, patience_s: float):
        return lambda now_s: request(f"{number}", deadline_s=now_s + patience_s, max_tokens=1, ignore_eos=True)

    # The first thirty say how fast the queue moves; they have time enough.
    simulation.run([(0.0, came(number, 1000.0)) for number in range(30)], until_s=31.0)
    simulation.run([(40.0, came(number, 10.5)) for number in range(100, 130)], until_s=100.0)
    served = [name for name, fate in simulation.fates.items() if fate is Fate.IN_TIME and int(name) >= 100]
    assert len(served) == 10, "a second each, and ten and a half seconds of time"
    assert simulation.num(Fate.LATE) == 0


def test_after_an_episode_of_slow_service_requests_are_admitted_again():
    slow_until_s = 40.0
    simulation = Simulation(num_places=PLACES, service_s=lambda _: 30.0 if simulation.clock() < slow_until_s else 1.0)
    simulation.run(_arrivals("anyone", 2.0 * PLACES, until_s=200.0), until_s=200.0)
    late_s = [simulation.ended_s[name] for name, fate in simulation.fates.items() if fate is Fate.LATE]
    served_s = [simulation.ended_s[name] for name, fate in simulation.fates.items() if fate is Fate.IN_TIME]
    assert max(late_s) < slow_until_s + 31.0
    assert sum(at_s > 100.0 for at_s in served_s) > 0.9 * PLACES * 100.0


def test_a_flood_costs_a_client_that_asks_for_less_than_its_share_next_to_nothing():
    simulation = Simulation(num_places=PLACES, service_s=_uneven(), max_requests=100)
    flood = _arrivals("flood", 5.0 * PLACES, patience_s=600.0)
    calm = list(_arrivals("calm", 0.25 * PLACES, seed=2, patience_s=600.0))
    simulation.run([*flood, *calm], until_s=LASTS_S + 10)
    assert simulation.num(Fate.IN_TIME, "calm") == len(calm)
    came_s = [at_s for at_s, _ in calm]
    begun_s = [simulation.begun_s[f"calm {number}"] for number in range(len(calm))]
    waits_s = [begun - came for came, begun in zip(came_s, begun_s, strict=True)]
    # A place comes free every eighth of a second; behind the flood it would wait for a hundred.
    assert sorted(waits_s)[len(waits_s) * 99 // 100] < 2.0


def test_two_floods_share_tokens_and_not_requests():
    simulation = Simulation(
        num_places=PLACES, service_s=lambda asked: asked.stopping.max_tokens / NUM_TOKENS, max_requests=100
    )
    short = _arrivals("short", 10.0 * PLACES, max_tokens=5, patience_s=1000.0)
    long = _arrivals("long", 3.0 * PLACES, seed=2, max_tokens=40, patience_s=1000.0)
    simulation.run([*short, *long], until_s=LASTS_S)
    assert simulation.given["short"] == pytest.approx(simulation.given["long"], rel=0.05)
    assert simulation.num(Fate.IN_TIME, "short") > 5 * simulation.num(Fate.IN_TIME, "long")


def test_ten_floods_get_a_tenth_each():
    simulation = Simulation(num_places=PLACES, service_s=_uneven(), max_requests=200)
    floods = [
        one
        for number in range(10)
        for one in _arrivals(f"flood-{number}", (1 + number) * PLACES / 5, seed=number, patience_s=30.0)
    ]
    simulation.run(floods, until_s=LASTS_S)
    fair = sum(simulation.given.values()) / 10
    # The first asks for a fifth of the capacity, which is more than a tenth.
    assert all(given == pytest.approx(fair, rel=0.1) for given in simulation.given.values())


def test_a_flood_of_high_priority_takes_nothing_from_another_client():
    simulation = Simulation(num_places=PLACES, service_s=_uneven(), max_requests=100)
    flood = _arrivals("flood", 5.0 * PLACES, priority=100, patience_s=600.0)
    calm = list(_arrivals("calm", 0.25 * PLACES, seed=2, priority=-100, patience_s=600.0))
    simulation.run([*flood, *calm], until_s=LASTS_S + 10)
    assert simulation.num(Fate.IN_TIME, "calm") == len(calm)


def test_a_low_priority_waits_no_longer_than_its_points_in_seconds_for_those_that_come_after_it():
    """One client sends high priorities without end, more than can be served."""
    points = 20
    simulation = Simulation(num_places=PLACES, service_s=_one_second, max_requests=10_000)
    high = _arrivals("c", 1.2 * PLACES, priority=points, patience_s=10_000.0)

    def low(now_s: float) -> Request:
        return request("low", client="c", max_tokens=NUM_TOKENS, deadline_s=now_s + 10_000.0)

    simulation.run([*high, (30.0, low)], until_s=LASTS_S)
    came_later = [name for name in simulation.begun_s if simulation.begun_s[name] < simulation.begun_s["low"]]
    last = max(int(name.split()[1]) for name in came_later if name != "low")
    came_s = list(poisson(1.2 * PLACES, 1, until_s=LASTS_S))
    assert 30.0 < came_s[last] <= 30.0 + points
