"""When a decode worker says that it is under pressure, and when it no longer does."""

import logging

import pytest

from common.clock import FakeClock
from common.config import ConfigError, DecodeConfig
from common.load import Load, PressureReason
from common.metrics import DecodeMetrics
from decode_service.pressure import Pressure, PressurePolicy

WAITING = PressureReason.WAITING_RESERVATIONS
FEW_FREE, SLOW = PressureReason.FEW_FREE_BLOCKS, PressureReason.SLOW_STEPS
BUSY = Load(num_running=3, num_free_blocks=100)
LIMITS = {
    "pressure_enter_waiting": 4,
    "pressure_leave_waiting": 1,
    "pressure_enter_free_share": 0.1,
    "pressure_leave_free_share": 0.2,
    "pressure_enter_step_ms": 50.0,
    "pressure_leave_step_ms": 40.0,
    "pressure_min_ms": 0.0,
}


@pytest.fixture
def clock():
    return FakeClock()


def _policy(clock, **settings):
    return PressurePolicy(DecodeConfig(**{**LIMITS, **settings}), num_blocks=100, clock=clock)


@pytest.mark.parametrize(
    ("reason", "below", "at", "between", "left"),
    [
        (WAITING, {"num_waiting": 3}, {"num_waiting": 4}, {"num_waiting": 2}, {"num_waiting": 1}),
        (FEW_FREE, {"num_free_blocks": 10}, {"num_free_blocks": 9}, {"num_free_blocks": 19}, {"num_free_blocks": 20}),
        (SLOW, {"step_ms": 50.0}, {"step_ms": 50.1}, {"step_ms": 40.1}, {"step_ms": 40.0}),
    ],
)
def test_a_reason_enters_at_one_limit_and_leaves_at_another(clock, reason, below, at, between, left):
    policy = _policy(clock)
    told = [policy.judge(BUSY._replace(**load)) for load in (below, between, at, between, left, between)]
    assert told == [(), (), (reason,), (reason,), (), ()]


def test_pressure_lasts_its_least_time(clock):
    policy = _policy(clock, pressure_min_ms=100.0)
    assert policy.judge(BUSY._replace(num_waiting=4)) == (WAITING,)
    clock.advance(0.09)
    assert policy.judge(BUSY) == (WAITING,)
    clock.advance(0.02)
    assert policy.judge(BUSY) == ()


def test_reasons_enter_and_leave_one_by_one(clock):
    policy = _policy(clock, pressure_min_ms=100.0)
    assert policy.judge(BUSY._replace(num_waiting=4)) == (WAITING,)
    clock.advance(0.06)
    assert policy.judge(BUSY._replace(num_waiting=4, num_free_blocks=0)) == (WAITING, FEW_FREE)
    clock.advance(0.06)
    assert policy.judge(BUSY) == (FEW_FREE,)


@pytest.mark.parametrize("load", [{"num_waiting": 4}, {"num_free_blocks": 0}, {"step_ms": 99.0}])
def test_an_idle_worker_is_under_no_pressure_however_short_it_was(clock, load):
    policy = _policy(clock, pressure_min_ms=100.0)
    assert policy.judge(BUSY._replace(**load))
    assert policy.judge(Load(num_free_blocks=0, step_ms=99.0)) == ()


def test_the_mean_of_steps_gone_by_is_no_pressure_while_nothing_runs(clock):
    assert _policy(clock).judge(Load(num_reserved=1, num_free_blocks=100, step_ms=99.0)) == ()


def test_a_limit_of_zero_does_not_matter(clock):
    off = dict.fromkeys(["pressure_enter_waiting", "pressure_enter_free_share", "pressure_enter_step_ms"], 0)
    policy = _policy(clock, **off, pressure_leave_step_ms=0)
    assert policy.judge(Load(num_running=1, num_waiting=1000, num_free_blocks=0, step_ms=1e6)) == ()


def test_blocks_and_waiting_reservations_count_by_default_and_step_time_does_not(clock):
    policy = PressurePolicy(DecodeConfig(), num_blocks=100, clock=clock)
    assert policy.judge(BUSY._replace(num_waiting=4, num_free_blocks=4, step_ms=1e6)) == (WAITING, FEW_FREE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("pressure_leave_waiting", 4), ("pressure_leave_free_share", 0.05), ("pressure_leave_step_ms", 60.0)],
)
def test_a_limit_to_leave_beyond_the_one_to_enter_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}: expected"):
        DecodeConfig(**{**LIMITS, name: value})


def test_the_step_time_to_leave_follows_from_the_one_to_enter():
    assert DecodeConfig(pressure_enter_step_ms=50.0).pressure_leave_step_ms == 40.0


def test_pressure_is_told_with_the_load_in_the_log_and_in_the_metrics(clock, caplog):
    caplog.set_level(logging.INFO)
    metrics = DecodeMetrics()
    pressure = Pressure(_policy(clock), metrics, clock=clock)

    def value(name: str) -> float:
        return metrics.registry.get_sample_value(f"pdserve_decode_{name}", {"reason": "few_free_blocks"})

    assert pressure.told_with(BUSY) == BUSY
    assert value("pressure") == 0
    low = BUSY._replace(num_free_blocks=7)
    assert pressure.told_with(low) == low._replace(pressure=(FEW_FREE,))
    assert value("pressure") == 1
    clock.advance(1.5)
    assert pressure.told_with(BUSY) == BUSY
    clock.advance(1.0)
    pressure.told_with(BUSY)
    assert (value("pressure"), value("pressure_seconds_total")) == (0, 1.5)
    assert [record.getMessage() for record in caplog.records] == [
        "under pressure, FEW_FREE_BLOCKS: 0 reservations waiting, 7 blocks free, mean step 0.0 ms, 3 sequences running",
        "no longer under pressure: 0 reservations waiting, 100 blocks free, mean step 0.0 ms, 3 sequences running",
    ]


def test_pressure_is_worth_telling_at_once():
    assert BUSY._replace(pressure=(SLOW,)).differs_much_from(BUSY)
