"""The order of a pipelined step: what waits for what, and how long it takes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_service.pipeline.order import Cut, Lane, Stage, order, timeline

A, F = Lane.ATTENTION, Lane.FFN
orders = st.builds(order, st.sampled_from(Cut), st.integers(1, 6), st.integers(1, 4))


@st.composite
def timed_orders(draw):
    """An order, and seconds of each of its stages."""
    drawn = draw(orders)
    stages = [step.stage for step in drawn.steps]
    seconds = draw(st.lists(st.floats(0, 10), min_size=len(stages), max_size=len(stages)))
    return drawn, dict(zip(stages, seconds, strict=True))


def test_a_layer_waits_for_the_one_before_of_its_own_micro_batch():
    steps = order(Cut.LAYER, 2, 2)
    assert [step.stage for step in steps.lane(A)] == [Stage(A, 0, 0), Stage(A, 0, 1), Stage(A, 1, 0), Stage(A, 1, 1)]
    assert [step.waits for step in steps.lane(A)] == [(), (), (Stage(F, 0, 0),), (Stage(F, 0, 1),)]
    assert [step.waits for step in steps.lane(F)] == [(step.stage,) for step in steps.lane(A)]


def test_attention_core_has_a_dense_stage_before_and_after_every_attention():
    steps = order(Cut.ATTENTION_CORE, 2, 1)
    assert [step.stage for step in steps.steps] == [
        Stage(F, 0, 0),
        Stage(A, 0, 0),
        Stage(F, 1, 0),
        Stage(A, 1, 0),
        Stage(F, 2, 0),
    ]
    assert [step.waits for step in steps.lane(F)] == [(), (Stage(A, 0, 0),), (Stage(A, 1, 0),)]


@given(orders)
def test_whatever_a_stage_waits_for_is_enqueued_before_it_and_on_the_other_lane(drawn):
    seen = set()
    for stage, waits in drawn.steps:
        assert all(wait in seen and wait.lane is not stage.lane for wait in waits)
        seen.add(stage)
    assert len(seen) == len(drawn.steps) == sum(drawn.num_stages(lane) for lane in Lane) * drawn.num_micro_batches
    assert {stage for stage in seen if drawn.is_read(stage)} == {wait for step in drawn.steps for wait in step.waits}


@given(timed_orders())
def test_no_stage_starts_before_its_lane_and_its_input_are_there(timed):
    drawn, seconds = timed
    spans = timeline(drawn, seconds.get).spans
    for lane in Lane:
        ran = [spans[step.stage] for step in drawn.lane(lane)]
        assert all(later.start_s >= earlier.end_s for earlier, later in itertools.pairwise(ran))
    assert all(spans[stage].start_s >= spans[wait].end_s for stage, waits in drawn.steps for wait in waits)


@given(timed_orders())
def test_a_step_takes_as_long_as_its_busier_lane_at_least_and_all_stages_in_a_row_at_most(timed):
    drawn, seconds = timed
    result = timeline(drawn, seconds.get)
    busy = [result.busy_s(lane) for lane in Lane]
    assert max(busy) - 1e-9 <= result.makespan_s <= sum(seconds.values()) + 1e-9
    assert all(-1e-9 <= result.bubble_share(lane) <= 1 for lane in Lane)


@given(orders, st.floats(0.01, 10))
def test_balanced_lanes_only_stand_idle_at_the_ends(drawn, stage_s):
    layers, micro_batches = drawn.num_layers, drawn.num_micro_batches
    if drawn.cut is Cut.LAYER:
        num_rounds = 2 * layers if micro_batches == 1 else micro_batches * layers + 1
    else:
        num_rounds = 2 * layers + 1 if micro_batches == 1 else micro_batches * (layers + 1)
    assert timeline(drawn, lambda stage: stage_s).makespan_s == pytest.approx(num_rounds * stage_s)
