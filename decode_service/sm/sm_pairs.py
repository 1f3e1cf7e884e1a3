"""Builds and destroys a pair of streams: split, two streams, checked; and all of it back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from decode_service.sm.partition_check import why_no_partitions
from decode_service.sm.partition_streams import SmStreams
from decode_service.sm.partitions import DriverError, NoPartitions, PartitionDriver, SmGroup, State

log = logging.getLogger(__name__)


class SmPair(NamedTuple):
    """Two streams and the number of SMs that the kernels of each run on."""

    attention: torch.cuda.Stream
    ffn: torch.cuda.Stream
    attention_sm: int
    ffn_sm: int
    # False: two plain streams, each on all SMs.
    partitioned: bool


class Partition(NamedTuple):
    """What the driver holds for one side of a pair."""

    group: SmGroup
    stream: int


class BuiltPair(NamedTuple):
    """`fault` says why the pair must not be used. Plain streams are PyTorch's and have no partitions."""

    pair: SmPair
    partitions: tuple[Partition, ...] = ()
    fault: str = ""


def build_plain(streams: SmStreams, num_sms: int, priorities: tuple[int, int]) -> BuiltPair:
    """Raises NoPartitions when PyTorch makes no stream."""
    try:
        attention, ffn = (streams.plain(priority) for priority in priorities)
    except RuntimeError as error:
        raise NoPartitions(State.STREAM_FAILED, str(error)) from None
    return BuiltPair(SmPair(attention, ffn, num_sms, num_sms, partitioned=False))


def build_partitioned(
    driver: PartitionDriver, streams: SmStreams, num_sms: tuple[int, int], priorities: tuple[int, int]
) -> BuiltPair:
    """Raises NoPartitions when the driver refuses; whatever had been made is then destroyed."""
    try:
        groups = driver.split(*num_sms)
    except DriverError as error:
        asked = " + ".join(map(str, num_sms))
        raise NoPartitions(State.SPLIT_FAILED, f"{error}, for {asked} of {driver.num_sms} SMs") from None
    handles: list[int] = []
    try:
        for group, priority in zip(groups, priorities, strict=True):
            handles.append(driver.make_stream(group, priority))
        attention, ffn = (streams.adopt(handle) for handle in handles)
    except RuntimeError as error:
        _destroy(driver, handles, groups)
        raise NoPartitions(State.STREAM_FAILED, str(error)) from None
    pair = SmPair(attention, ffn, groups[0].num_sms, groups[1].num_sms, partitioned=True)
    partitions = tuple(Partition(group, handle) for group, handle in zip(groups, handles, strict=True))
    return BuiltPair(pair, partitions, _fault(driver, streams, pair))


def destroy(driver: PartitionDriver, built: BuiltPair) -> int:
    """Waits for the streams, then destroys them and their contexts. Returns how many the driver did not take back."""
    for stream in (built.pair.attention, built.pair.ffn):
        try:
            stream.synchronize()
        except RuntimeError as error:
            log.warning("work on a stream failed that is about to be destroyed: %s", error)
    return _destroy(driver, [one.stream for one in built.partitions], [one.group for one in built.partitions])


def _destroy(driver: PartitionDriver, handles: Sequence[int], groups: Sequence[SmGroup]) -> int:
    num_leaked = 0
    streams_first = [partial(driver.destroy_stream, handle) for handle in handles]
    for step in [*streams_first, *(partial(driver.destroy, group) for group in groups)]:
        try:
            step()
        except DriverError as error:
            num_leaked += 1
            log.warning("leaked until the process ends: %s", error)
    return num_leaked


def _fault(driver: PartitionDriver, streams: SmStreams, pair: SmPair) -> str:
    try:
        seen = [streams.launched(pair.attention, pair.ffn), streams.replayed(pair.attention, pair.ffn)]
    except Exception as error:
        # PyTorch's, Triton's, or Triton is missing: whatever it is, nothing has been shown.
        return f"the check could not be made: {type(error).__name__}: {error}".partition("\n")[0]
    return why_no_partitions(driver.num_sms, pair.attention_sm, pair.ffn_sm, seen)
