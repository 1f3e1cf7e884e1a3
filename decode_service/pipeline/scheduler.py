"""The attention/FFN pipeline as the engine sees it: one entry for a decode step, and what can be asked and changed.

How each step is computed is chosen here by the policy, computed by the step runner on the streams of the green manager,
and what it took goes back into the choice. Whatever keeps a step from being pipelined has a name, and the step is then
a sequential one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import FailedPrecondition
from common.model.batch import ForwardBatch
from decode_service.pipeline.arrangements import Arrangement, Arrangements, Cell, cell_of
from decode_service.pipeline.calibration import Calibration
from decode_service.pipeline.decisions import Mode, Purpose, Reason, Run
from decode_service.pipeline.execution import Finish, no_finish
from decode_service.pipeline.order import Cut, Lane
from decode_service.pipeline.policy import PipelinePolicy
from decode_service.pipeline.step_runner import NoWay, StepRunner, Way
from decode_service.pipeline.step_statistics import PipelineStatistics
from decode_service.sm.green_manager import GreenManager

log = logging.getLogger(__name__)

# With profiling, the stages of one step in so many are timed.
PROFILE_EVERY = 32
# Of the pipelined steps, the first and then one in so many is computed without lanes as well and compared.
CHECK_EVERY = 4096


class Ask(NamedTuple):
    """What is configured; cut and SMs count in mode `static` alone."""

    mode: Mode
    cut: Cut
    attention_sm: int
    ffn_sm: int


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """What `GetPipelineStats` shows, where its fields are explained."""

    mode: Mode
    active: bool
    fallback_reason: str
    fallback_detail: str
    total_tokens: int
    attention_ms: float
    ffn_ms: float
    total_ms: float
    attention_sm_asked: int
    ffn_sm_asked: int
    attention_sm: int
    ffn_sm: int
    num_steps: int
    num_pipelined_steps: int
    num_profiled_steps: int
    cut: str
    attention_stage_p50_ms: float
    attention_stage_p99_ms: float
    ffn_stage_p50_ms: float
    ffn_stage_p99_ms: float
    attention_occupancy: float
    ffn_occupancy: float
    bubble_share: float
    attention_queue_depth: float
    ffn_queue_depth: float
    handoff_bytes: int
    num_rebalances: int
    num_switches: int
    gain: float


class _Launched(NamedTuple):
    # None: nobody chose, or the choice could not be followed.
    run: Run | None
    way: Way
    # On the device: whether it had the bits of the same step without lanes. None: not checked.
    is_exact: Tensor | None


class PipelineScheduler:
    """Belongs to the engine's thread, except `stats`."""

    def __init__(
        self,
        runner: StepRunner,
        partitions: GreenManager,
        ask: Ask,
        *,
        num_layers: int,
        batch_buckets: Sequence[int],
        profiling: bool = False,
        obstacle: str = "",
        calibration: Calibration | None = None,
        calibrating: Generator[None, None, Calibration] | None = None,
        on_calibrated: Callable[[Calibration], None] = lambda calibration: None,
    ) -> None:
        """`obstacle`: why this worker cannot have a pipeline at all, as a name.

        `calibrating` makes the calibration, a measurement at a time, where there is none yet.
        """
        self._runner = runner
        self._partitions = partitions
        self._ask = ask
        self._num_layers = num_layers
        self._batch_buckets = batch_buckets
        self._profiling = profiling
        self._obstacle = obstacle
        self._calibration = calibration or Calibration()
        self._calibrating = calibrating
        self._on_calibrated = on_calibrated
        self._statistics = PipelineStatistics()
        # What went wrong with a pipelined step; they are sequential until the pipeline is configured anew.
        self._fallback: NoWay | None = None
        # Of the last step that was launched.
        self._cell: Cell | None = None
        self._until_profile = 1
        self._until_check = 1
        # Not recorded yet, oldest first.
        self._launched: deque[_Launched] = deque()
        # Of mode auto, which knows again what it learned when that mode comes back.
        self._auto: PipelinePolicy | None = None
        try:
            self._policy = self._policy_for(ask)
        except NoWay as error:
            log.warning("decode steps are sequential, mode %s is not possible: %s", ask.mode.value, error)
            self._policy = None

    def decode_token(
        self, batch: ForwardBatch, finish: Finish = no_finish, *, num_seqs: int, mean_context: float
    ) -> Tensor:
        """Logits (fp32, [sequences, vocab]) of the next token of every sequence.

        `finish` is called on them. `num_seqs` of the batch's rows are in use, with so many tokens each on average. On a
        GPU this enqueues, and the logits are there until the next step.
        """
        self._cell = cell_of(num_seqs, mean_context, self._batch_buckets)
        run = None if self._policy is None else self._policy.next_run(num_seqs, mean_context)
        arrangement = None if run is None else run.arrangement
        profiled = self._takes_profile() or (run is not None and run.purpose is Purpose.SAMPLE)
        way = Way(batch.num_seqs, arrangement, profiled)
        plain, reference = Way(batch.num_seqs), None
        try:
            if not self._runner.is_ready(way):
                self._runner.prepare(way, batch, finish)
                # A profile that cannot be made yet changes nothing else.
                way = way._replace(profiled=False)
            if not self._runner.is_ready(way):
                way, run = plain, self._instead(run)
            reference = self._reference(way, batch)
            logits = self._runner.run(way, batch, finish)
        except NoWay as error:
            if way == plain:
                raise
            self._fall_back(error)
            way, run, reference = plain, None, None
            logits = self._runner.run(way, batch, finish)
        self._launched.append(_Launched(run, way, None if reference is None else _have_same_bits(logits, reference)))
        try:
            self._runner.advance()
        except NoWay as error:
            self._fall_back(error)
        return logits

    def warm_up(self, batch: ForwardBatch, finish: Finish) -> None:
        """Runs a step that nobody records, so that what is compiled or allocated lazily exists; so does `capture`."""
        self._runner.run(Way(batch.num_seqs), batch, finish)

    def capture(self, batch: ForwardBatch, finish: Finish) -> None:
        """Captures a sequential step as a CUDA graph, which will read the tensors of `batch`."""
        self._runner.capture(Way(batch.num_seqs), batch, finish)

    @property
    def is_pipelined(self) -> bool:
        """The last step was."""
        return bool(self._launched) and self._launched[-1].way.arrangement is not None

    @property
    def num_graphs(self) -> int:
        return self._runner.num_graphs

    def record_step(self, seconds: float, num_tokens: int) -> None:
        """The oldest launched step has ended."""
        run, way, is_exact = self._launched.popleft()
        self._statistics.add_step(seconds, num_tokens, is_pipelined=way.arrangement is not None)
        if is_exact is not None and not bool(is_exact):
            self._fall_back(NoWay("INEXACT", f"a step in {way.arrangement} differed from the same step without lanes"))
        busy_s = None
        if way.profiled:
            order, spans = self._runner.order(way), self._runner.spans(way)
            self._statistics.add_profile(order, spans)
            busy_s = {
                lane: sum(spans[step.stage].end_s - spans[step.stage].start_s for step in order.lane(lane))
                for lane in Lane
            }
        # A clock that stood still has measured nothing.
        if run is not None and self._policy is not None and seconds > 0:
            change = self._policy.observe(run, seconds, busy_s)
            if change is not None:
                self._statistics.num_rebalances += change.is_rebalance
                self._statistics.num_switches += change.is_switch
                log.info(
                    "decode steps of up to %d sequences and %d tokens of context: %s instead of %s (%s)",
                    *change.cell,
                    change.after or "sequential",
                    change.before or "sequential",
                    change.reason.value,
                )

    def idle(self, seconds: float) -> None:
        """For about so long, between two steps: ends captures, and measures what mode `auto` still has to measure."""
        until_s = time.monotonic() + seconds
        try:
            while self._runner.is_capturing:
                if time.monotonic() > until_s:
                    return
                self._runner.advance()
            # Not while something is captured: what it draws would be.
            while self._calibrating and self._ask.mode is Mode.AUTO and self._policy and time.monotonic() < until_s:
                next(self._calibrating)
        except NoWay as error:
            self._fall_back(error)
        except StopIteration as end:
            self._calibrating = None
            self._calibration = end.value
            self._auto = None
            self._policy = self._policy_for(self._ask)
            self._on_calibrated(self._calibration)
        except RuntimeError as error:
            self._calibrating = None
            self._fall_back(NoWay("CALIBRATION_FAILED", str(error).partition("\n")[0]))

    def configure(
        self,
        *,
        mode: Mode | None = None,
        cut: Cut | None = None,
        attention_sm: int | None = None,
        ffn_sm: int | None = None,
        profiling: bool | None = None,
    ) -> None:
        """Changes what is given, between two steps; None leaves as it is.

        Raises:
            FailedPrecondition: `static` cannot be run; nothing has changed.
        """
        old = self._ask
        ask = Ask(mode or old.mode, cut or old.cut, attention_sm or old.attention_sm, ffn_sm or old.ffn_sm)
        if ask != old:
            try:
                policy = self._policy_for(ask)
            except NoWay as error:
                raise FailedPrecondition(
                    f"mode static cannot be run here ({error}); use auto or disabled", field="mode", reason=error.reason
                ) from error
            self._policy, self._ask = policy, ask
            self._fallback = None
        self._profiling = self._profiling if profiling is None else profiling

    def close(self) -> None:
        """Gives back what was captured for arrangements, and the partitions. No step may follow. Safe to repeat."""
        self._runner.forget()
        self._partitions.close()

    def stats(self) -> PipelineStats:
        seen, policy, cell = self._statistics, self._policy, self._cell
        attention, ffn = seen.lanes[Lane.ATTENTION], seen.lanes[Lane.FFN]
        choice = policy.choice(cell) if policy and cell else None
        reason, detail = ("", "") if choice else self._why_sequential()
        return PipelineStats(
            mode=self._ask.mode,
            active=choice is not None,
            fallback_reason=reason,
            fallback_detail=detail,
            total_tokens=seen.total_tokens,
            attention_ms=attention.busy_ms(seen.num_profiled),
            ffn_ms=ffn.busy_ms(seen.num_profiled),
            total_ms=seen.step_ms,
            attention_sm_asked=self._ask.attention_sm,
            ffn_sm_asked=self._ask.ffn_sm,
            attention_sm=choice.attention_sm if choice else 0,
            ffn_sm=choice.ffn_sm if choice else 0,
            num_steps=seen.num_steps,
            num_pipelined_steps=seen.num_pipelined,
            num_profiled_steps=seen.num_profiled,
            cut=choice.cut.value if choice else "",
            attention_stage_p50_ms=attention.stage_ms(50),
            attention_stage_p99_ms=attention.stage_ms(99),
            ffn_stage_p50_ms=ffn.stage_ms(50),
            ffn_stage_p99_ms=ffn.stage_ms(99),
            attention_occupancy=attention.occupancy(seen.profiled_s),
            ffn_occupancy=ffn.occupancy(seen.profiled_s),
            bubble_share=seen.bubble_share,
            attention_queue_depth=attention.queue_depth(seen.profiled_s),
            ffn_queue_depth=ffn.queue_depth(seen.profiled_s),
            handoff_bytes=self._runner.handoff_bytes(choice.cut if choice else Cut.LAYER),
            num_rebalances=seen.num_rebalances,
            num_switches=seen.num_switches,
            gain=(policy.gain(cell) or 0.0) if choice and policy and cell else 0.0,
        )

    def _policy_for(self, ask: Ask) -> PipelinePolicy | None:
        """None: no step can be pipelined. Raises NoWay: mode static, and there is no such pair of streams."""
        asked = None
        if ask.mode is Mode.STATIC:
            if self._obstacle:
                raise NoWay(self._obstacle, "the pipeline needs the kernels of pdserve")
            pair = self._runner.pair(ask.attention_sm, ask.ffn_sm)
            asked = Arrangement(ask.cut, pair.attention_sm, pair.ffn_sm)
        if self._obstacle or not self._partitions.num_sms or ask.mode is Mode.DISABLED:
            return None
        if asked is not None:
            return self._new_policy(asked)
        self._auto = self._auto or self._new_policy()
        return self._auto

    def _new_policy(self, asked: Arrangement | None = None) -> PipelinePolicy:
        return PipelinePolicy(
            self._arrangements(asked),
            self._calibration,
            num_layers=self._num_layers,
            batch_buckets=self._batch_buckets,
            asked=asked,
        )

    def _arrangements(self, asked: Arrangement | None) -> Arrangements:
        num_sms = self._partitions.num_sms
        pairs = [(split, num_sms - split) for split in self._partitions.splits] + [(num_sms, num_sms)]
        every = [Arrangement(cut, *pair) for cut in Cut for pair in pairs]
        return Arrangements([*every, asked] if asked else every, num_sms)

    def _why_sequential(self) -> tuple[str, str]:
        """(name, what a person would like to know beside it)."""
        if self._ask.mode is Mode.DISABLED:
            return "DISABLED", ""
        if self._fallback is not None:
            return self._fallback.reason, self._fallback.detail
        if self._obstacle:
            return self._obstacle, ""
        if self._policy is None:
            stats = self._partitions.stats()
            return stats.state.name, "; ".join(filter(None, (stats.reason, stats.remedy)))
        if self._calibrating is not None and self._ask.mode is Mode.AUTO:
            return Reason.NOT_CALIBRATED.name, "stages are measured while there are no requests"
        reason = self._policy.reason(self._cell) if self._cell else None
        return (reason.name, reason.value) if reason else ("NO_STEPS", "nothing has been decoded yet")

    def _takes_profile(self) -> bool:
        if not self._profiling:
            return False
        self._until_profile -= 1
        if self._until_profile:
            return False
        self._until_profile = PROFILE_EVERY
        return True

    def _reference(self, way: Way, batch: ForwardBatch) -> Tensor | None:
        """What this step has to give, if it is one to be checked: once what gives it can be run at once."""
        if way.arrangement is None:
            return None
        self._until_check = max(self._until_check - 1, 0)
        if self._until_check:
            return None
        if not self._runner.is_ready(way.reference):
            self._runner.prepare(way.reference, batch, no_finish)
            return None
        self._until_check = CHECK_EVERY
        try:
            # Graphs share memory.
            return self._runner.run(way.reference, batch, no_finish).clone()
        except torch.OutOfMemoryError:
            log.warning("a pipelined step of %d rows is not checked: there is no memory for another one", way.num_rows)
            return None

    def _instead(self, run: Run | None) -> Run | None:
        """What the policy is told of a sequential step that it did not choose."""
        if run is None or run.arrangement is None:
            return run
        return run._replace(arrangement=None, purpose=Purpose.PROBE)

    def _fall_back(self, error: NoWay) -> None:
        log.error("decode steps are sequential from now on: %s", error)
        self._fallback = error
        self._policy = None
        self._runner.forget()


def _have_same_bits(logits_SV: Tensor, reference_SV: Tensor) -> Tensor:
    """As a tensor on their device, so that nobody waits for it."""
    return (logits_SV.view(torch.int32) == reference_SV.view(torch.int32)).all()
