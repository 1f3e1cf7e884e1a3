"""Who asks during a soak, and what became of it: each client asks again as soon as it is answered.

Times are the clock's of the machine, since they are held against the logs of other processes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import grpc
import grpc.aio

from common import rpc
from common.errors import from_rpc_error
from pdserve.v1 import router_pb2, router_pb2_grpc
from tests.support.processes import Service

NUM_KINDS = 16
MAX_TOKENS = 60
DEADLINE_S = 60.0
# One request in so many is left by its client in the middle.
LEAVES = 20


class Fate(Enum):
    EXACT = "exact"
    WRONG = "other tokens"
    LEFT = "left by their client"
    LOST = "lost"
    # It was killed, or its connections were reset, under them.
    LOST_WITH_ROUTER = "lost with their router"
    # A router on its way out takes nothing new: the client asks another one.
    TURNED_AWAY = "turned away by a router that ends"


@dataclass(eq=False, slots=True)
class Asked:
    """One request."""

    kind: int
    began_s: float
    ended_s: float = math.inf
    arrivals_s: array = field(default_factory=lambda: array("d"))
    num_resumptions: int = 0
    fate: Fate = Fate.LOST
    detail: str = ""

    def longest_wait_s(self, after_s: float = -math.inf) -> float:
        """For the first or the next message, of what of the waits lies after `after_s`."""
        times = [self.began_s, *self.arrivals_s]
        return max((end - max(begin, after_s) for begin, end in itertools.pairwise(times) if end > after_s), default=0)


class Door:
    """A router as its clients know it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.channel = rpc.connect(service.address)
        self.stub = router_pb2_grpc.RouterServiceStub(self.channel)
        self.is_open = True
        # Its requests from before then may have been lost with it.
        self.struck_s = -math.inf

    async def open(self) -> None:
        """Once it is reached again."""
        self.channel.get_state(try_to_connect=True)
        await asyncio.wait_for(self.channel.channel_ready(), DEADLINE_S)
        self.is_open = True


class Clients:
    """Half of them prefer the first router, half the second; they go where a door is open."""

    def __init__(self, doors: Sequence[Door]) -> None:
        self.is_over = False
        self.asked: list[Asked] = []
        self._doors = doors
        self._expected: list[list[int]] = []

    def counts(self) -> Counter[Fate]:
        return Counter(one.fate for one in self.asked)

    async def learn(self) -> None:
        """What each kind puts out undisturbed."""
        for kind in range(NUM_KINDS):
            token_ids: list[int] = []
            await self._read(self._doors[0], Asked(kind, time.time()), token_ids)
            self._expected.append(token_ids)

    async def run(self, number: int) -> None:
        draw = random.Random(number)
        while not self.is_over:
            door = await self._choose(number)
            leaves_after = draw.randrange(1, 20) if draw.randrange(LEAVES) == 0 else None
            self.asked.append(await self.ask(door, draw.randrange(NUM_KINDS), leaves_after=leaves_after))

    async def ask(self, door: Door, kind: int, *, leaves_after: int | None = None) -> Asked:
        """One request and its fate."""
        asked, token_ids = Asked(kind, time.time()), list[int]()
        try:
            is_whole = await self._read(door, asked, token_ids, leaves_after=leaves_after)
        except grpc.aio.AioRpcError as failure:
            asked.fate, asked.detail = (
                self._fate_of(failure, asked, door),
                f"{failure.code().name}: {failure.details()}",
            )
        else:
            is_exact = token_ids == self._expected[kind]
            asked.fate = Fate.LEFT if not is_whole else Fate.EXACT if is_exact else Fate.WRONG
            asked.detail = "" if is_exact else f"kind {kind}: {token_ids}"
        asked.ended_s = time.time()
        return asked

    @staticmethod
    def _fate_of(failure: grpc.aio.AioRpcError, asked: Asked, door: Door) -> Fate:
        if failure.code() is not grpc.StatusCode.UNAVAILABLE:
            return Fate.LOST
        if door.struck_s >= asked.began_s:
            return Fate.LOST_WITH_ROUTER
        turned_away = from_rpc_error(failure).reason == "DRAINING" and not door.is_open and not asked.arrivals_s
        return Fate.TURNED_AWAY if turned_away else Fate.LOST

    @staticmethod
    async def _read(door: Door, asked: Asked, token_ids: list[int], *, leaves_after: int | None = None) -> bool:
        """False: the client has left."""
        call = door.stub.Generate(request(asked.kind), timeout=DEADLINE_S)
        async for response in call:
            asked.arrivals_s.append(time.time())
            token_ids += response.chunk.token_ids
            asked.num_resumptions = response.completion.path.num_resumptions
            if len(asked.arrivals_s) == leaves_after and not response.HasField("completion"):
                call.cancel()
                return False
        return True

    async def _choose(self, number: int) -> Door:
        while True:
            preferred = self._doors[number % len(self._doors) :] + self._doors[: number % len(self._doors)]
            for door in preferred:
                if door.is_open:
                    return door
            await asyncio.sleep(0.01)


def request(kind: int) -> router_pb2.GenerateRequest:
    """One of `NUM_KINDS`, always the same."""
    draw = random.Random(kind)
    message = router_pb2.GenerateRequest()
    message.prompt_token_ids.ids.extend(draw.randrange(3, 2048) for _ in range(draw.choice([5, 17, 60, 200, 600])))
    message.sampling.temperature = draw.choice([0.0, 0.9])
    message.sampling.seed = kind
    message.stopping.max_tokens = MAX_TOKENS
    message.stopping.ignore_eos = True
    return message
