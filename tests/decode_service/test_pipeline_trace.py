"""A trace of profiled steps: what Perfetto is told."""

import itertools
import json

import pytest

from decode_service.pipeline.order import Cut, Lane, order, timeline
from decode_service.pipeline.trace import Track, chrome_trace

STEPS = order(Cut.ATTENTION_CORE, 3, 2)
SPANS = timeline(STEPS, lambda stage: 2e-3 if stage.lane is Lane.FFN else 1e-3)


@pytest.fixture
def trace():
    sequential = order(Cut.LAYER, 3, 1)
    alone = timeline(sequential, lambda stage: 1e-3)
    return chrome_trace(
        [
            Track("pipelined", STEPS, [SPANS.spans, SPANS.spans], {Lane.ATTENTION: 64, Lane.FFN: 68}),
            Track("sequential", sequential, [alone.spans]),
        ]
    )


def named(trace, what):
    return {
        (event["pid"], event["tid"]): event["args"]["name"] for event in trace["traceEvents"] if event["name"] == what
    }


def slices(trace, process=1):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == process]


def test_lanes_are_threads_named_with_their_sms(trace):
    assert named(trace, "process_name") == {(1, 0): "pipelined", (2, 0): "sequential"}
    assert named(trace, "thread_name") == {
        (1, 1): "attention (64 SMs)",
        (1, 2): "ffn (68 SMs)",
        (2, 1): "attention",
        (2, 2): "ffn",
    }


def test_every_stage_of_every_step_is_a_slice_that_says_which(trace):
    seen = [(event["cat"], event["args"]["layer"], event["args"]["micro_batch"]) for event in slices(trace)]
    once = [(step.stage.lane.value, step.stage.layer, step.stage.micro_batch) for step in STEPS.steps]
    assert seen == once * 2
    assert [event["args"]["step"] for event in slices(trace)] == [0] * len(once) + [1] * len(once)
    last = slices(trace)[-1]
    assert (last["name"], last["args"]["waits_for"]) == ("B layer 3", ["attention B layer 2"])


def test_times_are_microseconds_and_steps_follow_one_another(trace):
    events = slices(trace)
    first, second = events[: len(events) // 2], events[len(events) // 2 :]
    assert first[0]["dur"] == pytest.approx(2000)
    offsets = [after["ts"] - before["ts"] for before, after in zip(first, second, strict=True)]
    assert offsets == pytest.approx([SPANS.makespan_s * 1e6] * len(first))


def test_slices_of_a_thread_never_overlap(trace):
    for thread in (1, 2):
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices(trace) if event["tid"] == thread)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(spans))


def test_micro_batches_differ_in_colour_and_in_what_is_left_of_a_name_without_digits(trace):
    looks = {
        event["args"]["micro_batch"]: (event["cname"], event["name"].translate(str.maketrans("", "", "0123456789")))
        for event in slices(trace)
    }
    assert len(set(looks.values())) == len({cname for cname, _ in looks.values()}) == 2


def test_the_trace_is_json(trace):
    assert json.loads(json.dumps(trace)) == trace
