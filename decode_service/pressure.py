"""Whether this worker is to get new prompts: judged of every load, and told with it.

              a limit is passed                    its leaving limit is kept, not before pressure_min_ms
    calm ─────────────────────────▶ under pressure ─────────────────────────────────────────────────────▶ calm
                                          └── nothing runs, is reserved or waits: at once ──▶

Each reason enters and leaves by itself. That an idle worker leaves at once means that what holds prompts back always
ends with the work that is there: nothing has to come for it to end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from common.clock import Clock
from common.config import DecodeConfig
from common.load import Load, PressureReason
from common.metrics import DecodeMetrics

log = logging.getLogger(__name__)


class PressurePolicy:
    """Pure: loads and a clock go in, reasons come out. The limits are the settings named pressure_…"""

    def __init__(self, config: DecodeConfig, *, num_blocks: int, clock: Clock) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._clock = clock
        self._since_s: dict[PressureReason, float] = {}

    def judge(self, load: Load) -> tuple[PressureReason, ...]:
        """Why there is pressure; empty when there is none."""
        if not (load.num_running or load.num_reserved or load.num_waiting):
            self._since_s.clear()
            return ()
        now_s = self._clock()
        for reason, enters, leaves in self._verdicts(load):
            if reason not in self._since_s:
                if enters:
                    self._since_s[reason] = now_s
            elif leaves and now_s - self._since_s[reason] >= self._config.pressure_min_ms / 1e3:
                del self._since_s[reason]
        return tuple(self._since_s)

    def _verdicts(self, load: Load) -> Iterator[tuple[PressureReason, bool, bool]]:
        """Of each reason: is its limit passed, is its leaving limit kept."""
        limits = self._config
        yield (
            PressureReason.WAITING_RESERVATIONS,
            0 < limits.pressure_enter_waiting <= load.num_waiting,
            load.num_waiting <= limits.pressure_leave_waiting,
        )
        free_share = load.num_free_blocks / self._num_blocks
        yield (
            PressureReason.FEW_FREE_BLOCKS,
            free_share < limits.pressure_enter_free_share,
            free_share >= limits.pressure_leave_free_share,
        )
        # The mean is of steps gone by; where nothing runs, nobody waits for the next.
        step_ms = load.step_ms if load.num_running else 0.0
        yield (
            PressureReason.SLOW_STEPS,
            0 < limits.pressure_enter_step_ms < step_ms,
            step_ms <= limits.pressure_leave_step_ms,
        )


class Pressure:
    """Adds the verdict to each load, and tells of it in log and metrics. Belongs to the engine thread."""

    def __init__(self, policy: PressurePolicy, metrics: DecodeMetrics, *, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._reasons: tuple[PressureReason, ...] = ()
        self._judged_s = 0.0
        known: list[PressureReason] = [reason for reason in PressureReason if reason is not PressureReason.UNSPECIFIED]
        self._gauges = {reason: metrics.pressure.labels(reason=reason.value) for reason in known}
        self._seconds = {reason: metrics.pressure_s.labels(reason=reason.value) for reason in known}

    def told_with(self, load: Load) -> Load:
        """`load`, with the pressure that it means."""
        now_s = self._clock()
        for reason in self._reasons:
            self._seconds[reason].inc(now_s - self._judged_s)
        self._judged_s = now_s
        reasons = self._policy.judge(load)
        if reasons != self._reasons:
            for reason, gauge in self._gauges.items():
                gauge.set(reason in reasons)
            self._reasons = reasons
            self._log(load)
        return load._replace(pressure=reasons)

    def _log(self, load: Load) -> None:
        reasons = ", ".join(reason.name for reason in self._reasons)
        log.info(
            "%s: %d reservations waiting, %d blocks free, mean step %.1f ms, %d sequences running",
            f"under pressure, {reasons}" if reasons else "no longer under pressure",
            load.num_waiting,
            load.num_free_blocks,
            load.step_ms,
            load.num_running,
        )
