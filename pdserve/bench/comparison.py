"""Two JSON files of `pdserve bench` side by side. Points are matched by their load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdserve.bench.tables import LATENCIES, number

# Figures, and whether more is better.
ROWS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("output tokens/s", ("throughput", "output_tokens_per_s"), True),
    ("requests/s", ("throughput", "requests_per_s"), True),
    ("goodput, requests/s", ("goodput", "requests_per_s"), True),
    *((f"{title} {name}", (key, name), False) for key, title in LATENCIES for name in ("p50", "p99")),
    ("refused", ("requests", "refused"), False),
    ("failed", ("requests", "failed"), False),
)
# A difference below this is not coloured: two runs of the same thing differ as much.
NOISE = 0.05
SETTINGS = ("prompt_tokens", "output_tokens", "shared_prefix", "prompts", "as_text", "seed", "limits_ms")


def comparison(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, str]) -> RenderableType:
    """`names` stand above the columns."""
    ours = {point["load"]: point for point in before["points"]}
    theirs = {point["load"]: point for point in after["points"]}
    common = [load for load in ours if load in theirs]
    lines: list[RenderableType] = [Text(line, style="yellow") for line in differences(before, after)]
    lines += [_table(ours[load], theirs[load], names) for load in common]
    if left := [load for load in (*ours, *theirs) if (load in ours) != (load in theirs)]:
        lines.append(Text(f"in one of them alone: {', '.join(left)}", style="yellow"))
    return Group(*lines)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What makes the two less comparable than they look."""
    for name in SETTINGS:
        one, other = before["settings"].get(name), after["settings"].get(name)
        if one != other:
            yield f"{name} differs: {one} and {other}"
    for what, read in (
        ("model", _models),
        ("client machine", _machine),
        ("versions", lambda run: run["client"]["versions"]),
    ):
        if read(before) != read(after):
            yield f"{what} differs: {read(before)} and {read(after)}"


def change(before: float | None, after: float | None) -> float | None:
    """Relative; None where there is none to tell."""
    return None if before is None or after is None or before == 0 else after / before - 1


def _table(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, str]) -> Table:
    table = Table(title=before["load"], title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("change", justify="right", no_wrap=True)
    for title, path, more_is_better in ROWS:
        values = _at(before, path), _at(after, path)
        relative = change(*values)
        table.add_row(title, *map(number, values), _change(relative, more_is_better))
    return table


def _change(relative: float | None, more_is_better: bool) -> Text:
    if relative is None:
        return Text("–", style="dim")
    better = (relative > 0) is more_is_better
    style = "dim" if abs(relative) < NOISE else "green" if better else "red"
    return Text(f"{relative:+.1%}", style=style)


def _at(point: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    group, name = path
    return None if point[group] is None else point[group].get(name)


def _models(run: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{one['model']['model_id']} {' '.join(mark[:12] for mark in one['model']['model_fingerprints'])}"
        for one in run["targets"]
    )


def _machine(run: Mapping[str, Any]) -> str:
    return f"{run['client']['cores']} cores of {run['client']['cpu']}"
