"""Where pipelined steps run while they are measured: as CUDA graphs on partitions of a GPU, or called on a CPU.

The CPU has no partitions and no streams. It only shows that what measures runs; its times say nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.engine.graphs import capture
from decode_service.pipeline.execution import Streams
from decode_service.pipeline.order import Lane
from decode_service.pipeline.stage_clock import StageClock, stage_clock
from decode_service.sm.green_manager import MIN_SM, STEP_SM, GreenManager
from decode_service.sm.sm_pairs import SmPair

# Computes a step (on a GPU: enqueues it) and returns its logits, which stay until the next replay of the same step.
Replay = Callable[[], Tensor]

# A turn has as many replays as take about so long together, so that launching them does not count.
TURN_S = 2e-3


class Pair(NamedTuple):
    """What was granted. Without streams the stages run one after the other."""

    attention_sm: int
    ffn_sm: int
    partitioned: bool
    streams: Streams | None

    @classmethod
    def of(cls, pair: SmPair) -> Pair:
        streams = {Lane.ATTENTION: pair.attention, Lane.FFN: pair.ffn}
        return cls(pair.attention_sm, pair.ffn_sm, pair.partitioned, streams)


class Device(Protocol):
    device: torch.device
    num_sms: int

    @property
    def splits(self) -> tuple[int, ...]:
        """How many SMs attention can be given, ascending; the FFN has the rest."""

    def pair(self, attention_sm: int, ffn_sm: int) -> Pair | None:
        """Of what is asked; all SMs for both are two plain streams. None: `missing` says why."""

    @property
    def missing(self) -> str:
        """Why the last pair was refused."""

    def captured(self, step: Replay) -> Replay:
        """The step to be replayed; it has run once when this returns. Its memory goes with it."""

    def clock(self) -> StageClock: ...

    def wait(self) -> None:
        """Until everything enqueued is done."""

    def release(self) -> None:
        """Gives memory back that nothing uses."""

    def seconds(self, replays: Sequence[Replay], num_turns: int) -> list[float]:
        """The median time of each, by turns, so that a device that becomes slower becomes so for all of them."""

    def free_bytes(self) -> int: ...


class GraphDevice:
    """The current CUDA device. A context: within it, what is enqueued goes to a stream that can be captured."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stack = ExitStack()

    def __enter__(self) -> GraphDevice:
        self._manager = self._stack.enter_context(GreenManager.of(self.device))
        self.num_sms = self._manager.num_sms
        self._stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self._stack.close()

    @property
    def splits(self) -> tuple[int, ...]:
        return self._manager.splits

    def pair(self, attention_sm: int, ffn_sm: int) -> Pair | None:
        pair = self._manager.allocate(attention_sm, ffn_sm)
        return None if pair is None else Pair.of(pair)

    @property
    def missing(self) -> str:
        stats = self._manager.stats()
        return f"{stats.state.value}: {stats.reason}"

    def captured(self, step: Replay) -> Replay:
        # Compiles kernels, and makes the workspaces that streams keep, which must not lie in a graph's memory.
        step()
        self.release()
        graph, result = capture(step, torch.cuda.graph_pool_handle())

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def clock(self) -> StageClock:
        return stage_clock(self.device)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def seconds(self, replays: Sequence[Replay], num_turns: int) -> list[float]:
        self._turn(replays, [1] * len(replays))
        first = self._turn(replays, [1] * len(replays))
        counts = [max(1, math.ceil(TURN_S / seconds)) for seconds in first]
        turns = [self._turn(replays, counts) for _ in range(num_turns)]
        return [statistics.median(of_one) for of_one in zip(*turns, strict=True)]

    def once(self, replays: Sequence[Replay]) -> list[float]:
        """Seconds of each, back to back; waits for them."""
        return self._turn(replays, [1] * len(replays))

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def _turn(self, replays: Sequence[Replay], counts: Sequence[int]) -> list[float]:
        """Seconds of a replay of each, so many of which are enqueued back to back."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in replays]
        for replay, count, (start, end) in zip(replays, counts, events, strict=True):
            start.record()
            for _ in range(count):
                replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 / count for count, (start, end) in zip(counts, events, strict=True)]


class HostDevice:
    """A CPU that claims SMs."""

    device = torch.device("cpu")
    missing = ""

    def __init__(self, num_sms: int = 132) -> None:
        self.num_sms = num_sms

    @property
    def splits(self) -> tuple[int, ...]:
        return tuple(range(MIN_SM, self.num_sms - MIN_SM + 1, STEP_SM))

    def pair(self, attention_sm: int, ffn_sm: int) -> Pair | None:
        if min(attention_sm, ffn_sm) >= self.num_sms:
            return Pair(self.num_sms, self.num_sms, False, None)
        granted = next(split for split in self.splits if split >= attention_sm)
        return Pair(granted, min(ffn_sm, self.num_sms - granted), True, None)

    def captured(self, step: Replay) -> Replay:
        step()
        return step

    def clock(self) -> StageClock:
        return stage_clock(self.device)

    def wait(self) -> None:
        pass

    def release(self) -> None:
        pass

    def seconds(self, replays: Sequence[Replay], num_turns: int) -> list[float]:
        turns: list[list[float]] = [[] for _ in replays]
        for _ in range(num_turns):
            for replay, times in zip(replays, turns, strict=True):
                start_s = time.perf_counter()
                replay()
                times.append(time.perf_counter() - start_s)
        return [statistics.median(times) for times in turns]

    def free_bytes(self) -> int:
        return 1 << 40
