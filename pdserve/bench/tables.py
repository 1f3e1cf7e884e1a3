"""The figures of a run for people: one column a point of load, so that a sweep reads from left to right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdserve.bench.figures import BUSY_SHARE

Figures = Mapping[str, Any]

LATENCIES = (
    ("ttft_ms", "first token, ms"),
    ("inter_token_ms", "inter-token, ms"),
    ("e2e_ms", "end to end, ms"),
)
STAGES = (
    ("queue", "queue"),
    ("prefill", "prefill"),
    ("kv_transfer", "KV transfer"),
    ("first_decode", "first decode"),
)
PERCENTILES = ("p50", "p90", "p95", "p99")


def number(value: float | None) -> str:
    """Three figures or so: `0.123`, `4.56`, `78.9`, `1,234`."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def point_table(points: Sequence[Figures]) -> RenderableType:
    """A row a figure, a column a point."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("load", no_wrap=True)
    table.add_column("", style="dim", no_wrap=True)
    for point in points:
        table.add_column(point["load"], justify="right", no_wrap=True)
    for title, what, read in _rows():
        if title and table.row_count:
            table.add_row()
        table.add_row(title, what, *(number(read(point)) for point in points))
    return table


def remarks(points: Sequence[Figures], limits: Mapping[str, float | None]) -> Iterator[Text]:
    """What a reader has to know besides: serving paths, what was not OK, and whether the client kept up."""
    yield Text.assemble(("goodput      ", "dim"), _goodput(limits))
    paths = _added(point["paths"] for point in points)
    if paths:
        shares = ", ".join(f"{count:,} {path}" for path, count in paths.items())
        yield Text.assemble(("KV came      ", "dim"), shares)
    for pair, count in _added(point["workers"] for point in points).items():
        yield Text.assemble(("served by    ", "dim"), f"{pair}, {count:,}")
    for point in points:
        for status, count in point["requests"]["by_status"].items():
            if status != "OK":
                yield Text.assemble(("not OK       ", "dim"), (f"{count:,} {status} at {point['load']}", "yellow"))
        if not point["requests"]["measured"]:
            yield Text(f"at {point['load']} no request fell into the window: make it longer", style="yellow")
    if bound := [point for point in points if point["client"]["is_bottleneck"]]:
        yield Text(_bottleneck(bound), style="bold yellow")


def whole(points: Sequence[Figures], limits: Mapping[str, float | None]) -> RenderableType:
    return Group(point_table(points), Text(), *remarks(points, limits))


Read = Callable[[Figures], float | None]


def _rows() -> Iterator[tuple[str, str, Read]]:
    """Title, figure, and where it stands."""
    for place, name in enumerate(("measured", "OK", "refused", "failed")):
        yield "" if place else "requests", name, _value("requests", name.lower())
    yield "throughput", "output tokens/s", _value("throughput", "output_tokens_per_s")
    yield "", "requests/s", _value("throughput", "requests_per_s")
    yield "goodput", "requests/s", _value("goodput", "requests_per_s")
    yield "", "% of all", lambda point: point["goodput"]["share"] * 100
    for key, title in LATENCIES:
        for place, name in enumerate(PERCENTILES):
            yield "" if place else title, name, _value(key, name)
    for place, (stage, name) in enumerate(STAGES):
        yield "" if place else "stages, p50 ms", name, _value("stages_ms", stage, "p50")
    yield "tokens, mean", "prompt", _value("tokens", "prompt_mean")
    yield "", "output", _value("tokens", "output_mean")


def _value(*path: str) -> Read:
    """None where a point has no such figure, since nothing was measured."""

    def read(point: Figures) -> float | None:
        value: Any = point
        for name in path:
            value = None if value is None else value[name]
        return value

    return read


def _goodput(limits: Mapping[str, float | None]) -> str:
    names = {"ttft_ms": "first token", "inter_token_ms": "inter-token", "e2e_ms": "end to end"}
    given = [f"{names[key]} ≤ {limit:g} ms" for key, limit in limits.items() if limit is not None]
    return f"OK, and {', '.join(given)}" if given else "whatever is OK (no limits given)"


def _added(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    added: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            added[name] = added.get(name, 0) + count
    return added


def _bottleneck(points: Sequence[Figures]) -> str:
    loads = ", ".join(point["load"] for point in points)
    late, lag, busiest = (
        max(point["client"][name] for point in points)
        for name in ("late_p99_ms", "loop_lag_p99_ms", "busiest_loop_share")
    )
    remedy = "give it more --processes" if busiest > BUSY_SHARE else "give it cores of its own, or a machine"
    return (
        f"the client did not keep up at {loads}: at p99 it sent {late:.1f} ms late and heard {lag:.1f} ms late, and "
        f"its busiest process took {busiest:.0%} of a core. Latencies have that in them: {remedy}."
    )
