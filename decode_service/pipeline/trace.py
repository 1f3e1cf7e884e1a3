"""Profiled steps as a trace for ui.perfetto.dev or chrome://tracing: a thread for each lane, a slice for each stage.

Knows no device: it takes an order and when its stages ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from decode_service.pipeline.order import Lane, Order, Span, Stage, Timeline

# Colours of chrome://tracing by their reserved names, one a micro-batch, then from the start again.
COLOURS = ("thread_state_running", "thread_state_iowait", "rail_animation", "rail_load")
THREADS = {Lane.ATTENTION: 1, Lane.FFN: 2}


class Track(NamedTuple):
    """Steps in one arrangement; one process of the trace."""

    name: str
    order: Order
    # Of each step, when its stages ran.
    steps: Sequence[Mapping[Stage, Span]]
    # The SMs that each lane has; None: the lanes share all of them, or it is not known.
    num_sm: Mapping[Lane, int] | None = None

    def title(self, lane: Lane) -> str:
        """The lane's name, with its SMs."""
        return lane.value if self.num_sm is None else f"{lane.value} ({self.num_sm[lane]} SMs)"


def micro_batch_name(micro_batch: int) -> str:
    """A letter: Perfetto colours slices by their names without digits, so digits would make all alike."""
    return chr(ord("A") + micro_batch)


def chrome_trace(tracks: Sequence[Track]) -> dict[str, Any]:
    """The trace as JSON values. Steps of a track follow one another without a gap; times are in microseconds."""
    events = [event for process, track in enumerate(tracks, 1) for event in _events(process, track)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _events(process: int, track: Track) -> Iterator[dict[str, Any]]:
    yield _name("process_name", process, 0, track.name)
    for lane, thread in THREADS.items():
        yield _name("thread_name", process, thread, track.title(lane))
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
    start_s = 0.0
    for index, spans in enumerate(track.steps):
        for stage, waits in track.order.steps:
            yield _slice(process, stage, spans[stage], start_s) | {
                "args": {
                    "step": index,
                    "layer": stage.layer,
                    "micro_batch": stage.micro_batch,
                    "waits_for": [f"{wait.lane.value} {_slice_name(wait)}" for wait in waits],
                }
            }
        start_s += Timeline(dict(spans)).makespan_s


def _slice(process: int, stage: Stage, span: Span, start_s: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": _slice_name(stage),
        "cat": stage.lane.value,
        "pid": process,
        "tid": THREADS[stage.lane],
        "ts": (start_s + span.start_s) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "cname": COLOURS[stage.micro_batch % len(COLOURS)],
    }


def _slice_name(stage: Stage) -> str:
    return f"{micro_batch_name(stage.micro_batch)} layer {stage.layer}"


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
