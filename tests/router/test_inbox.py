"""What gathers, for how long, and what ends a pause."""

import asyncio

from router.inbox import Inbox
from router.pacer import MAX_MESSAGES_PER_S, Pacer


async def _taken(inbox: Inbox) -> list:
    return await asyncio.wait_for(inbox.take(), 5)


async def test_everything_that_was_put_is_taken_at_once_and_in_order():
    inbox = Inbox()
    for item in range(3):
        inbox.put(item, can_wait=item != 1)
    assert await _taken(inbox) == [0, 1, 2]


async def test_the_taker_is_woken_by_what_comes():
    inbox = Inbox()
    taker = asyncio.create_task(_taken(inbox))
    await asyncio.sleep(0)
    inbox.put("item", can_wait=True)
    assert await taker == ["item"]


async def test_what_can_wait_gathers_during_a_pause():
    inbox = Inbox()
    inbox.put("before", can_wait=True)
    inbox.pause(0.3)
    taker = asyncio.create_task(_taken(inbox))
    await asyncio.sleep(0)
    inbox.put("within", can_wait=True)
    assert not taker.done()
    assert await taker == ["before", "within"]


async def test_what_cannot_wait_ends_a_pause():
    inbox = Inbox()
    inbox.pause(1000)
    inbox.put("token", can_wait=True)
    taker = asyncio.create_task(_taken(inbox))
    await asyncio.sleep(0)
    inbox.put("completion")
    assert await taker == ["token", "completion"]


async def test_after_a_pause_things_are_as_before():
    inbox = Inbox()
    inbox.pause(0.1)
    inbox.put(1, can_wait=True)
    assert await _taken(inbox) == [1]
    inbox.put(2, can_wait=True)
    assert await _taken(inbox) == [2]


def test_few_streams_never_pause_and_many_share_the_messages():
    pacer = Pacer()
    streams = [pacer.stream() for _ in range(400)]
    for stream in streams[:10]:
        stream.__enter__()
    assert pacer.pause_s == 0
    for stream in streams[10:]:
        stream.__enter__()
    assert pacer.pause_s == 400 / MAX_MESSAGES_PER_S
    for stream in streams:
        stream.__exit__(None, None, None)
    assert pacer.pause_s == 0
