"""Tables that fit: columns that a narrow terminal has no room for are left out, the least important first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Column(NamedTuple):
    """`cell` makes its text of a row. The larger `spare`, the sooner it is left out; 0: never."""

    title: str
    cell: Callable[[Any], Text | str]
    spare: int = 0
    is_number: bool = True


def table(console: Console, columns: Sequence[Column], rows: Sequence[Any], *, first_width: int = 0) -> Table:
    """Of those columns that fit the console beside each other, the first at least so wide."""
    shown = list(columns)
    while True:
        made = _table(shown, rows, first_width)
        spare = max(shown, key=lambda column: column.spare)
        if not spare.spare or _width(console, made) <= console.width:
            return made
        shown.remove(spare)


def shared_out(wanted: Sequence[int], available: int, *, at_least: int = 1) -> list[int]:
    """Lines for each section: what it wants, or its fair share of what is there."""
    given = [min(number, at_least) for number in wanted]
    while sum(given) < available and given != list(wanted):
        least = min((number, place) for place, number in enumerate(given) if number < wanted[place])
        given[least[1]] += 1
    return given


def _table(columns: Sequence[Column], rows: Sequence[Any], first_width: int) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            min_width=None if place else first_width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows:
        made.add_row(*(column.cell(row) for column in columns))
    return made


def _width(console: Console, made: Table) -> int:
    """What it would like to have."""
    return console.measure(made, options=console.options.update(max_width=10_000)).maximum
