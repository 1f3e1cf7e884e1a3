"""Chooses how the steps of one cell run. Knows no device and no clock: it counts steps, in windows of 32.

    sequential ──5 probed windows with a predicted gain──▶ on trial ──3 windows that keep it──▶ pipelined
        ▲  ▲                                                │    ▲                                  │
        │  └──────────── no gain: back to what was ─────────┘    └── 3 windows in which a neighbour
        │                                                            is predicted to gain ──────────┤
        └──────────────────── 6 windows in a row slower than sequential ────────────────────────────┘

What was left is not entered again for a while, each time for twice as long, and a cell that fell back tries nothing in
pauses that grow as well. With a gain that is asked of changes, and a loss that it takes to give one up, this is why
choices do not oscillate.

Of a window's 32 steps at most one is a probe. While pipelined it is sequential, and in every eighth window the best of
another kind; while sequential it is what is tried, and there is none in pauses. Of what is tried, and of a choice in
every eighth window, one more step is a sample of stage times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from decode_service.pipeline.arrangements import Arrangement, Arrangements, Cell
from decode_service.pipeline.average import Average
from decode_service.pipeline.decisions import Change, Purpose, Reason, Run
from decode_service.pipeline.order import Cut, Lane
from decode_service.pipeline.predictions import Predictions
from decode_service.pipeline.windows import Pause, Window

# In windows.
HOLD = 3
# Of what sequential tries.
NUM_PROBES = 5
TRIAL = 3
LOSING = 6
SAMPLE_EVERY = 8
EXPLORE_EVERY = 8
# A static split is probed for its gain alone.
STATIC_PROBE_EVERY = 8
PAUSE = 8
# Before sequential tries again, at most; before what was left is entered again, at most.
LONGEST_RETRY = 64
LONGEST_PAUSE = 512
# After so many without a change, pauses start from the shortest again.
CALM = 128
# Steps that suddenly take so much more or less, by a clock or another batch, are compared with new probes alone.
JUMP = 0.1
# Windows from one such jump to the next, so that decisions are made whatever steps do.
JUMPS_APART = 12
# Share of a step's time that a change must promise; half of it must come true.
MIN_GAIN = 0.02
# What is predicted to take so many times as long as sequential is not tried, unless nothing else is there to try.
HOPELESS = 1.25


class Trial(NamedTuple):
    before: Arrangement | None
    # Of a sequential step.
    before_share: float
    # The choice before had lasted.
    after_calm: bool = False


class CellPolicy:
    """With `asked`, that is the choice whatever it costs."""

    def __init__(
        self, cell: Cell, arrangements: Arrangements, predictions: Predictions, *, asked: Arrangement | None = None
    ) -> None:
        self.cell = cell
        self.predictions = predictions
        self.choice = asked
        # Why steps are sequential.
        self.reason: Reason | None = None
        self._arrangements = arrangements
        self._is_fixed = asked is not None
        self._share: Average | None = None
        self._trial: Trial | None = None
        # While sequential: what is tried. While pipelined: what is predicted to be better.
        self._candidate: Arrangement | None = None
        # While pipelined: what this window's probe runs, which is sequential mostly.
        self._explored: Arrangement | None = None
        self._num_held = 0
        # The last ones, in seconds: of what is tried, or while pipelined of sequential. Their median, since any single
        # step may be held up.
        self._probes: list[float] = []
        self._num_losing = 0
        self._last_step_s: float | None = None
        self._jumped_at = -JUMPS_APART
        self._retry = Pause(PAUSE, LONGEST_RETRY)
        self._left = {arrangement: Pause(PAUSE, LONGEST_PAUSE) for arrangement in arrangements.all}
        # The window in which each kind was last probed.
        self._tried_at: dict[tuple[Cut, bool], int] = {}
        self._window = Window()
        # Windows so far.
        self._now = 0
        self._changed_at = 0
        if asked is None:
            self._start()

    @property
    def gain(self) -> float | None:
        """How many times as fast as sequential steps the chosen ones are; None while that was not measured."""
        if self.choice is None:
            return 1.0
        return None if self._share is None else 1 / self._share.value

    def next_run(self) -> Run:
        """How the next step shall run. Several may be asked for before the first is observed."""
        purpose = self._window.begin(is_sampled=self._is_sampled, is_probed=self._is_probed)
        if purpose is Purpose.SAMPLE:
            return Run(self.cell, self._candidate if self.choice is None else self.choice, purpose)
        return Run(self.cell, self._probed if purpose is Purpose.PROBE else self.choice, purpose)

    def observe(self, run: Run, seconds: float, busy_s: Mapping[Lane, float] | None = None) -> Change | None:
        """The step took so long; of a sample, each lane was busy for so long in total."""
        if run.purpose is Purpose.SAMPLE:
            if run.arrangement is not None and busy_s is not None:
                self.predictions.add_stages(run.arrangement, busy_s)
        elif run.purpose is Purpose.PROBE:
            if run.arrangement == self._probed:
                self._window.probe_s = seconds
        elif run.arrangement == self.choice:
            self._window.add(seconds)
        if not self._window.is_over:
            return None
        window, self._window = self._window, Window()
        self._now += 1
        return self._decide(window.step_s, window.probe_s)

    @property
    def _probed(self) -> Arrangement | None:
        return self._candidate if self.choice is None else self._explored

    @property
    def _is_sampled(self) -> bool:
        if self.choice is None:
            return self._candidate is not None and len(self._probes) < HOLD
        return self._now % SAMPLE_EVERY == 0

    @property
    def _is_probed(self) -> bool:
        if self.choice is None:
            return self._candidate is not None
        return not self._is_fixed or self._now % STATIC_PROBE_EVERY == 0

    @property
    def _is_calm(self) -> bool:
        return self._now - self._changed_at > CALM

    def _start(self) -> None:
        """From calibration: the best of what was measured, on trial; else sequential."""
        known = {} if self.predictions.sequential is None else self.predictions.known()
        if self.cell.num_seqs < 2:
            self.reason = Reason.SINGLE_SEQUENCE
        elif not self._best(self._arrangements.all):
            self.reason = Reason.NOT_CALIBRATED
        elif not known:
            self.reason = Reason.MEASURING
        elif min(known.values()) > 1 - MIN_GAIN:
            self.reason = Reason.SEQUENTIAL_IS_FASTER
            self._retry.start(0, after_calm=True)
        else:
            self.choice = min(known, key=known.__getitem__)
            self._trial = Trial(None, 1.0)
            self.predictions.restart(self.choice)

    def _decide(self, step_s: float, probe_s: float | None) -> Change | None:
        """At the end of a window: what its steps and its probe took."""
        if self._is_jump(step_s):
            self._probes, probe_s, self._explored, self._jumped_at = [], None, None, self._now
            self.predictions.restart_sequential()
        self._last_step_s = step_s
        if self.choice is None:
            self.predictions.add_sequential(step_s)
            return self._decide_sequential(probe_s)
        if probe_s is not None and self._explored is None:
            self._probes = [*self._probes[1 - HOLD :], probe_s]
            self.predictions.add_sequential(statistics.median_low(self._probes))
        if self._now - self._jumped_at < HOLD:
            return None
        if self.predictions.sequential is None:
            return None
        if probe_s is not None and self._explored is not None:
            self.predictions.add_step(self._explored, probe_s / self._sequential_s)
        share = step_s / self._sequential_s
        self.predictions.add_step(self.choice, share)
        self._share = self._share or Average(share, num_values=0)
        self._share.add(share)
        return None if self._is_fixed else self._decide_pipelined(self.choice, self._share.value)

    def _is_jump(self, step_s: float) -> bool:
        if self._last_step_s is None or self._now - self._jumped_at < JUMPS_APART:
            return False
        return abs(step_s / self._last_step_s - 1) > JUMP

    @property
    def _sequential_s(self) -> float:
        assert self.predictions.sequential is not None, "a window of sequential steps, or a probe, came before"
        return self.predictions.sequential.value

    def _decide_sequential(self, probe_s: float | None) -> Change | None:
        if self._candidate is None:
            if self.cell.num_seqs >= 2 and self._retry.is_over(self._now):
                options = self._arrangements.all
                self._candidate = self._least_tried(options) or self._best(options)
            return None
        if probe_s is not None:
            self._probes.append(probe_s)
        if len(self._probes) < NUM_PROBES:
            return None
        candidate, self._candidate = self._candidate, None
        self.predictions.restart(candidate)
        self.predictions.add_step(candidate, statistics.median(self._probes) / self._sequential_s)
        self._probes = []
        if self._predicted(candidate) <= 1 - MIN_GAIN:
            return self._move(candidate, Reason.PREDICTED_GAIN, Trial(None, 1.0))
        self._retry.start(self._now)
        if self.reason is Reason.MEASURING:
            self.reason = Reason.SEQUENTIAL_IS_FASTER
        return None

    def _decide_pipelined(self, choice: Arrangement, share: float) -> Change | None:
        if self._trial is not None:
            return self._judge(choice, share, self._trial) if self._now - self._changed_at >= TRIAL else None
        others = self._arrangements.others(choice)
        self._explored = self._least_tried(others) if self._now % EXPLORE_EVERY == 0 else None
        self._num_losing = self._num_losing + 1 if share > 1 else 0
        if self._num_losing >= LOSING:
            return self._leave(choice, None, Reason.LOSS_AGAINST_SEQUENTIAL)
        best = self._best([*self._arrangements.neighbours(choice), *others])
        if best is None or self._predicted(best) > share * (1 - MIN_GAIN):
            best = None
        self._num_held = self._num_held + 1 if best == self._candidate else 1
        self._candidate = best
        if best is None or self._num_held < HOLD:
            return None
        return self._move(best, Reason.PREDICTED_GAIN, Trial(choice, share, self._is_calm))

    def _judge(self, choice: Arrangement, share: float, trial: Trial) -> Change | None:
        """Stays, if at least half of what was asked of the change came true."""
        self._trial = None
        if share > trial.before_share * (1 - MIN_GAIN / 2):
            is_loss = trial.before is None and share > 1
            return self._leave(choice, trial.before, Reason.LOSS_AGAINST_SEQUENTIAL if is_loss else Reason.NO_GAIN)
        if trial.before is not None:
            self._left[trial.before].start(self._now, after_calm=trial.after_calm)
        return None

    def _leave(self, choice: Arrangement, after: Arrangement | None, reason: Reason) -> Change:
        self._left[choice].start(self._now, after_calm=self._is_calm)
        if after is None:
            self._retry.start(self._now, after_calm=self._is_calm)
        return self._move(after, reason, None)

    def _move(self, after: Arrangement | None, reason: Reason, trial: Trial | None) -> Change:
        change = Change(self.cell, self.choice, after, reason)
        self.choice, self._trial = after, trial
        if after is not None:
            self.predictions.restart(after)
        self.reason = reason if after is None else None
        self._changed_at = self._now
        self._share, self._candidate, self._explored = None, None, None
        self._num_held, self._num_losing = 0, 0
        self._last_step_s, self._probes = None, []
        return change

    def _best(self, options: Iterable[Arrangement]) -> Arrangement | None:
        """Of those that may be entered, the one with the best prediction."""
        shares = {one: self.predictions.share(one) for one in options if self._left[one].is_over(self._now)}
        known = {one: share for one, share in shares.items() if share is not None}
        return min(known, key=known.__getitem__, default=None)

    def _least_tried(self, options: Iterable[Arrangement]) -> Arrangement | None:
        """The best of that kind, among those with any hope, which was not tried for longest: predictions age."""
        kinds: dict[tuple[Cut, bool], list[Arrangement]] = {}
        for one in options:
            kinds.setdefault(self._arrangements.kind(one), []).append(one)
        best = {kind: self._best(alike) for kind, alike in kinds.items()}
        shares = {kind: self._predicted(one) for kind, one in best.items() if one is not None}
        hopeful = [kind for kind, share in shares.items() if share <= HOPELESS]
        kind = min(hopeful, key=lambda one: (self._tried_at.get(one, -1), shares[one]), default=None)
        if kind is None:
            return None
        self._tried_at[kind] = self._now
        return best[kind]

    def _predicted(self, arrangement: Arrangement) -> float:
        share = self.predictions.share(arrangement)
        assert share is not None, "candidates have predictions"
        return share
