"""Streams beside the one that computes, and order between them. On a CPU everything is done when its call returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Of short work, which is not to queue behind a long kernel. PyTorch has 32 streams of each priority and hands them out
# in turn: one with another priority is never the one that computes.
_HIGH = -1


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """For data that moves while the device computes."""
    return torch.cuda.Stream(device, priority=_HIGH)


@contextlib.contextmanager
def beside_computation(device: torch.device) -> Iterator[None]:
    """This thread moves data of `device`: on a GPU, on a stream of its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(copy_stream(device)))
        yield


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Stands for everything that the calling thread's stream was given so far; None on a CPU.

    `event.wait()` makes the stream of whoever calls it wait, `event.synchronize()` the calling thread, which sleeps.
    """
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def sleep_until_done(device: torch.device) -> None:
    """Blocks until everything that the calling thread's stream was given so far is done."""
    event = mark(device)
    if event is not None:
        event.synchronize()
