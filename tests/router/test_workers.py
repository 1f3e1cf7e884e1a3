"""What a router believes of a worker, from what the worker tells."""

import pytest

from common.load import Load
from router.workers import WorkerState
from tests.router.values import identity, worker

SERVING, DRAINING, UNREACHABLE = WorkerState.SERVING, WorkerState.DRAINING, WorkerState.UNREACHABLE


def _busy(step: int, **load: float) -> Load:
    return Load(step_counter=step, num_running=1, **load)


def test_a_worker_is_unreachable_until_it_is_met():
    one = worker(met=False)
    assert (one.state, one.reason) == (UNREACHABLE, "not met yet")


@pytest.mark.parametrize("state", [SERVING, DRAINING])
def test_a_worker_is_in_the_state_it_tells(state):
    one = worker()
    one.hear(state, Load(), 0, 0.0)
    assert one.state is state


def test_a_counter_that_stands_still_with_work_waiting_makes_it_unreachable():
    one = worker(wedged_after_s=10)
    one.hear(SERVING, _busy(step=7), 0, 0.0)
    one.hear(SERVING, _busy(step=7), 0, 9.0)
    assert one.state is SERVING
    one.hear(SERVING, _busy(step=7), 0, 10.0)
    assert one.state is UNREACHABLE
    assert "stood still for 10.0 s" in one.reason


def test_a_counter_may_stand_still_when_there_is_no_work():
    one = worker(wedged_after_s=10)
    one.hear(SERVING, Load(step_counter=7), 0, 0.0)
    one.hear(SERVING, Load(step_counter=7), 0, 100.0)
    assert one.state is SERVING


def test_long_steps_are_not_taken_for_a_wedge():
    one = worker(wedged_after_s=10)
    one.hear(SERVING, _busy(step=7, step_ms=2000.0), 0, 0.0)
    one.hear(SERVING, _busy(step=7, step_ms=2000.0), 0, 39.0)
    assert one.state is SERVING


def test_a_wedged_worker_is_serving_again_once_it_steps():
    one = worker(wedged_after_s=10)
    for now_s, step in [(0.0, 7), (10.0, 7), (11.0, 8)]:
        one.hear(SERVING, _busy(step=step), 0, now_s)
    assert one.state is SERVING


def test_who_has_work_there_is_told_of_a_loss_once():
    one, told = worker(), []
    with one.loss_told_to(told.append):
        one.lose("silence")
        one.lose("more silence")
    one.lose("nobody listens")
    assert [error.message for error in told] == [f"{one} was lost: silence"]


def test_a_restarted_worker_has_an_empty_prefix_cache():
    one = worker()
    one.prefixes.add([b"hash"])
    one.meet(identity(), 1.0)
    assert len(one.prefixes) == 1, "the same process, after a broken connection"
    one.meet(identity(boot_id="another"), 2.0)
    assert len(one.prefixes) == 0


def test_what_was_placed_counts_before_the_worker_tells_of_it():
    one = worker(load=Load(num_free_blocks=50, num_running=2))
    share = one.take(num_blocks=10)
    assert (one.num_seqs, one.num_free_blocks) == (2, 38)
    share.counted()
    one.hear(SERVING, Load(num_free_blocks=40, num_running=2, num_reserved=1), 0, 1.0)
    assert (one.num_seqs, one.num_free_blocks) == (3, 38), "counted once"


def test_a_burst_cannot_take_more_than_there_is_before_the_worker_tells():
    one = worker(identity(num_total_blocks=100), load=Load(num_free_blocks=100))
    shares = [one.take(num_blocks=30) for _ in range(3)]
    for share in shares:
        share.counted()
    assert (one.num_seqs, one.num_free_blocks) == (3, 10)


def test_a_share_ends_once():
    one = worker(load=Load(num_free_blocks=100))
    share = one.take(num_blocks=10, num_tokens=100)
    assert one.num_waiting_tokens == 100
    share.end()
    share.end()
    assert (one.num_seqs, one.num_free_blocks, one.num_waiting_tokens) == (0, 100, 0)
