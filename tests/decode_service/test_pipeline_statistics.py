from __future__ import annotations

import pytest

from decode_service.pipeline.order import Cut, Lane, Span, order
from decode_service.pipeline.scheduler import PROFILE_EVERY
from decode_service.pipeline.step_statistics import PipelineStatistics
from tests.support.engine import HandTurnedEngine
from tests.support.models import make_request


def test_lanes_are_busy_idle_and_waited_for():
    steps = order(Cut.LAYER, 1, 2)
    attention_0, attention_1, ffn_0, ffn_1 = (step.stage for step in steps.steps)
    seen = PipelineStatistics()
    # Attention 2 and 2 seconds; the FFN 3 and 3, so that its second stage has waited for 1.
    seen.add_profile(steps, {attention_0: Span(0, 2), attention_1: Span(2, 4), ffn_0: Span(2, 5), ffn_1: Span(5, 8)})
    attention, ffn = seen.lanes[Lane.ATTENTION], seen.lanes[Lane.FFN]
    assert (attention.busy_ms(1), ffn.busy_ms(1)) == (4000, 6000)
    assert (attention.occupancy(8), ffn.occupancy(8)) == (0.5, 0.75)
    assert seen.bubble_share == pytest.approx(1 - 0.625)
    # Attention's second stage had all its input from the start.
    assert (attention.queue_depth(8), ffn.queue_depth(8)) == (0.25, 0.125)
    assert (attention.stage_ms(50), ffn.stage_ms(99)) == (2000, 3000)


def test_without_a_step_all_figures_are_zero():
    seen = PipelineStatistics()
    assert (seen.step_ms, seen.bubble_share) == (0, 0)
    assert [lane.stage_ms(99) for lane in seen.lanes.values()] == [0, 0]
    assert [lane.queue_depth(seen.profiled_s) for lane in seen.lanes.values()] == [0, 0]


def test_profiling_times_one_step_in_many_and_nothing_when_off():
    engine = HandTurnedEngine()
    engine.run_all([make_request(range(9), max_tokens=5)])
    before = engine.pipeline.stats()
    assert (before.num_profiled_steps, before.attention_ms, before.attention_stage_p99_ms) == (0, 0, 0)
    engine.pipeline.configure(profiling=True)
    engine.run_all([make_request(range(9), max_tokens=PROFILE_EVERY + 3)])
    after = engine.pipeline.stats()
    assert after.num_steps == before.num_steps + PROFILE_EVERY + 2
    assert after.num_profiled_steps == 2
    assert after.attention_ms > after.attention_stage_p50_ms > 0
    assert after.ffn_ms > after.ffn_stage_p50_ms > 0
    # They take turns, so that between them they are never busy for more than the step.
    assert 0.5 <= after.bubble_share < 1
    assert 0 < after.attention_occupancy + after.ffn_occupancy <= 1.0001
