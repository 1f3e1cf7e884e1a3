"""A GPU that can be split in two: the driver's side and PyTorch's side of partitions, with faults."""

from __future__ import annotations

import itertools

from decode_service.sm.partition_streams import SmIds
from decode_service.sm.partitions import DriverError, SmGroup


class FakeStream:
    def __init__(self, gpu, name, sm_ids):
        self.gpu = gpu
        self.name = name
        self.sm_ids = frozenset(sm_ids)

    def synchronize(self):
        self.gpu.events.append(f"wait for {self.name}")
        if self.gpu.work_fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeGpu:
    """Stands for both `PartitionDriver` and `SmStreams`. Faults are attributes, to be set at any time.

    Grants round up to a multiple of 8. `events` holds what was done that changes something, or waits.
    """

    def __init__(self, num_sms=132):
        self.num_sms = num_sms
        self.version = "13.0"
        self.events = []
        # Of contexts and streams that live; the SMs of each.
        self.contexts = {}
        self.streams = {}
        # Calls, counted from 1, that fail.
        self.split_fails_at = ()
        self.stream_fails_at = ()
        self.destroy_fails = False
        self.work_fails = False
        # What attention is granted, whatever was asked.
        self.grant = None
        # SMs of the first group that the second has as well.
        self.num_shared = 0
        # Replayed kernels run on all SMs.
        self.graphs_forget = False
        # Raised by the check.
        self.check_error = None
        self._splits, self._made, self._ids = itertools.count(1), itertools.count(1), itertools.count(1)

    def split(self, attention_sm, ffn_sm):
        if next(self._splits) in self.split_fails_at:
            raise DriverError("cuGreenCtxCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        granted = self.grant or -(-attention_sm // 8) * 8
        ffn = min(-(-ffn_sm // 8) * 8, self.num_sms - granted)
        if self.num_sms - granted - ffn < 8:
            ffn = self.num_sms - granted
        self.events.append(f"split {granted}:{ffn}")
        return self._group(range(granted)), self._group(range(granted - self.num_shared, granted + ffn))

    def make_stream(self, group, priority):
        if next(self._made) in self.stream_fails_at:
            raise DriverError("cuGreenCtxStreamCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        handle = next(self._ids)
        self.streams[handle] = self.contexts[group.context]
        self.events.append(f"stream {handle} with priority {priority}")
        return handle

    def destroy_stream(self, stream):
        self._destroy("stream", self.streams, stream)

    def destroy(self, group):
        self._destroy("context", self.contexts, group.context)

    def plain(self, priority):
        return FakeStream(self, f"a plain stream with priority {priority}", range(self.num_sms))

    def adopt(self, handle):
        return FakeStream(self, f"stream {handle}", self.streams[handle])

    def launched(self, attention, ffn):
        if self.check_error is not None:
            raise self.check_error
        return SmIds(attention.sm_ids, ffn.sm_ids)

    def replayed(self, attention, ffn):
        everywhere = frozenset(range(self.num_sms))
        return SmIds(everywhere, everywhere) if self.graphs_forget else SmIds(attention.sm_ids, ffn.sm_ids)

    def _group(self, sm_ids):
        context = next(self._ids)
        self.contexts[context] = sm_ids
        return SmGroup(len(sm_ids), context)

    def _destroy(self, kind, living, key):
        if self.destroy_fails:
            raise DriverError("cuGreenCtxDestroy", "CUDA_ERROR_CONTEXT_IS_DESTROYED")
        del living[key]
        self.events.append(f"destroy {kind} {key}")
