"""The small parts: checksum, staging, serial steps, outbox."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from types import SimpleNamespace

import torch
import xxhash

from common.transport.checksum import checksum
from common.transport.outbox import Outbox
from common.transport.serial import Serial
from common.transport.staging import Slot, StagingSlots
from tests.common.transport.fakes import WAIT_S


def test_the_checksum_is_xxh3_64_of_the_bytes_of_a_slice() -> None:
    buffer = torch.arange(256, dtype=torch.uint8)
    assert checksum(buffer[16:64]) == xxhash.xxh3_64_intdigest(bytes(range(16, 64)))
    assert checksum(torch.ones(3).view(torch.uint8)) == xxhash.xxh3_64_intdigest(b"\0\0\x80\x3f" * 3)


def test_staging_slots_are_bounded_and_reused() -> None:
    staging = StagingSlots(2, 64, partial(torch.empty, dtype=torch.uint8))
    first, second = staging.acquire(), staging.acquire()
    assert staging.acquire() is None
    staging.release(second)
    assert staging.acquire() is second
    assert first.buffer.numel() == 64
    assert staging.num_bytes == 128


def test_a_slot_is_written_again_only_after_its_reader() -> None:
    waited = []
    slot = Slot(torch.empty(8, dtype=torch.uint8))
    slot.wait_until_read()
    slot.still_read = SimpleNamespace(synchronize=lambda: waited.append("thread"))
    slot.wait_until_read()
    slot.wait_until_read()
    assert waited == ["thread"]


def test_actions_are_performed_in_the_order_of_the_steps_that_asked_for_them() -> None:
    performed = []

    def perform(action: int) -> None:
        if action == 1:
            serial.run(lambda: [3, 4])
            assert performed == []
        performed.append(action)

    serial: Serial[int] = Serial(threading.Condition(), perform)
    assert serial.run(lambda: [1, 2]) == [1, 2]
    assert performed == [1, 2, 3, 4]


def test_steps_of_many_threads_are_performed_one_at_a_time() -> None:
    performed: list[int] = []
    taken: list[int] = []

    def step(number: int) -> list[int]:
        taken.append(number)
        return [number]

    def take_steps(first: int) -> None:
        for number in range(first, first + 200):
            serial.run(partial(step, number))

    serial: Serial[int] = Serial(threading.Condition(), performed.append)
    threads = [threading.Thread(target=take_steps, args=(first,)) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert performed == taken
    assert len(performed) == 600


async def test_an_outbox_keeps_the_order_of_each_thread_and_ends_when_closed() -> None:
    outbox: Outbox[tuple[str, int]] = Outbox()

    def post(name: str) -> None:
        for number in range(300):
            outbox.post((name, number))

    async with asyncio.timeout(WAIT_S):
        posting = asyncio.gather(*(asyncio.to_thread(post, name) for name in "ab"))
        posting.add_done_callback(lambda _: outbox.close())
        messages = [message async for message in outbox]
    await posting
    for name in "ab":
        assert [number for author, number in messages if author == name] == list(range(300))
    outbox.post(("late", 0))
    assert [message async for message in outbox] == []
