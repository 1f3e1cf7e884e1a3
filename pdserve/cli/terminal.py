"""Where commands print, and how numbers read: rich on a terminal, in a pipe or a file lines that are never wrapped."""

from __future__ import annotations

from rich.console import Console

_ENDLESS = 10_000


def console(*, stderr: bool = False) -> Console:
    """Made anew by each command, for the stdout or stderr of that moment."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _ENDLESS
    return made


def counted(number: int, noun: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
