from __future__ import annotations

import threading

import pytest
import torch

from common.transport.watch import GroupWatch
from tests.common.transport.fakes import WAIT_S

CPU = torch.device("cpu")


class Group:
    """Of nobody."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def wait_for_end(self) -> str:
        self.closed.wait(WAIT_S)
        return "closed"

    def close(self) -> None:
        self.closed.set()

    def release(self) -> None:
        raise RuntimeError("cudaIpcCloseMemHandle: cudaErrorIllegalAddress")


def watch_of(group, ended) -> GroupWatch:
    return GroupWatch(
        group, "pair-1", device=CPU, work=lambda: group.closed.wait(WAIT_S), drain=lambda: None, on_end=ended.append
    )


def test_a_group_that_cannot_be_released_keeps_nobody_waiting(caplog) -> None:
    pair = watch_of(Group(), [])
    pair.start()
    pair.close()
    assert pair.wait_released(WAIT_S)
    assert "could not be given back" in caplog.text


def test_a_transfer_thread_that_gets_no_stream_ends_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("common.transport.watch.beside_computation", fail)
    group, ended = Group(), []
    pair = watch_of(group, ended)
    pair.start()
    group.close()
    pair.close()
    assert pair.wait_released(WAIT_S)
    assert any("out of memory" in reason for reason in ended)
