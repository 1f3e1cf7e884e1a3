from __future__ import annotations

from functools import partial

import pytest
import torch

from common.engine.loop import EngineLoop


class RecordingLoop(EngineLoop):
    """Turned by hand; has nothing to compute."""

    def __init__(self):
        super().__init__("recording", device=torch.device("cpu"), on_crash=lambda error: None)
        self.happened: list[object] = []

    def has_work(self):
        return False

    def publish(self):
        self.happened.append("published")

    def later(self, what, **options):
        self.submit(partial(self.happened.append, what), **options)


@pytest.fixture
def loop():
    return RecordingLoop()


def test_calls_that_can_wait_go_one_a_turn_after_what_is_published(loop):
    loop.later(1, can_wait=True)
    loop.later(2, can_wait=True)
    loop.later("urgent")
    assert loop.turn()
    assert loop.happened == ["urgent", "published", 1]
    loop.later("urgent too")
    assert not loop.turn()
    assert loop.happened[3:] == ["urgent too", "published", 2]


def test_a_loop_does_not_rest_while_a_call_can_wait(loop):
    loop.later(1, can_wait=True)
    # Nobody wakes it: its condition would be waited for.
    loop._wake.wait = lambda timeout: pytest.fail("it rests")
    loop.rest()
    assert loop.turn() is False
