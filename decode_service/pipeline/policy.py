"""Decides how each decode step runs: sequential, or pipelined in one of a fixed set of arrangements.

One policy a cell, since what pays at one batch size and context does not at another. The same observations lead to the
same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decode_service.pipeline.arrangements import Arrangement, Arrangements, Cell, cell_of
from decode_service.pipeline.calibration import Calibration
from decode_service.pipeline.cell_policy import CellPolicy
from decode_service.pipeline.decisions import Change, Reason, Run
from decode_service.pipeline.order import Lane
from decode_service.pipeline.predictions import Predictions


class PipelinePolicy:
    """Chooses by measurements; with `asked` it runs that, and still measures its gain."""

    def __init__(
        self,
        arrangements: Arrangements,
        calibration: Calibration,
        *,
        num_layers: int,
        batch_buckets: Sequence[int],
        asked: Arrangement | None = None,
    ) -> None:
        """`batch_buckets`: ascending. `asked`: with the SMs granted."""
        self._arrangements = arrangements
        self._num_layers = num_layers
        self._batch_buckets = batch_buckets
        self._predictions = {
            measured.cell: Predictions(arrangements, num_layers, measured) for measured in calibration.cells
        }
        self._asked = asked
        self._cells: dict[Cell, CellPolicy] = {}

    def next_run(self, num_seqs: int, mean_context: float) -> Run:
        """How the next step of a batch shall run. `mean_context`: tokens a sequence."""
        return self._cell(cell_of(num_seqs, mean_context, self._batch_buckets)).next_run()

    def observe(self, run: Run, seconds: float, busy_s: Mapping[Lane, float] | None = None) -> Change | None:
        """What the step took; for a sample also how long each lane was busy in it, all stages together."""
        return self._cell(run.cell).observe(run, seconds, busy_s)

    def choice(self, cell: Cell) -> Arrangement | None:
        return self._cell(cell).choice

    def reason(self, cell: Cell) -> Reason | None:
        """Why the cell's steps are sequential; None when they are pipelined."""
        return self._cell(cell).reason

    def gain(self, cell: Cell) -> float | None:
        """How many times as fast as sequential; None while not measured."""
        return self._cell(cell).gain

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
