"""Stands for the module `cuda.bindings.driver`: the calls that green contexts need, with their statuses."""

from __future__ import annotations

import enum
from types import SimpleNamespace


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 914


class Refused(Exception):
    """By the status that the call returns."""


def resource(num_sms):
    return SimpleNamespace(sm=SimpleNamespace(smCount=num_sms))


class FakeCudaDriver:
    """Handles are numbers. `fails_at` maps a call to the time, counted from 1, at which it fails."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUstream = int

    def __init__(self, num_sms=132):
        self.num_sms = num_sms
        self.version = 13000
        self.capability = (9, 0)
        self.fails_at = {}
        self.error = CUresult.CUDA_ERROR_OUT_OF_MEMORY
        # Raised by every call, as cuda-python does without a driver.
        self.raises = None
        self.contexts = {}
        self.streams = {}
        self._num_calls = {}
        self._num_handles = 0

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            if self.raises is not None:
                raise self.raises
            self._num_calls[name] = self._num_calls.get(name, 0) + 1
            if self.fails_at.get(name) == self._num_calls[name]:
                return (self.error,)
            try:
                return (CUresult.CUDA_SUCCESS, *getattr(self, f"_{name}")(*arguments))
            except Refused as refused:
                return refused.args

        return call

    def _cuInit(self, flags):
        return ()

    def _cuDriverGetVersion(self):
        return (self.version,)

    def _cuDeviceGet(self, index):
        return (index,)

    def _cuDeviceGetAttribute(self, attribute, device):
        return (self.capability[attribute - 75],)

    def _cuDeviceGetDevResource(self, device, kind):
        self.whole = resource(self.num_sms)
        return (self.whole,)

    def _cuDevSmResourceSplitByCount(self, num_groups, whole, flags, count):
        # Neither a group nor what a split left can be split again.
        if whole is not self.whole:
            raise Refused(CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
        granted = -(-count // 8) * 8
        groups = [resource(granted)] * min(num_groups, whole.sm.smCount // granted)
        rest = resource(whole.sm.smCount - sum(group.sm.smCount for group in groups))
        return groups, len(groups), rest

    def _cuDevResourceGenerateDesc(self, resources, count):
        return (resource(sum(one.sm.smCount for one in resources)),)

    def _cuGreenCtxCreate(self, description, device, flags):
        return (self._made(self.contexts, description),)

    def _cuGreenCtxGetDevResource(self, context, kind):
        return (self.contexts[context],)

    def _cuGreenCtxStreamCreate(self, context, flags, priority):
        return (self._made(self.streams, (context, flags, priority)),)

    def _cuStreamDestroy(self, stream):
        del self.streams[stream]
        return ()

    def _cuGreenCtxDestroy(self, context):
        del self.contexts[context]
        return ()

    def _made(self, living, value):
        self._num_handles += 1
        living[self._num_handles] = value
        return self._num_handles
