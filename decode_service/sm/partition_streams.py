"""PyTorch's side of partitions: streams to enqueue on, and on which SMs their kernels are seen to run."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.engine.graphs import capture


class SmIds(NamedTuple):
    """The SMs on which kernels of either stream ran."""

    attention: frozenset[int]
    ffn: frozenset[int]


class SmStreams(Protocol):
    """One device. PyTorch's errors, RuntimeErrors mostly, pass through."""

    @property
    def num_sms(self) -> int:
        """Of the whole device."""

    def plain(self, priority: int) -> torch.cuda.Stream:
        """A stream on all SMs. Lower is more urgent."""

    def adopt(self, handle: int) -> torch.cuda.Stream:
        """What somebody else made and goes on to own, as a stream of PyTorch."""

    def launched(self, attention: torch.cuda.Stream, ffn: torch.cuda.Stream) -> SmIds:
        """Where kernels run that are launched on the two at once. Waits for them."""

    def replayed(self, attention: torch.cuda.Stream, ffn: torch.cuda.Stream) -> SmIds:
        """Where they run as branches of a graph, captured with a fork to both and replayed from another stream."""


class TorchStreams:
    """See `SmStreams`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def num_sms(self) -> int:
        return torch.cuda.get_device_properties(self._device).multi_processor_count

    def plain(self, priority: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device, priority=priority)

    def adopt(self, handle: int) -> torch.cuda.Stream:
        return torch.cuda.ExternalStream(handle, device=self._device)

    def launched(self, attention: torch.cuda.Stream, ffn: torch.cuda.Stream) -> SmIds:
        with torch.cuda.device(self._device):
            ids_2P = self._unseen()
            _fork_and_join(attention, ffn, ids_2P)
            return _seen(ids_2P)

    def replayed(self, attention: torch.cuda.Stream, ffn: torch.cuda.Stream) -> SmIds:
        """After `launched`, which compiles the kernel."""
        with torch.cuda.device(self._device):
            ids_2P = self._unseen()
            capturing = torch.cuda.Stream()
            capturing.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capturing):
                graph, _ = capture(lambda: _fork_and_join(attention, ffn, ids_2P), torch.cuda.graph_pool_handle())
            graph.replay()
            return _seen(ids_2P)

    def _unseen(self) -> Tensor:
        return torch.full((2, 4 * self.num_sms), -1, dtype=torch.int32, device=self._device)


def _fork_and_join(attention: torch.cuda.Stream, ffn: torch.cuda.Stream, ids_2P: Tensor) -> None:
    """From the current stream and back to it."""
    from common.kernels.sm_ids import record_sm_ids

    here = torch.cuda.current_stream()
    streams = (attention, ffn)
    for stream, ids_P in zip(streams, ids_2P, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            record_sm_ids(ids_P)
    for stream in streams:
        here.wait_stream(stream)


def _seen(ids_2P: Tensor) -> SmIds:
    attention, ffn = (frozenset(ids) - {-1} for ids in ids_2P.tolist())
    return SmIds(attention, ffn)
