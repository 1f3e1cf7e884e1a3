"""Random requests and random headers at a real cluster; `make fuzz` has many more of them."""

from __future__ import annotations

import asyncio
import random

from tests.support.fuzzed import Fuzzed

NUM_REQUESTS = 300
NUM_PAIRS = 40


async def test_random_requests_are_answered_honestly_and_leave_nothing_behind():
    async with Fuzzed.running() as fuzzed:
        for first in range(0, NUM_REQUESTS, 10):
            await asyncio.gather(*(fuzzed.request(random.Random(first + index)) for index in range(10)))
        assert fuzzed.codes.total() == NUM_REQUESTS
        assert fuzzed.codes["OK"] > NUM_REQUESTS / 10, "some of it reaches the workers"
        assert fuzzed.codes["INVALID_ARGUMENT"] > NUM_REQUESTS / 10


async def test_random_headers_end_a_pair_at_most_and_leave_nothing_behind():
    async with Fuzzed.running() as fuzzed:
        for seed in range(NUM_PAIRS):
            await fuzzed.pair(random.Random(seed), most=10)
        assert fuzzed.num_headers > 2 * NUM_PAIRS
