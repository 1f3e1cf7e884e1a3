"""The load generator's arithmetic: when what is sent, by which process, and what counts. No router, no real time."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from common.clock import FakeClock
from pdserve.bench.arrivals import CONSTANT, POISSON, arrivals
from pdserve.bench.lengths import Lengths
from pdserve.bench.load import Loop, Point, Share
from pdserve.bench.workload import Workload

WORKLOAD = Workload(seed=3, prompt_tokens=Lengths(4, 9), output_tokens=Lengths(2, 5), vocab_size=100)
START_S = 1000.0


class Time(FakeClock):
    """Turns itself: who sleeps is woken in order, and nothing else takes time but `late_s`, once."""

    def __init__(self, *, late_s: float = 0.0) -> None:
        super().__init__(START_S)
        self.late_s = late_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.advance(seconds + self.late_s)
        self.late_s = 0.0


async def sent_by(point: Point, share: Share | None = None, *, time: Time | None = None, answer_s: float = 0.0):
    """All that is sent; each answer takes `answer_s`, one after the other."""
    time = time or Time()

    async def follow(ask, sent):
        sent.sent_s = time()
        time.advance(answer_s)
        sent.ended_s, sent.status = time(), "OK"
        await asyncio.sleep(0)

    loop = Loop(point, share or Share(), WORKLOAD.ask, follow, time, time.sleep)
    await loop.run(START_S)
    return loop.sent


def test_poisson_gaps_have_the_mean_and_the_spread_of_their_rate():
    due = list(itertools.islice(arrivals(POISSON, 4.0, seed=1), 20_001))
    gaps = [after - before for before, after in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4.0, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.05)


def test_arrivals_are_those_of_their_seed_and_scale_with_the_rate():
    slow, fast, other = (list(itertools.islice(arrivals(POISSON, *of), 50)) for of in ((1.0, 7), (4.0, 7), (1.0, 8)))
    assert [4 * at_s for at_s in fast] == pytest.approx(slow)
    assert other != slow


def test_constant_arrivals_are_equally_far_apart():
    assert list(itertools.islice(arrivals(CONSTANT, 4.0, seed=1), 4)) == [0.0, 0.25, 0.5, 0.75]


async def test_an_open_loop_counts_what_is_due_in_the_window():
    sent = await sent_by(Point(rate=4.0, arrivals=CONSTANT, warmup_s=1.0, duration_s=2.0))
    assert [one.due_s - START_S for one in sent] == [place / 4 for place in range(12)]
    assert [one.index for one in sent if one.is_measured] == list(range(4, 12))


async def test_an_open_loop_of_so_many_requests_ends_with_the_last_of_them():
    sent = await sent_by(Point(rate=4.0, arrivals=CONSTANT, warmup_s=1.0, num_requests=3))
    assert [one.index for one in sent] == list(range(7))
    assert [one.index for one in sent if one.is_measured] == [4, 5, 6]


async def test_what_goes_out_late_counts_from_when_it_was_due():
    sent = await sent_by(Point(rate=10.0, arrivals=CONSTANT, duration_s=0.5), time=Time(late_s=0.35))
    assert [one.due_s - START_S for one in sent] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [round(one.sent_s - START_S, 6) for one in sent] == [0.35, 0.35, 0.35, 0.35, 0.4]


async def test_processes_share_an_open_loop_without_gap_or_overlap():
    point = Point(rate=5.0, warmup_s=1.0, duration_s=4.0, seed=2)
    whole = await sent_by(point)
    shares = [await sent_by(point, Share(place=place, of=3)) for place in range(3)]
    together = sorted((one for share in shares for one in share), key=lambda one: one.index)
    assert [(one.index, one.due_s, one.is_measured) for one in together] == [
        (one.index, one.due_s, one.is_measured) for one in whole
    ]


async def test_a_closed_loop_counts_what_is_begun_in_the_window():
    sent = await sent_by(Point(concurrency=1, warmup_s=1.0, duration_s=2.0), answer_s=0.5)
    assert [one.due_s - START_S for one in sent] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert [one.is_measured for one in sent] == [False] * 2 + [True] * 4


@pytest.mark.parametrize("of", [1, 3])
async def test_a_closed_loop_of_so_many_requests_measures_as_many(of):
    point = Point(concurrency=4, warmup_s=1.0, num_requests=10)
    shares = [await sent_by(point, Share(place=place, of=of), answer_s=0.3) for place in range(of)]
    assert sum(one.is_measured for share in shares for one in share) == 10
    assert len({one.index for share in shares for one in share}) == sum(map(len, shares))


def test_a_request_is_the_same_whoever_draws_it():
    assert WORKLOAD.ask(5) == WORKLOAD.ask(5) != WORKLOAD.ask(6)


def test_lengths_and_ids_stay_within_what_is_given():
    asks = [WORKLOAD.ask(index) for index in range(300)]
    assert {len(ask.prompt) for ask in asks} == set(range(4, 10))
    assert {ask.options["max_tokens"] for ask in asks} == {2, 3, 4, 5}
    assert {token_id for ask in asks for token_id in ask.prompt} == set(range(100))


def test_a_shared_prefix_is_shared_by_all_prompts_and_nothing_else_is():
    workload = Workload(
        seed=1, prompt_tokens=Lengths(20, 20), output_tokens=Lengths(1, 1), vocab_size=1000, shared_prefix=12
    )
    one, other = workload.ask(0).prompt, workload.ask(1).prompt
    assert one[:12] == other[:12]
    assert one[12:] != other[12:]


@pytest.mark.parametrize("text", ["", "0", "x", "9-4", "3-", "-3", "1.5"])
def test_no_length_is_refused_with_words(text):
    with pytest.raises(ValueError, match="expected"):
        Lengths.parse(text)


def test_a_length_reads_as_it_was_given():
    assert [str(Lengths.parse(text)) for text in ("128", "64-256")] == ["128", "64-256"]
    assert Lengths.parse("5-5").draw(random.Random(0)) == 5
