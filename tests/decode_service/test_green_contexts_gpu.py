"""Partitions of a real GPU: what the driver grants, and on which SMs kernels run."""

import pytest
import torch

from decode_service.sm.green_contexts import GreenContextDriver
from decode_service.sm.green_manager import GreenManager
from decode_service.sm.partition_streams import TorchStreams
from decode_service.sm.partitions import DriverError, State
from tests.support.device import needs_gpus

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

pytestmark = needs_gpus()

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def manager():
    with GreenManager.of(DEVICE) as manager:
        yield manager


@pytest.fixture
def num_sms(manager):
    return manager.num_sms


def allocate(manager, attention_sm):
    pair = manager.allocate(attention_sm, manager.num_sms - attention_sm)
    assert pair is not None, manager.stats()
    return pair


def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(DEVICE)[0]


@pytest.mark.parametrize("asked", [16, 24, 50, 64, 66])
def test_attention_is_granted_the_next_multiple_of_eight_and_the_ffn_the_rest(manager, num_sms, asked):
    pair = allocate(manager, asked)
    granted = -(-asked // 8) * 8
    assert (pair.attention_sm, pair.ffn_sm) == (granted, num_sms - granted)
    stats = manager.stats()
    assert (stats.attention_sm_asked, stats.attention_sm, stats.ffn_sm) == (asked, granted, num_sms - granted)
    assert (stats.state, stats.verified) == (State.READY, True)


def test_an_ffn_that_asks_for_fewer_gets_no_more(manager):
    pair = manager.allocate(16, 16)
    assert (pair.attention_sm, pair.ffn_sm) == (16, 16)
    seen = TorchStreams(DEVICE).launched(pair.attention, pair.ffn)
    assert not seen.attention & seen.ffn
    assert (len(seen.attention), len(seen.ffn)) == (16, 16)


def test_the_driver_rounds_up_what_is_no_multiple_of_eight():
    driver = GreenContextDriver(0)
    for asked in (66, 100):
        groups = driver.split(asked, driver.num_sms)
        assert [group.num_sms for group in groups] == [-(-asked // 8) * 8, driver.num_sms - -(-asked // 8) * 8]
        for group in groups:
            driver.destroy(group)


def test_kernels_of_every_pair_reach_all_their_sms_and_no_other(manager):
    streams = TorchStreams(DEVICE)
    for split in manager.splits:
        pair = allocate(manager, split)
        for seen in (streams.launched(pair.attention, pair.ffn), streams.replayed(pair.attention, pair.ffn)):
            assert not seen.attention & seen.ffn
            assert (len(seen.attention), len(seen.ffn)) == (pair.attention_sm, pair.ffn_sm)


def test_a_graph_runs_on_the_sms_that_launched_kernels_run_on(manager):
    streams, pair = TorchStreams(DEVICE), allocate(manager, 64)
    replayed = streams.replayed(pair.attention, pair.ffn)
    assert replayed == streams.launched(pair.attention, pair.ffn)


def test_a_captured_kernel_belongs_to_the_context_of_its_stream(manager):
    cuda = pytest.importorskip("cuda.bindings.driver")
    pair = allocate(manager, 64)
    x = torch.zeros(2, 1024, device=DEVICE)
    x += 1
    capturing = torch.cuda.Stream(DEVICE)
    capturing.wait_stream(torch.cuda.current_stream(DEVICE))
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=capturing, capture_error_mode="thread_local"):
        for stream, part in zip((pair.attention, pair.ffn), x, strict=True):
            stream.wait_stream(capturing)
            with torch.cuda.stream(stream):
                part += 1
            capturing.wait_stream(stream)

    def called(result):
        status, *values = result
        assert status == 0, status
        return values

    handle = cuda.CUgraph(graph.raw_cuda_graph())
    count = called(cuda.cuGraphGetNodes(handle))[1]
    nodes = called(cuda.cuGraphGetNodes(handle, count))[0][:count]
    kernel = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    kernels = [node for node in nodes if called(cuda.cuGraphNodeGetType(node))[0] == kernel]
    contexts = [int(called(cuda.cuGraphKernelNodeGetParams(node))[0].ctx) for node in kernels]
    assert len(kernels) == len(set(contexts)) == 2
    assert set(contexts).isdisjoint({0, int(called(cuda.cuCtxGetCurrent())[0])})


def test_pytorch_computes_on_both_streams(manager):
    pair = allocate(manager, 64)
    left, right = torch.randn(2, 512, 512, device=DEVICE, dtype=torch.bfloat16)
    expected = left @ right
    for stream in (pair.attention, pair.ffn):
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(stream):
            product = left @ right
        stream.synchronize()
        assert torch.allclose(product, expected, rtol=2e-2, atol=0.5)


def test_two_plain_streams_have_all_sms(manager, num_sms):
    pair = manager.allocate(num_sms, num_sms)
    assert (pair.partitioned, pair.attention_sm, pair.ffn_sm) == (False, num_sms, num_sms)
    assert pair.attention.cuda_stream != pair.ffn.cuda_stream
    seen = TorchStreams(DEVICE).launched(pair.attention, pair.ffn)
    assert len(seen.attention | seen.ffn) == num_sms
    assert manager.stats().state is State.READY


def test_two_hundred_rebalances_take_no_device_memory(manager, num_sms):
    def rebalance(times):
        for turn in range(times):
            split = manager.splits[turn % len(manager.splits)]
            pair = manager.rebalance(split, num_sms - split)
            for stream in (pair.attention, pair.ffn):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(1000)

    # The first round builds every pair, and loads the kernel.
    rebalance(len(manager.splits))
    before, num_before = free_bytes(), manager.stats().num_rebalances
    rebalance(200)
    assert free_bytes() >= before
    stats = manager.stats()
    assert (stats.num_pairs, stats.num_rebalances - num_before) == (len(manager.splits), 200)


def test_a_rebalance_waits_for_the_pair_it_leaves(manager, num_sms):
    pair = allocate(manager, 16)
    with torch.cuda.stream(pair.ffn):
        torch.cuda._sleep(200_000_000)
    assert not pair.ffn.query()
    manager.rebalance(64, num_sms - 64)
    assert pair.ffn.query()


def test_after_a_teardown_everything_can_be_made_again(manager):
    streams = TorchStreams(DEVICE)
    for _ in range(3):
        with GreenManager.of(DEVICE) as again:
            pair = allocate(again, 32)
            seen = streams.launched(pair.attention, pair.ffn)
            assert (len(seen.attention), len(seen.ffn)) == (pair.attention_sm, pair.ffn_sm)
        assert (again.stats().state, again.stats().num_leaked) == (State.CLOSED, 0)
    # Of another manager, which lives on.
    assert allocate(manager, 32).attention_sm == 32


def test_teardown_waits_for_work_that_is_under_way():
    done = torch.zeros(2, device=DEVICE)
    with GreenManager.of(DEVICE) as manager:
        pair = allocate(manager, 64)
        torch.cuda.synchronize()
        for index, stream in enumerate((pair.attention, pair.ffn)):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)
                done[index] = 1
    assert done.tolist() == [1, 1]


def test_priorities_are_those_that_were_asked():
    cuda = pytest.importorskip("cuda.bindings.driver")
    with GreenManager.of(DEVICE, attention_priority=-1, ffn_priority=0) as manager:
        pair = allocate(manager, 64)
        found = [
            cuda.cuStreamGetPriority(cuda.CUstream(stream.cuda_stream))[1] for stream in (pair.attention, pair.ffn)
        ]
    assert found == [-1, 0]


def test_a_split_of_more_than_there_is_names_the_call():
    driver = GreenContextDriver(0)
    with pytest.raises(DriverError, match=r"^cuDevSmResourceSplitByCount: "):
        driver.split(driver.num_sms, 16)
