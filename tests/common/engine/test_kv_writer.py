from __future__ import annotations

import contextlib

import pytest
import torch

from common.engine.kv_writer import KvWriter
from common.engine.streams import mark
from tests.common.transport.fakes import small_cache, until
from tests.support.device import needs_gpus

DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpus())]
# Long enough on a GPU that what does not wait for it is early.
BUSY_CYCLES = 200_000_000


def payload_of(cache, block_ids, value):
    payload = torch.full((len(block_ids) * cache.block_bytes,), value, dtype=torch.uint8)
    return payload.to(cache.device)


def is_filled(cache, block_id, value):
    return bool((cache.layers[0][block_id].view(torch.uint8) == value).all())


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_computed_after_a_join_sees_everything_written(device):
    cache = small_cache(device=device)
    writer = KvWriter(cache)
    writer.blocks_reserved()
    for block_id in range(4):
        writer.write(0, 1, [block_id], payload_of(cache, [block_id], block_id + 1))
    writer.join()
    assert all(is_filled(cache, block_id, block_id + 1) for block_id in range(4))


def test_on_a_cpu_nothing_reads_a_payload_after_write():
    cache = small_cache()
    assert KvWriter(cache).write(0, 1, [3], payload_of(cache, [3], 7)) is None
    assert is_filled(cache, 3, 7)


@pytest.fixture(params=[pytest.param("cuda:0", marks=needs_gpus())])
def gpu(request):
    return request.param


def test_steps_in_flight_end_before_their_blocks_are_written(gpu):
    cache = small_cache(device=gpu)
    writer = KvWriter(cache)
    payload = payload_of(cache, [2], 9)
    torch.cuda._sleep(BUSY_CYCLES)
    cache.layers[0][2].view(torch.uint8).fill_(1)
    writer.blocks_reserved()
    writer.write(0, 1, [2], payload)
    torch.cuda.synchronize()
    assert is_filled(cache, 2, 9)


@contextlib.contextmanager
def held_up(stream):
    """What the stream is given meanwhile does not begin before the end."""
    driver = pytest.importorskip("cuda.bindings.driver")
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    is_equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ.value
    (status,) = driver.cuStreamWaitValue32(driver.CUstream(stream.cuda_stream), flag.data_ptr(), 1, is_equal)
    assert status == 0, status
    try:
        yield
    finally:
        flag.fill_(1)
        # It reads the flag until it goes on.
        stream.synchronize()


def test_a_write_never_holds_up_what_is_computed_before_the_join(gpu):
    cache = small_cache(device=gpu)
    writer = KvWriter(cache)
    payload = payload_of(small_cache(), [1], 5).pin_memory()
    computed = torch.zeros(1, device=gpu)

    def write_and_compute():
        read = writer.write(0, 1, [1], payload)
        computed.add_(1)
        return read, mark(cache.device)

    # Allocates and loads what is needed, since the first time may wait for all that the device was given.
    write_and_compute()
    writer.join()
    cache.layers[0].zero_()
    torch.cuda.synchronize()
    with held_up(writer._stream):
        read, before_join = write_and_compute()
        until(before_join.query)
        assert not read.query()
        writer.join()
        after_join = mark(cache.device)
        assert not after_join.query()
    after_join.synchronize()
    assert read.query()
    assert is_filled(cache, 1, 5)


def test_blocks_pass_through_pinned_memory_bit_for_bit(gpu):
    source, target = small_cache(random=True, device=gpu), small_cache(device=gpu)
    pinned = torch.empty(3 * 3 * source.block_bytes, dtype=torch.uint8, pin_memory=True)
    payload = source.gather(0, 3, [9, 2, 5], pinned)
    writer = KvWriter(target)
    writer.write(0, 3, [1, 8, 4], payload)
    writer.join()
    for a, b in zip(source.layers, target.layers, strict=True):
        assert torch.equal(a[[9, 2, 5]], b[[1, 8, 4]])
