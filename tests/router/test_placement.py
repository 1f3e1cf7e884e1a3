"""Where requests go, and why."""

import random

import pytest

from common.load import Load, PressureReason
from router.placement import DecodeTerms, Demand, PrefillTerms, choose_decode, choose_prefill, remember
from router.ranking import Ranking
from router.workers import PACE_FORGOTTEN_S, Role, Worker, WorkerState
from tests.router.values import identity, worker

KIND = identity().kind
IDLE = Load(num_free_blocks=100)
PROMPT = list(range(64))


def _decode(address: str, load: Load = IDLE, **changes: object) -> Worker:
    return worker(identity(**changes), address=address, load=load)


def _prefill(address: str, num_waiting_tokens: int = 0, **changes: object) -> Worker:
    load = Load(num_waiting_tokens=num_waiting_tokens)
    return worker(identity(**changes), role=Role.PREFILL, address=address, load=load)


def _chosen_decode(workers: list[Worker], demand: Demand | None = None, **options: object) -> str | None:
    terms = DecodeTerms(**{"prefill_kinds": {KIND}, **options})
    choice = choose_decode(Ranking(workers), demand or Demand(PROMPT), terms)
    return choice.worker.address if choice else None


def _chosen_prefill(workers: list[Worker], demand: Demand | None = None, **options: object) -> str | None:
    choice = choose_prefill(Ranking(workers), demand or Demand(PROMPT), PrefillTerms(KIND, **options))
    return choice.worker.address if choice else None


def test_the_emptier_decode_worker_gets_the_request():
    assert _chosen_decode([_decode("a", Load(num_free_blocks=50)), _decode("b", Load(num_free_blocks=90))]) == "b"
    assert _chosen_decode([_decode("a", IDLE._replace(num_running=5)), _decode("b", IDLE)]) == "b"


def test_equal_workers_are_taken_by_address():
    assert _chosen_decode([_decode("b"), _decode("a")]) == "a"
    assert _chosen_prefill([_prefill("b"), _prefill("a")]) == "a"


def test_a_prompt_goes_back_to_where_its_prefix_was_sent():
    workers, demand = [_decode("a"), _decode("b", Load(num_free_blocks=95))], Demand(PROMPT)
    workers[1].prefixes.add(demand.hashes(workers[1].identity))
    assert _chosen_decode(workers, demand) == "b"


def test_a_prefix_is_not_worth_a_full_worker():
    workers, demand = [_decode("a"), _decode("b", Load(num_free_blocks=40))], Demand(PROMPT)
    workers[1].prefixes.add(demand.hashes(workers[1].identity))
    assert _chosen_decode(workers, demand) == "a"


def test_a_prefix_of_another_salt_is_another_prefix():
    workers = [_decode("a"), _decode("b", Load(num_free_blocks=95))]
    workers[1].prefixes.add(Demand(PROMPT, cache_salt="x").hashes(workers[1].identity))
    assert _chosen_decode(workers, Demand(PROMPT)) == "a"


def test_placing_a_request_is_remembered():
    workers, demand = [_decode("a"), _decode("b")], Demand(PROMPT)
    remember(choose_decode(Ranking(workers), demand, DecodeTerms({KIND})), demand)
    assert (len(workers[0].prefixes), len(workers[1].prefixes)) == (4, 0)


def test_requests_wait_while_no_decode_worker_has_blocks():
    workers = [_decode("a", Load(num_free_blocks=4, num_running=1))]
    assert _chosen_decode(workers) is None
    assert _chosen_decode(workers, only_with_room=False) == "a"


def test_requests_wait_while_every_slot_is_taken():
    assert _chosen_decode([_decode("a", IDLE._replace(num_running=8), max_num_seqs=8)]) is None


def test_requests_do_not_queue_behind_what_waits_at_decode():
    assert _chosen_decode([_decode("a", IDLE._replace(num_running=1, num_waiting=1))]) is None


def test_an_idle_worker_is_asked_whatever_it_told():
    assert _chosen_decode([_decode("a", Load(num_free_blocks=0))]) == "a"


def test_workers_under_pressure_get_nothing_new():
    pressed = IDLE._replace(pressure=(PressureReason.FEW_FREE_BLOCKS,))
    workers = [_decode("a", pressed), _decode("b", Load(num_free_blocks=50, num_running=5))]
    assert _chosen_decode(workers) == "b"
    assert _chosen_decode(workers[:1]) is None
    assert _chosen_decode(workers[:1], heed_pressure=False) == "a"


def test_pressure_does_not_send_requests_where_no_prefill_worker_serves():
    pressed = _decode("a", IDLE._replace(pressure=(PressureReason.SLOW_STEPS,)))
    assert _chosen_decode([pressed, _decode("b", model_fingerprint="without prefill")]) is None


def test_a_request_that_would_put_a_worker_under_pressure_waits():
    load = Load(num_free_blocks=36, num_running=1)
    assert _chosen_decode([_decode("a", load, num_spare_blocks=30)]) == "a"
    assert _chosen_decode([_decode("a", load, num_spare_blocks=31)]) is None
    assert _chosen_decode([_decode("a", load, num_spare_blocks=31)], heed_pressure=False) == "a"


def test_an_idle_worker_need_not_keep_blocks_free():
    assert _chosen_decode([_decode("a", IDLE, num_spare_blocks=100)]) == "a"


def test_only_serving_workers_are_considered():
    workers = [_decode("a"), _decode("b"), _decode("c")]
    workers[0].lose("silence")
    workers[1].hear(WorkerState.DRAINING, IDLE, 0, 0.0)
    assert _chosen_decode(workers) == "c"


def test_an_excluded_worker_is_not_considered():
    workers = [_decode("a"), _decode("b")]
    assert _chosen_decode(workers, exclude=[workers[0]]) == "b"
    assert _chosen_decode(workers, exclude=workers) is None


@pytest.mark.promise(14)
def test_workers_of_another_fingerprint_are_never_mixed():
    other = _prefill("a", model_fingerprint="other")
    assert _chosen_prefill([other, _prefill("b", 10_000)]) == "b"
    assert _chosen_prefill([other]) is None
    assert _chosen_decode([_decode("a", model_fingerprint="other")], Demand(PROMPT, kind=KIND)) is None


def test_a_decode_worker_that_prefill_can_serve_comes_first():
    workers = [_decode("a", model_fingerprint="other"), _decode("b", Load(num_free_blocks=10))]
    assert _chosen_decode(workers) == "b"
    assert _chosen_decode(workers, prefill_kinds=set()) == "a"


def test_the_prefill_worker_with_the_least_to_compute_gets_the_prompt():
    assert _chosen_prefill([_prefill("a", 100), _prefill("b", 30)]) == "b"


def test_cached_tokens_need_not_be_computed():
    workers, demand = [_prefill("a", 40), _prefill("b", 0)], Demand(PROMPT)
    workers[0].prefixes.add(demand.hashes(workers[0].identity))
    assert _chosen_prefill(workers, demand) == "a"


def test_a_prefill_worker_that_failed_is_taken_only_when_there_is_no_other():
    workers = [_prefill("a"), _prefill("b", 500)]
    assert _chosen_prefill(workers, avoid=workers[:1]) == "b"
    assert _chosen_prefill(workers[:1], avoid=workers[:1]) == "a"


def _stepping(address: str, step_ms: float, num_running: int = 1) -> Worker:
    """A decode worker that has shown what its steps take."""
    one = _decode(address, IDLE._replace(num_running=num_running))
    one.hear(WorkerState.SERVING, one.load._replace(step_counter=1, step_ms=step_ms), 0, 0.0)
    return one


def _computing(address: str, token_ms: float, num_waiting_tokens: int = 0) -> Worker:
    load = Load(token_ms=token_ms, num_waiting_tokens=num_waiting_tokens)
    return worker(role=Role.PREFILL, address=address, load=load)


def test_the_quicker_of_two_decode_workers_gets_the_request():
    assert _chosen_decode([_stepping("a", 20.0), _stepping("b", 10.0)]) == "b"


def test_the_slower_decode_worker_gets_requests_once_the_quicker_one_is_fuller():
    assert _chosen_decode([_stepping("a", 11.0), _stepping("b", 10.0, num_running=40)]) == "a"


def test_a_step_is_expected_to_take_what_a_larger_batch_takes():
    one = _stepping("a", 10.0, num_running=10)
    one.hear(WorkerState.SERVING, one.load._replace(step_counter=2, step_ms=20.0, num_running=20), 0, 0.0)
    assert one.pace == pytest.approx(21.0)


def test_a_prompt_goes_where_it_is_done_first_and_not_where_the_fewest_tokens_wait():
    assert _chosen_prefill([_computing("a", 2.0, 100), _computing("b", 0.5, 300)]) == "b"


def test_a_worker_of_unknown_pace_is_tried():
    assert _chosen_prefill([_computing("a", 2.0), _computing("b", 1.0, 10), _computing("c", 0.0, 5)]) == "c"
    assert _chosen_decode([_stepping("a", 10.0), _decode("b")]) == "b"


def test_a_pace_of_long_ago_counts_no_more():
    slow = _stepping("a", 100.0)
    slow.hear(WorkerState.SERVING, IDLE, 0, PACE_FORGOTTEN_S - 1)
    assert _chosen_decode([slow, _stepping("b", 10.0)]) == "b"
    slow.hear(WorkerState.SERVING, IDLE, 0, PACE_FORGOTTEN_S)
    assert _chosen_decode([slow, _stepping("b", 10.0)]) == "a"


def test_another_process_at_the_address_has_a_pace_of_its_own():
    one = _stepping("a", 100.0)
    one.meet(identity(boot_id="another"), 0.0)
    assert one.pace == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_order_that_is_kept_finds_what_looking_at_everybody_finds(seed):
    draw = random.Random(seed)
    workers = [_computing(f"{n:03}", draw.choice([0.0, 0.5, 1.0, 2.0]), draw.randrange(2000)) for n in range(200)]
    ranking, demand = Ranking(workers), Demand(PROMPT)
    for one in draw.sample(workers, 100):
        one.hear(draw.choice(list(WorkerState)[:2]), one.load._replace(num_waiting_tokens=draw.randrange(2000)), 0, 1.0)
    for one in draw.sample(workers, 3):
        one.prefixes.add(demand.hashes(one.cut)[: draw.randrange(1, 5)])
    costs = [
        ((one.pace or 0.5) * (one.work + len(PROMPT) - 16 * demand.num_cached_blocks(one)), one.address)
        for one in workers
        if one.is_serving
    ]
    choice = choose_prefill(ranking, demand, PrefillTerms(KIND))
    assert (choice.cost, choice.worker.address) == min(costs)


def test_a_worker_that_has_left_the_ranking_is_not_found():
    workers = [_decode("a"), _decode("b")]
    ranking = Ranking(workers)
    ranking.remove(workers[0])
    workers[0].hear(WorkerState.SERVING, IDLE, 0, 1.0)
    assert choose_decode(ranking, Demand(PROMPT), DecodeTerms({KIND})).worker is workers[1]
