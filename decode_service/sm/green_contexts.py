"""Partitions from the CUDA driver: green contexts, through cuda-python.

    the device's SMs ──split by count──┬─▶ a group of n, rounded up by the driver ──▶ description ──▶ context ──▶ stream
                                       └─▶ the rest ────────────────────────────────▶ description ──▶ context ──▶ stream

The two are disjoint because both come from one split: two splits of the whole device may overlap. The driver does not
split a rest again, so a pair that leaves SMs idle is put together from groups of one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from decode_service.sm.partitions import DriverError, NoPartitions, SmGroup, State

# cuGreenCtxStreamCreate is of CUDA 12.5, the other calls are of 12.4.
MIN_CUDA_VERSION = 12050
# The driver would split older devices, but no kernel of ours runs on those.
MIN_CAPABILITY = (8, 0)


class GreenContextDriver:
    """The green contexts of one device. See `PartitionDriver`."""

    def __init__(self, device_index: int) -> None:
        """Starts the driver; creates nothing.

        Raises:
            NoPartitions: cuda-python, the driver or the device cannot split.
        """
        try:
            self._cuda: Any = import_module("cuda.bindings.driver")
        except ImportError as error:
            raise NoPartitions(State.NO_CUDA_PYTHON, f"cuda-python cannot be imported: {error}") from None
        self._sm_type = self._cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", device_index)
        except DriverError as error:
            raise NoPartitions(State.NO_GPU, str(error)) from None
        try:
            self._check_age()
            self._whole = self._call("cuDeviceGetDevResource", self._device, self._sm_type)
        except DriverError as error:
            raise NoPartitions(State.SPLIT_FAILED, str(error)) from None

    @property
    def num_sms(self) -> int:
        return self._whole.sm.smCount

    @property
    def version(self) -> str:
        return _dotted(self._call("cuDriverGetVersion"))

    def split(self, attention_sm: int, ffn_sm: int) -> tuple[SmGroup, SmGroup]:
        (group,), rest = self._groups(1, attention_sm)
        attention_resources: Sequence[Any] = [group]
        ffn_resources: Sequence[Any] = [rest]
        if rest.sm.smCount == 0:
            raise DriverError("cuDevSmResourceSplitByCount", f"nothing is left beside {attention_sm} SMs")
        if ffn_sm < rest.sm.smCount:
            size = math.gcd(attention_sm, ffn_sm)
            groups, _ = self._groups((attention_sm + ffn_sm) // size, size)
            of_attention = attention_sm // size
            attention_resources, ffn_resources = groups[:of_attention], groups[of_attention:]
        attention = self._context(attention_resources)
        try:
            return attention, self._context(ffn_resources)
        except DriverError:
            self.destroy(attention)
            raise

    def make_stream(self, group: SmGroup, priority: int) -> int:
        non_blocking = int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return int(self._call("cuGreenCtxStreamCreate", group.context, non_blocking, priority))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", self._cuda.CUstream(stream))

    def destroy(self, group: SmGroup) -> None:
        self._call("cuGreenCtxDestroy", group.context)

    def _groups(self, count: int, num_sms: int) -> tuple[Sequence[Any], Any]:
        """(so many groups of at least so many SMs, what the device has beside them)."""
        groups, num_groups, rest = self._call("cuDevSmResourceSplitByCount", count, self._whole, 0, num_sms)
        if num_groups != count:
            raise DriverError("cuDevSmResourceSplitByCount", f"{num_groups} instead of {count} groups of {num_sms} SMs")
        return groups, rest

    def _check_age(self) -> None:
        version = self._call("cuDriverGetVersion")
        if version < MIN_CUDA_VERSION:
            raise NoPartitions(State.DRIVER_TOO_OLD, f"the driver is for CUDA {_dotted(version)}, not 12.5 or later")
        attributes = self._cuda.CUdevice_attribute
        capability = (
            self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device),
            self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device),
        )
        if capability < MIN_CAPABILITY:
            raise NoPartitions(
                State.DEVICE_TOO_OLD, f"compute capability {capability[0]}.{capability[1]}, not 8.0 or later"
            )

    def _context(self, resources: Sequence[Any]) -> SmGroup:
        description = self._call("cuDevResourceGenerateDesc", list(resources), len(resources))
        # Older drivers take no other flag.
        flags = int(self._cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
        context = self._call("cuGreenCtxCreate", description, self._device, flags)
        try:
            granted = self._call("cuGreenCtxGetDevResource", context, self._sm_type)
        except DriverError:
            self._call("cuGreenCtxDestroy", context)
            raise
        return SmGroup(granted.sm.smCount, context)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the driver call returns beside its status: nothing, a value, or several."""
        try:
            status, *values = getattr(self._cuda, name)(*arguments)
        except RuntimeError as error:
            # cuda-python's own: there is no driver, or it has no such call.
            raise DriverError(name, str(error)) from None
        if status != 0:
            raise DriverError(name, getattr(status, "name", str(status)))
        return values[0] if len(values) == 1 else values


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
