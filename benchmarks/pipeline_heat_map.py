"""The picture of what the attention/FFN pipeline gains: batch against context, the best arrangement in each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decode_service.pipeline.arrangements import Cell

# Gains at the ends of the colour scale, and beyond.
MOST = 1.2
# From here on a cell's colour is dark.
DARK = 1.13


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    return list(dict.fromkeys(Cell(row["batch"], row["context"]) for row in rows))


def best_of(rows: Sequence[Mapping[str, Any]], cell: Cell) -> Mapping[str, Any]:
    """The fastest pipelined step of a cell."""
    pipelined = [row for row in rows if row["pipelined"] and Cell(row["batch"], row["context"]) == cell]
    return min(pipelined, key=lambda row: row["ms"])


def label(row: Mapping[str, Any]) -> str:
    """What a cell shows: the gain, and which arrangement has it."""
    return "\n".join([f"{row['gain']:.2f} ×", *row["what"].replace(", ", " ").split(" ", 1)])


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Writes a PNG. Raises ImportError: matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = cells_of(rows)
    batches = sorted({cell.num_seqs for cell in cells})
    contexts = sorted({cell.context for cell in cells})
    best = {cell: best_of(rows, cell) for cell in cells}
    # In doublings, so that 1/x is as far from 1 as x.
    doublings = [
        [math.log2(best[cell]["gain"]) if cell in best else math.nan for cell in (Cell(batch, one) for one in contexts)]
        for batch in batches
    ]
    figure, panel = pyplot.subplots(
        figsize=(4.2 + 1.5 * len(contexts), 2.2 + 0.85 * len(batches)), layout="constrained"
    )
    # Brown is slower, green is faster: apart also for the colour-blind.
    limit = math.log2(MOST)
    image = panel.imshow(doublings, cmap="BrBG", origin="lower", aspect="auto", vmin=-limit, vmax=limit)
    panel.set_facecolor("#eeeeee")
    for row, batch in enumerate(batches):
        for column, context in enumerate(contexts):
            found = best.get(Cell(batch, context))
            text = "not\nmeasured" if found is None else label(found)
            is_dark = found is not None and not 1 / DARK < found["gain"] < DARK
            colour = "#888888" if found is None else "white" if is_dark else "black"
            panel.text(column, row, text, ha="center", va="center", fontsize=9, color=colour, linespacing=1.25)
    panel.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    panel.set_yticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    panel.set(xlabel="context (tokens)", ylabel="batch (sequences)")
    panel.tick_params(length=0)
    for edge in panel.spines.values():
        edge.set_visible(False)
    panel.set_xticks([index + 0.5 for index in range(len(contexts) - 1)], minor=True)
    panel.set_yticks([index + 0.5 for index in range(len(batches) - 1)], minor=True)
    panel.grid(which="minor", color="white", linewidth=2)
    panel.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=panel, extend="both", shrink=0.9)
    ticks = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
    bar.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:.2f} ×" for tick in ticks])
    bar.set_label("sequential step / best pipelined step")
    name, _, setting = title.partition(", ")
    figure.suptitle(f"Gain of the attention/FFN pipeline, {name}", fontsize=12)
    panel.set_title(setting, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
