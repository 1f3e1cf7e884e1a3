"""Decides how each decode step runs: sequential, or pipelined in one of a fixed set of arrangements.

One policy a cell, since what pays at one batch size and context does not at another. The same observations lead to the
same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decode_service.pipeline.arrangements import Arrangement, Arrangements, Cell, cell_of
from decode_service.pipeline.calibration import Calibration
from decode_service.pipeline.cell_policy import CellPolicy
from decode_service.pipeline.decisions import Change, Mode, Purpose, Reason, Run
from decode_service.pipeline.order import Lane
from decode_service.pipeline.predictions import Predictions


class PipelinePolicy:
    """`auto` chooses by measurements; `static` runs `asked` and still measures its gain; `disabled` is sequential."""

    def __init__(
        self,
        arrangements: Arrangements,
        calibration: Calibration,
        *,
        num_layers: int,
        batch_buckets: Sequence[int],
        mode: Mode = Mode.AUTO,
        asked: Arrangement | None = None,
    ) -> None:
        """`batch_buckets`: ascending. `asked`: for `static`, with the SMs granted."""
        self._arrangements = arrangements
        self._num_layers = num_layers
        self._batch_buckets = batch_buckets
        self._predictions = {
            measured.cell: Predictions(arrangements, num_layers, measured) for measured in calibration.cells
        }
        self._cells: dict[Cell, CellPolicy] = {}
        self.num_rebalances = 0
        self.num_switches = 0
        self.configure(mode, asked)

    def configure(self, mode: Mode, asked: Arrangement | None = None) -> None:
        """Between two steps. What was measured stays known; cells choose afresh."""
        assert mode is not Mode.STATIC or asked in self._arrangements.all, f"{asked} is not one of the arrangements"
        self.mode = mode
        self._asked = asked if mode is Mode.STATIC else None
        self._cells = {}

    def next_run(self, num_seqs: int, mean_context: float) -> Run:
        """How the next step of a batch shall run. `mean_context`: tokens a sequence."""
        cell = cell_of(num_seqs, mean_context, self._batch_buckets)
        if self.mode is Mode.DISABLED:
            return Run(cell, None, Purpose.CHOICE)
        return self._cell(cell).next_run()

    def observe(self, run: Run, seconds: float, busy_s: Mapping[Lane, float] | None = None) -> Change | None:
        """What the step took; for a sample also how long each lane was busy in it, all stages together."""
        if self.mode is Mode.DISABLED:
            return None
        change = self._cell(run.cell).observe(run, seconds, busy_s)
        if change is not None:
            self.num_rebalances += change.is_rebalance
            self.num_switches += change.is_switch
        return change

    def choice(self, cell: Cell) -> Arrangement | None:
        return None if self.mode is Mode.DISABLED else self._cell(cell).choice

    def reason(self, cell: Cell) -> Reason | None:
        """Why the cell's steps are sequential; None when they are pipelined."""
        return Reason.DISABLED if self.mode is Mode.DISABLED else self._cell(cell).reason

    def gain(self, cell: Cell) -> float | None:
        """How many times as fast as sequential; None while not measured."""
        return 1.0 if self.mode is Mode.DISABLED else self._cell(cell).gain

    @property
    def cells(self) -> list[Cell]:
        """Those that ran."""
        return list(self._cells)

    def _cell(self, cell: Cell) -> CellPolicy:
        if cell not in self._cells:
            if cell not in self._predictions:
                self._predictions[cell] = self._lend(cell)
            asked = self._asked if cell.num_seqs > 1 else None
            self._cells[cell] = CellPolicy(cell, self._arrangements, self._predictions[cell], asked=asked)
        return self._cells[cell]

    def _lend(self, cell: Cell) -> Predictions:
        """From the nearest cell that has measurements."""
        measured = [one for one, known in self._predictions.items() if known.is_own]
        nearest = min(measured, key=cell.distance, default=None)
        if nearest is None:
            return Predictions(self._arrangements, self._num_layers, None)
        return self._predictions[nearest].lend()
