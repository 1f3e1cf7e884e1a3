import logging

import pytest
import torch

from decode_service.sm.green_manager import GreenManager
from decode_service.sm.partition_check import why_no_partitions
from decode_service.sm.partition_streams import SmIds
from decode_service.sm.partitions import NoPartitions, State
from tests.fakes.gpu import FakeGpu


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def manager(gpu):
    return GreenManager(gpu, gpu)


def granted(manager):
    stats = manager.stats()
    return stats.attention_sm, stats.ffn_sm


def test_before_anything_is_asked_nothing_is_built(gpu, manager):
    stats = manager.stats()
    assert (stats.state, stats.reason, stats.remedy) == (State.UNUSED, "", "")
    assert (stats.num_pairs, stats.verified, granted(manager)) == (0, False, (0, 0))
    assert manager.current is None
    assert gpu.events == []


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((16, 116), (16, 116)),
        ((64, 68), (64, 68)),
        ((66, 66), (72, 60)),
        ((124, 8), (112, 20)),
        ((16, 16), (16, 16)),
        ((1, 1), (16, 16)),
        ((40, 50), (40, 56)),
        ((40, 90), (40, 92)),
    ],
)
def test_asked_and_granted_are_both_shown(manager, asked, given):
    pair = manager.allocate(*asked)
    stats = manager.stats()
    assert (stats.attention_sm_asked, stats.ffn_sm_asked) == asked
    assert granted(manager) == given == (pair.attention_sm, pair.ffn_sm)
    assert (stats.state, stats.verified, pair.partitioned) == (State.READY, True, True)


def test_a_grant_other_than_asked_is_what_counts(gpu, manager):
    gpu.grant = 48
    pair = manager.allocate(32, 100)
    assert (pair.attention_sm, pair.ffn_sm) == granted(manager) == (48, 84)


def test_the_two_sides_run_on_sms_of_their_own(manager):
    pair = manager.allocate(64, 68)
    assert not pair.attention.sm_ids & pair.ffn.sm_ids
    assert (len(pair.attention.sm_ids), len(pair.ffn.sm_ids)) == (64, 68)


def test_splits_are_all_that_leave_either_side_enough(manager):
    assert manager.splits == (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112)
    assert GreenManager(FakeGpu(32), FakeGpu(32)).splits == (16,)


def test_a_pair_is_built_once_and_kept(gpu, manager):
    pairs = {manager.allocate(asked, 16) for asked in range(1, 117)}
    assert len(pairs) == manager.stats().num_pairs == len(manager.splits)
    built = list(gpu.events)
    for asked in range(116, 0, -1):
        assert manager.rebalance(asked, 16) in pairs
    assert [event for event in gpu.events if not event.startswith("wait")] == built


def test_all_sms_for_both_are_two_plain_streams(gpu, manager):
    pair = manager.allocate(132, 132)
    assert (pair.partitioned, granted(manager)) == (False, (132, 132))
    assert (manager.stats().state, manager.stats().verified, manager.stats().num_pairs) == (State.READY, False, 1)
    assert gpu.events == []


def test_each_side_has_its_priority(gpu):
    manager = GreenManager(gpu, gpu, attention_priority=-5, ffn_priority=-1)
    manager.allocate(16, 116)
    assert [event.partition("with ")[2] for event in gpu.events[1:]] == ["priority -5", "priority -1"]
    assert manager.allocate(132, 132).attention.name == "a plain stream with priority -5"


def test_the_first_pair_is_current_and_others_wait_for_a_rebalance(manager):
    first, second = manager.allocate(16, 116), manager.allocate(64, 68)
    assert manager.current is first
    assert granted(manager) == (16, 116)
    assert manager.rebalance(64, 68) is manager.current is second
    assert (granted(manager), manager.stats().num_rebalances) == ((64, 68), 1)


def test_a_rebalance_waits_for_both_streams_it_leaves(gpu, manager):
    left = manager.allocate(16, 116)
    manager.allocate(64, 68)
    gpu.events.clear()
    manager.rebalance(64, 68)
    assert gpu.events == [f"wait for {left.attention.name}", f"wait for {left.ffn.name}"]


def test_a_rebalance_to_the_same_pair_does_nothing(gpu, manager):
    manager.allocate(66, 60)
    gpu.events.clear()
    assert manager.rebalance(72, 60) is manager.current
    assert (gpu.events, manager.stats().num_rebalances) == ([], 0)
    assert manager.stats().attention_sm_asked == 72


def test_the_first_rebalance_may_do_without_an_allocation(manager):
    assert manager.rebalance(16, 116) is manager.current is not None
    assert manager.stats().num_rebalances == 0


@pytest.mark.parametrize(("asked", "num_sms"), [((100, 100), 132), ((132, 16), 132), ((8, 8), 24)])
def test_more_sms_than_there_are_is_a_state(asked, num_sms):
    gpu = FakeGpu(num_sms)
    manager = GreenManager(gpu, gpu)
    assert manager.allocate(*asked) is None
    stats = manager.stats()
    assert stats.state is State.TOO_FEW_SMS
    assert str(num_sms) in stats.reason
    assert stats.remedy


@pytest.mark.parametrize(
    "state", [State.NO_CUDA_PYTHON, State.DRIVER_TOO_OLD, State.DEVICE_TOO_OLD, State.SPLIT_FAILED]
)
def test_without_support_there_are_plain_streams_and_a_reason(gpu, state):
    manager = GreenManager(NoPartitions(state, "so it is"), gpu)
    assert (manager.stats().state, manager.stats().reason) == (state, "so it is")
    assert manager.allocate(16, 116) is manager.current is None
    assert manager.splits == ()
    assert manager.rebalance(132, 132).partitioned is False
    assert manager.stats().state is State.READY
    assert manager.rebalance(16, 116) is None
    assert (manager.stats().state, granted(manager)) == (state, (132, 132))
    manager.close()


def test_without_a_gpu_there_is_nothing_but_the_reason():
    with GreenManager.of(torch.device("cpu")) as manager:
        assert manager.allocate(16, 16) is manager.rebalance(1000, 1000) is None
        assert (manager.stats().state, manager.stats().attention_sm_asked) == (State.NO_GPU, 1000)
        assert (manager.num_sms, manager.splits) == (0, ())


def test_a_split_that_fails_names_the_call_and_leaves_the_present_pair(gpu, manager, caplog):
    present = manager.allocate(16, 116)
    gpu.split_fails_at = (2, 3)
    for _ in range(2):
        assert manager.rebalance(64, 68) is None
    stats = manager.stats()
    assert (stats.state, manager.current, granted(manager)) == (State.SPLIT_FAILED, present, (16, 116))
    assert (stats.attention_sm_asked, stats.num_pairs) == (64, 1)
    assert stats.reason == "cuGreenCtxCreate: CUDA_ERROR_OUT_OF_MEMORY, for 64 + 68 of 132 SMs"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert manager.rebalance(64, 68) is not None
    assert (manager.stats().state, manager.stats().reason) == (State.READY, "")


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_stream_that_cannot_be_made_gives_back_its_split(gpu, manager, fails_at):
    gpu.stream_fails_at = (fails_at,)
    assert manager.allocate(16, 116) is None
    assert manager.stats().state is State.STREAM_FAILED
    assert "cuGreenCtxStreamCreate" in manager.stats().reason
    assert (gpu.contexts, gpu.streams, manager.stats().num_pairs) == ({}, {}, 0)
    assert manager.allocate(16, 116) is not None


def test_partitions_that_overlap_are_not_used(gpu, manager):
    gpu.num_shared = 2
    assert manager.allocate(16, 116) is manager.current is None
    stats = manager.stats()
    assert (stats.state, stats.verified) == (State.VERIFICATION_FAILED, False)
    assert stats.reason == "16 and 118 SMs were granted of 132"


def test_a_graph_that_forgets_its_partitions_is_found_out(gpu, manager):
    gpu.graphs_forget = True
    assert manager.allocate(16, 116) is None
    assert manager.stats().state is State.VERIFICATION_FAILED
    assert manager.stats().reason.startswith("kernels of both partitions ran on SMs 0, 1, 2")


def test_a_check_that_cannot_be_made_has_failed(gpu, manager):
    gpu.check_error = ModuleNotFoundError("No module named 'triton'\nand more")
    assert manager.allocate(16, 116) is None
    assert manager.stats().state is State.VERIFICATION_FAILED
    assert manager.stats().reason == "the check could not be made: ModuleNotFoundError: No module named 'triton'"


def test_a_pair_that_failed_its_check_is_not_built_again(gpu, manager):
    gpu.graphs_forget = True
    manager.allocate(16, 116)
    gpu.graphs_forget = False
    assert manager.allocate(16, 116) is None
    assert gpu.events.count("split 16:116") == 1
    assert manager.allocate(24, 108) is not None
    manager.close()
    assert (gpu.contexts, gpu.streams) == ({}, {})


def test_teardown_waits_then_destroys_streams_then_contexts(gpu, manager):
    manager.allocate(16, 116)
    gpu.events.clear()
    manager.close()
    verbs = [event.rpartition(" ")[0] for event in gpu.events]
    assert verbs == 2 * ["wait for stream"] + 2 * ["destroy stream"] + 2 * ["destroy context"]


def test_teardown_takes_every_pair_and_can_be_repeated(gpu):
    with GreenManager(gpu, gpu) as manager:
        for split in manager.splits:
            manager.allocate(split, 1)
        manager.allocate(132, 132)
    assert (gpu.contexts, gpu.streams, manager.current) == ({}, {}, None)
    gpu.events.clear()
    manager.close()
    assert gpu.events == []
    assert manager.allocate(16, 116) is manager.rebalance(132, 132) is None
    assert (manager.stats().state, granted(manager), manager.stats().num_pairs) == (State.CLOSED, (0, 0), 0)


@pytest.mark.parametrize("fault", ["destroy_fails", "work_fails"])
def test_teardown_goes_on_where_one_step_fails(gpu, manager, fault):
    manager.allocate(16, 116)
    setattr(gpu, fault, True)
    manager.close()
    assert manager.stats().num_leaked == len(gpu.contexts) + len(gpu.streams) == (4 if fault == "destroy_fails" else 0)


def test_after_a_teardown_another_manager_can_start(gpu, manager):
    manager.allocate(64, 68)
    manager.close()
    again = GreenManager(gpu, gpu)
    assert again.allocate(64, 68) is not None
    assert again.stats().state is State.READY


def test_every_trouble_has_a_remedy():
    fine = {State.UNUSED, State.READY, State.CLOSED}
    assert {state for state in State if not state.remedy} == fine


SMALL, REST = frozenset({0, 1}), frozenset({2, 3, 4})


@pytest.mark.parametrize(
    ("seen", "fault"),
    [
        ([SmIds(SMALL, REST), SmIds(SMALL, REST)], ""),
        ([SmIds(frozenset({0}), REST), SmIds(frozenset({1}), REST)], ""),
        ([SmIds(SMALL, REST), SmIds(SMALL, REST | {1})], "kernels of both partitions ran on SMs 1"),
        ([SmIds(SMALL, REST), SmIds(frozenset({7}), REST)], "kernels of the attention partition ran on 3 SMs"),
        ([SmIds(SMALL, frozenset())], "kernels of the FFN partition ran on 0 SMs"),
    ],
)
def test_the_check_compares_all_ways_of_launching(seen, fault):
    found = why_no_partitions(5, 2, 3, seen)
    assert found.startswith(fault) if fault else not found
