"""Who is asked next, and after how long: the policy alone, under a clock that stands still."""

from __future__ import annotations

import pytest

from common import errors
from common.clock import FakeClock
from common.settings import ConfigError
from pdserve.retrying import Attempts, RetryPolicy
from pdserve.targets import AVOID_S, Rotation, targets_of

GONE = errors.Unavailable("gone")
FULL = errors.ResourceExhausted("full", retry_after_s=2.0)


def attempts_at(*targets, timeout_s=60.0, chance=0.0, clock=None, **policy) -> Attempts:
    made = RetryPolicy(chance=lambda: chance, **policy)
    clock = clock or FakeClock()
    return Attempts(made, Rotation(targets, clock, made.chance), timeout_s, clock)


def tried(attempts, *errors_met):
    """(target, wait) of each try that met one of the errors."""
    return [(attempts.begin()[0], attempts.wait_s(error)) for error in errors_met]


def test_backoff_doubles_up_to_its_limit_and_ends_with_the_retries():
    waits = tried(attempts_at("a", retries=6, max_wait_s=1.0), *[GONE] * 7)
    assert [wait_s for _, wait_s in waits] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None]


def test_chance_shortens_a_backoff_by_half_at_most_and_lengthens_what_the_service_says():
    assert tried(attempts_at("a", chance=0.5), GONE) == [("a", pytest.approx(0.075))]
    assert tried(attempts_at("a", chance=0.5), FULL) == [("a", 2.25)]


def test_the_service_is_never_asked_sooner_than_it_says():
    assert tried(attempts_at("a"), FULL, FULL) == [("a", 2.0), ("a", 2.0)]


def test_the_other_routers_are_asked_at_once_and_do_not_count():
    waits = tried(attempts_at("a", "b", "c", retries=1), *[GONE] * 6)
    assert waits == [("a", 0.0), ("b", 0.0), ("c", 0.1), ("a", 0.0), ("b", 0.0), ("c", None)]


def test_without_retries_the_other_routers_are_still_asked():
    assert tried(attempts_at("a", "b", retries=0), GONE, GONE) == [("a", 0.0), ("b", None)]


def test_a_wait_that_would_outlast_the_deadline_is_not_begun():
    assert tried(attempts_at("a", timeout_s=2.0), FULL) == [("a", None)]


def test_every_try_has_what_is_left_of_the_deadline():
    clock = FakeClock()
    attempts = attempts_at("a", timeout_s=10.0, clock=clock)
    assert attempts.begin() == ("a", 10.0)
    clock.advance(3.0)
    assert attempts.wait_s(GONE) == 0.1
    assert attempts.begin() == ("a", 7.0)


def test_no_other_router_is_asked_after_the_deadline():
    clock = FakeClock()
    attempts = attempts_at("a", "b", timeout_s=1.0, clock=clock)
    attempts.begin()
    clock.advance(1.0)
    assert attempts.wait_s(GONE) is None


def test_after_output_nothing_is_tried_again():
    attempts = attempts_at("a", "b")
    attempts.begin()
    assert attempts.wait_s(GONE, has_output=True) is None


@pytest.mark.parametrize("leaf", sorted(set(errors.PdserveError.__subclasses__()) - {errors.Unavailable}, key=str))
def test_no_other_error_is_tried_again_without_being_told_to(leaf):
    assert tried(attempts_at("a", "b"), leaf("no", retry_after_s=None)) == [("a", None)]


def test_a_request_id_that_the_router_still_holds_after_a_lost_call_is_waited_for():
    held = errors.AlreadyExists("in flight")
    assert tried(attempts_at("a"), GONE, held) == [("a", 0.1), ("a", 0.2)]
    assert tried(attempts_at("a"), held) == [("a", None)]


def test_routers_take_turns():
    rotation = Rotation("abc", FakeClock(), lambda: 0.0)
    assert [rotation.next() for _ in range(5)] == ["a", "b", "c", "a", "b"]


def test_clients_do_not_all_begin_with_the_first():
    chances = iter((0.0, 0.4, 0.99))
    assert [Rotation("abc", FakeClock(), chances.__next__).next() for _ in range(3)] == ["a", "b", "c"]


def test_who_could_not_serve_is_passed_over_for_a_while():
    clock = FakeClock()
    rotation = Rotation("ab", clock, lambda: 0.0)
    rotation.failed("a")
    assert [rotation.next() for _ in range(3)] == ["b", "b", "b"]
    clock.advance(AVOID_S)
    assert rotation.next() == "a"


def test_when_nobody_could_serve_all_take_turns_again():
    rotation = Rotation("ab", FakeClock(), lambda: 0.0)
    rotation.failed("a")
    rotation.failed("b")
    assert [rotation.next() for _ in range(3)] == ["a", "b", "a"]


def test_several_routers_are_a_list_or_one_text():
    assert targets_of("a:1, [::1]:2,a:1") == targets_of(["a:1", "[::1]:2"]) == ["a:1", "[::1]:2"]


@pytest.mark.parametrize("target", ["a", "a:1,", "http://a:1", "a:0", []])
def test_what_cannot_be_dialled_is_a_configuration_error(target):
    with pytest.raises(ConfigError, match="target"):
        targets_of(target)
