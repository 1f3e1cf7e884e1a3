"""The pairs of streams that attention and FFN can run on: each on SMs of its own, or both on all of them.

    asked ──▶ built and checked ──▶ kept ──▶ current ──▶ kept … ──▶ destroyed, all together, at the end

A pair is built when it is first asked for, then kept, because creating and destroying green contexts may leak memory.
Where device, driver or installed packages fall short, that is a state in `stats()`, not an exception.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from decode_service.sm.green_contexts import GreenContextDriver
from decode_service.sm.partition_streams import SmStreams, TorchStreams
from decode_service.sm.partitions import NoPartitions, PartitionDriver, State
from decode_service.sm.sm_pairs import BuiltPair, SmPair, build_partitioned, build_plain, destroy

log = logging.getLogger(__name__)

# Hopper grants SMs in multiples of 8; a side with fewer than 16 is too slow to be worth a pair.
STEP_SM = 8
MIN_SM = 16


@dataclass(frozen=True, slots=True)
class GreenStats:
    """`state` and `reason` are of the latest ask. `remedy` is empty when nothing is wrong.

    `attention_sm` and `ffn_sm` are what the current pair was granted, 0 without one; `..._asked` are of the latest ask
    for a current pair, also of one that failed. `verified`: kernels of the current pair were seen to keep to their own
    SMs, launched and in a graph; never of plain streams.
    """

    state: State
    reason: str
    remedy: str
    attention_sm_asked: int
    ffn_sm_asked: int
    attention_sm: int
    ffn_sm: int
    verified: bool
    num_pairs: int
    num_rebalances: int
    # Streams and contexts that the driver did not take back.
    num_leaked: int


class GreenManager:
    """Belongs to one thread."""

    def __init__(
        self,
        driver: PartitionDriver | NoPartitions,
        streams: SmStreams | None,
        *,
        attention_priority: int = 0,
        ffn_priority: int = 0,
    ) -> None:
        """Builds nothing. `streams` is None where there is no GPU. Lower priorities are more urgent."""
        self._driver = driver
        self._streams = streams
        self._priorities = (attention_priority, ffn_priority)
        # By the SMs that were asked of the driver; the plain pair by those of the device, twice.
        self._pairs: dict[tuple[int, int], BuiltPair] = {}
        self._current: SmPair | None = None
        self._asked = (0, 0)
        self._num_rebalances = 0
        self._num_leaked = 0
        self._state, self._reason = State.UNUSED, ""
        if isinstance(driver, NoPartitions):
            self._state, self._reason = driver.state, driver.reason

    @classmethod
    def of(cls, device: torch.device, *, attention_priority: int = 0, ffn_priority: int = 0) -> GreenManager:
        """What `device` can do with the driver and the packages that are here."""
        if device.type != "cuda":
            return cls(NoPartitions(State.NO_GPU, "computing on the CPU"), None)
        index = torch.cuda.current_device() if device.index is None else device.index
        driver: PartitionDriver | NoPartitions
        try:
            driver = GreenContextDriver(index)
        except NoPartitions as missing:
            driver = missing
        streams = TorchStreams(torch.device("cuda", index))
        return cls(driver, streams, attention_priority=attention_priority, ffn_priority=ffn_priority)

    def __enter__(self) -> GreenManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def current(self) -> SmPair | None:
        """The pair to run on; None before the first one, and after the end."""
        return self._current

    @property
    def num_sms(self) -> int:
        """Of the whole device; 0 without one."""
        if not isinstance(self._driver, NoPartitions):
            return self._driver.num_sms
        return self._streams.num_sms if self._streams else 0

    @property
    def driver_version(self) -> str:
        """Empty where there are no partitions."""
        return "" if isinstance(self._driver, NoPartitions) else self._driver.version

    @property
    def splits(self) -> tuple[int, ...]:
        """How many SMs attention can be given, ascending; the FFN may have the rest. Empty where none can be given."""
        if isinstance(self._driver, NoPartitions):
            return ()
        return tuple(range(MIN_SM, self._driver.num_sms - MIN_SM + 1, STEP_SM))

    def allocate(self, attention_sm: int, ffn_sm: int) -> SmPair | None:
        """The pair for what is asked; the first one becomes the current pair. None: `stats()` says why.

        Attention gets the next larger of `splits`, or the largest one; the FFN the next multiple of 8 from 16 on, or
        all that attention leaves. SMs that nobody asked for stay idle. Both asking for all SMs of the device is two
        plain streams. A new pair is built and checked, which waits for the device.
        """
        pair = self._pair(attention_sm, ffn_sm)
        if self._current is None:
            self._asked = (attention_sm, ffn_sm)
            self._current = pair
        return pair

    def rebalance(self, attention_sm: int, ffn_sm: int) -> SmPair | None:
        """Makes another pair the current one. Waits for what was enqueued on both streams of the present one.

        None: there is no such pair, `stats()` says why, and the present one stays.

        Raises:
            RuntimeError: PyTorch's, when the work that was waited for failed.
        """
        pair = self._pair(attention_sm, ffn_sm)
        self._asked = (attention_sm, ffn_sm)
        if pair is not None and pair is not self._current:
            if self._current is not None:
                self._current.attention.synchronize()
                self._current.ffn.synchronize()
                self._num_rebalances += 1
            self._current = pair
        return pair

    def stats(self) -> GreenStats:
        current = self._current
        return GreenStats(
            state=self._state,
            reason=self._reason,
            remedy=self._state.remedy,
            attention_sm_asked=self._asked[0],
            ffn_sm_asked=self._asked[1],
            attention_sm=current.attention_sm if current else 0,
            ffn_sm=current.ffn_sm if current else 0,
            verified=current is not None and current.partitioned,
            num_pairs=len(self._pairs),
            num_rebalances=self._num_rebalances,
            num_leaked=self._num_leaked,
        )

    def close(self) -> None:
        """Waits for the streams of partitions and destroys them, then their contexts. Safe to repeat.

        CUDA graphs that were captured on them must be gone, and nobody else may use them.
        """
        if not isinstance(self._driver, NoPartitions):
            self._num_leaked += sum(destroy(self._driver, built) for built in self._pairs.values())
        self._pairs.clear()
        self._current, self._streams = None, None
        self._driver = NoPartitions(State.CLOSED, "the streams are destroyed")
        self._state, self._reason = self._driver.state, self._driver.reason

    def _pair(self, attention_sm: int, ffn_sm: int) -> SmPair | None:
        assert attention_sm > 0
        assert ffn_sm > 0
        try:
            pair = self._kept(attention_sm, ffn_sm)
        except NoPartitions as missing:
            if (missing.state, missing.reason) != (self._state, self._reason):
                log.warning("no SM partitions: %s; %s", missing, missing.state.remedy)
            self._state, self._reason = missing.state, missing.reason
            return None
        self._state, self._reason = State.READY, ""
        return pair

    def _kept(self, attention_sm: int, ffn_sm: int) -> SmPair:
        """Raises NoPartitions."""
        driver, streams, num_sms = self._driver, self._streams, self.num_sms
        plain = min(attention_sm, ffn_sm) >= num_sms
        if streams is None or (isinstance(driver, NoPartitions) and not plain):
            assert isinstance(driver, NoPartitions)
            raise NoPartitions(driver.state, driver.reason)
        key = (num_sms, num_sms) if plain else self._split_for(attention_sm, ffn_sm)
        if key not in self._pairs:
            if plain:
                self._pairs[key] = build_plain(streams, num_sms, self._priorities)
            else:
                assert not isinstance(driver, NoPartitions)
                self._pairs[key] = build_partitioned(driver, streams, key, self._priorities)
        built = self._pairs[key]
        if built.fault:
            raise NoPartitions(State.VERIFICATION_FAILED, built.fault)
        return built.pair

    def _split_for(self, attention_sm: int, ffn_sm: int) -> tuple[int, int]:
        splits, num_sms = self.splits, self.num_sms
        if not splits:
            raise NoPartitions(State.TOO_FEW_SMS, f"the device has {num_sms} SMs, two sides need {2 * MIN_SM}")
        if attention_sm + ffn_sm > num_sms:
            raise NoPartitions(State.TOO_FEW_SMS, f"{attention_sm} + {ffn_sm} were asked for, the device has {num_sms}")
        attention = next((split for split in splits if split >= attention_sm), splits[-1])
        ffn, left = max(-(-ffn_sm // STEP_SM) * STEP_SM, MIN_SM), num_sms - attention
        return attention, ffn if ffn + STEP_SM <= left else left
