"""What the driver is asked, and what is made of its answers. The real one: `test_green_contexts_gpu.py`."""

import sys

import pytest

from decode_service.sm.green_contexts import GreenContextDriver
from decode_service.sm.partitions import DriverError, NoPartitions, State
from tests.fakes.cuda_driver import CUresult, FakeCudaDriver


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCudaDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    return fake


def why_not():
    with pytest.raises(NoPartitions) as caught:
        GreenContextDriver(0)
    return caught.value


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ((16, 116), (16, 116)),
        ((66, 66), (72, 60)),
        ((124, 4), (128, 4)),
        ((16, 16), (16, 16)),
        ((40, 56), (40, 56)),
        ((16, 24), (16, 24)),
    ],
)
def test_what_the_driver_granted_is_returned(cuda, asked, granted):
    driver = GreenContextDriver(0)
    assert driver.num_sms == 132
    assert tuple(group.num_sms for group in driver.split(*asked)) == granted


def test_streams_belong_to_their_group_and_never_wait_for_the_default_stream(cuda):
    driver = GreenContextDriver(0)
    attention, ffn = driver.split(16, 116)
    handles = driver.make_stream(attention, -3), driver.make_stream(ffn, 0)
    assert [cuda.streams[handle] for handle in handles] == [(attention.context, 1, -3), (ffn.context, 1, 0)]


def test_everything_is_given_back(cuda):
    driver = GreenContextDriver(0)
    attention, ffn = driver.split(16, 116)
    driver.destroy_stream(driver.make_stream(attention, 0))
    driver.destroy(attention)
    driver.destroy(ffn)
    assert (cuda.streams, cuda.contexts) == ({}, {})


@pytest.mark.parametrize(
    ("call", "time"),
    [
        ("cuDevSmResourceSplitByCount", 1),
        ("cuDevResourceGenerateDesc", 2),
        ("cuGreenCtxCreate", 1),
        ("cuGreenCtxCreate", 2),
        ("cuGreenCtxGetDevResource", 1),
        ("cuGreenCtxGetDevResource", 2),
    ],
)
def test_a_split_that_fails_names_the_call_and_leaves_no_context(cuda, call, time):
    cuda.fails_at = {call: time}
    with pytest.raises(DriverError, match=f"^{call}: CUDA_ERROR_OUT_OF_MEMORY$"):
        GreenContextDriver(0).split(16, 116)
    assert cuda.contexts == {}


@pytest.mark.parametrize("count", [128, 136])
def test_a_split_that_leaves_one_side_without_sms_fails(cuda, count):
    cuda.num_sms = 128
    with pytest.raises(DriverError, match=r"^cuDevSmResourceSplitByCount: "):
        GreenContextDriver(0).split(count, 1)


def test_a_machine_without_cuda_python_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert why_not().state is State.NO_CUDA_PYTHON
    assert "pip install" in why_not().state.remedy


def test_a_machine_without_a_driver_has_no_gpu(cuda):
    cuda.raises = RuntimeError("Failed to dlopen libcuda.so.1")
    assert (why_not().state, why_not().reason) == (State.NO_GPU, "cuInit: Failed to dlopen libcuda.so.1")


def test_a_driver_that_sees_no_device_has_no_gpu(cuda):
    cuda.fails_at, cuda.error = {"cuInit": 1}, CUresult.CUDA_ERROR_NO_DEVICE
    assert (why_not().state) is State.NO_GPU


def test_a_driver_before_cuda_12_5_is_too_old(cuda):
    cuda.version = 12040
    assert (why_not().state, why_not().reason) == (
        State.DRIVER_TOO_OLD,
        "the driver is for CUDA 12.4, not 12.5 or later",
    )


def test_a_gpu_before_ampere_is_too_old(cuda):
    cuda.capability = (7, 5)
    assert (why_not().state, why_not().reason) == (State.DEVICE_TOO_OLD, "compute capability 7.5, not 8.0 or later")


def test_a_device_that_does_not_say_what_it_has_cannot_be_split(cuda):
    cuda.fails_at = {"cuDeviceGetDevResource": 1}
    assert why_not().state is State.SPLIT_FAILED
