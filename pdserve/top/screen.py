"""One frame of `pdserve top`, as rich draws it. Colours underline what words and bars say already."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from pdserve.cli.failures import describe
from pdserve.top.cluster import PipelineRow, RouterRow, View, WorkerRow
from pdserve.top.columns import Column, shared_out, table
from pdserve.top.sorting import in_order, used_share

STATES = {"SERVING": "green", "DRAINING": "yellow", "UNREACHABLE": "bold red"}
BAR, SPLIT, SPARK = 12, 12, 16
LEVELS = "▁▂▃▄▅▆▇█"


def frame(console: Console, view: View, *, order: str, time: datetime.datetime, keys: str = "") -> RenderableType:
    """Fits the console's width, and its height where `keys` has a line of help, which an interactive screen shows."""
    parts: list[RenderableType] = [_head(console, view, time)]
    sections = list(_sections(view, order))
    most = [len(rows) for _, _, rows in sections]
    notes = list(_notes(view))
    if keys:
        # Each section: an empty line, its title, and the line that says how many more there are.
        most = shared_out(most, console.height - 2 - len(notes) - 3 * len(sections))
    # Tables below each other begin alike.
    names = [Text.assemble(columns[0].cell(row)) for _, columns, rows in sections for row in rows]
    widest = max((name.cell_len for name in names), default=0)
    for (title, columns, rows), number in zip(sections, most, strict=True):
        made = table(console, columns, rows[:number], first_width=min(widest, console.width // 4))
        parts += [Text(), Text(title, style="bold"), made]
        if number < len(rows):
            parts.append(Text(f"… {len(rows) - number} more", style="dim"))
    if notes:
        parts += [Text(), *notes]
    if keys:
        parts.append(Text(keys, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _head(console: Console, view: View, time: datetime.datetime) -> Text:
    running = sum(row.load.num_running_requests for row in view.routers if row.load)
    queued = sum(row.load.num_queued_requests for row in view.routers if row.load)
    left = Text.assemble(
        ("pdserve top", "bold"),
        f"  {running:,} running · {queued:,} waiting · {_rate(_added(view, 'out_per_s'))} tokens/s out · "
        f"{_rate(_added(view, 'in_per_s'))} in",
    )
    right = f"{time:%H:%M:%S}"
    left.truncate(console.width, overflow="ellipsis")
    gap = console.width - left.cell_len - len(right)
    # A pipe has no right edge.
    return Text.assemble(left, " " * gap if console.is_terminal else "  ", (right, "dim")) if gap > 0 else left


def _sections(view: View, order: str) -> Iterator[tuple[str, Sequence[Column], Sequence[Any]]]:
    yield "routers", ROUTERS, view.routers
    for role in ("DECODE", "PREFILL"):
        if rows := in_order(view.of_role(role), order):
            yield role.lower(), DECODE if role == "DECODE" else PREFILL, rows
    if view.pipelines:
        yield "attention/FFN pipelines", PIPELINES, view.pipelines


def _notes(view: View) -> Iterator[Text]:
    if view.is_old:
        yield Text("no router answers: what is shown of workers is old", style="bold red")
    watched: list[RouterRow | PipelineRow] = [*view.routers, *view.pipelines]
    for silent in watched:
        # Wrapped: a reason that is cut off says nothing.
        if silent.error is not None:
            name = silent.address if isinstance(silent, RouterRow) else f"pipeline of {silent.name}"
            yield Text(f"{name}: {describe(silent.error)}", style="red")
    if view.degraded:
        yield Text("degraded: no prefill worker is alive, so decode workers prefill locally", style="yellow")
    for row in view.workers:
        if row.worker.pressure:
            reasons = ", ".join(reason.lower().replace("_", " ") for reason in row.worker.pressure)
            yield Text(f"{_name(row)} is under pressure and gets no new prompts: {reasons}", style="yellow")
    models = sorted({row.worker.model_fingerprint[:12] for row in view.workers} - {""})
    if len(models) > 1:
        yield Text(f"{len(models)} models, as in a rolling upgrade: {', '.join(models)}", style="yellow")


def _router_state(row: RouterRow) -> Text:
    if row.error is None:
        return Text("answers", style="green") if row.load else Text("…", style="dim")
    return Text(_silence(row.age_s), style="bold red")


def _silence(age_s: float | None) -> str:
    return "never answered" if age_s is None else f"silent for {age_s:.0f} s"


def _load(row: RouterRow, field: str) -> str:
    # A router that tells nothing of itself is older than this command.
    return f"{getattr(row.load, field):,}" if row.load and row.load.boot_id else "–"


def _name(row: WorkerRow) -> str:
    return row.worker.instance_id or "?"


def _worker_name(row: WorkerRow) -> Text:
    return Text(_name(row), style="dim" if row.is_old else "")


def _state(row: WorkerRow) -> Text:
    return Text("/").join(Text(state, style=STATES.get(state, "")) for state in row.states)


def _blocks(row: WorkerRow) -> Text:
    """█ held by sequences, ▒ free with a reusable prefix, ░ free; and the share that is held."""
    worker, used = row.worker, used_share(row)
    if not worker.num_total_blocks:
        return Text("–", style="dim")
    style = "red" if used > 0.9 else "yellow" if used > 0.7 else "green"
    held = min(BAR, -(-(worker.num_total_blocks - worker.num_free_blocks) * BAR // worker.num_total_blocks))
    cached = min(BAR - held, round(worker.num_cached_blocks * BAR / worker.num_total_blocks))
    bar = [("█" * held, style), ("▒" * cached, style), ("░" * (BAR - held - cached), "dim")]
    return Text.assemble(*bar, f" {used:4.0%}")


def _spark(row: WorkerRow) -> Text:
    """The last rates, the highest of them as high as the line."""
    latest = list(row.history)[-SPARK:]
    most = max(latest, default=0.0)
    if not most:
        return Text("▁" * len(latest), style="dim")
    # Anything above 0 shows.
    marks = (0 if not value else max(1, round(value / most * (len(LEVELS) - 1))) for value in latest)
    return Text("".join(LEVELS[mark] for mark in marks), style="cyan")


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def _added(view: View, field: str) -> float | None:
    values = [value for row in view.workers if (value := getattr(row, field)) is not None]
    return sum(values) if values else None


def _ms(value: float) -> str:
    if not value:
        return "–"
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def _runs(row: PipelineRow) -> Text:
    stats = row.stats
    if row.error is not None:
        return Text(_silence(row.age_s), style="red")
    if stats is None:
        return Text("…", style="dim")
    if stats.active:
        return Text(f"pipelined, cut {stats.cut}", style="green")
    return Text(f"sequential: {stats.fallback_reason}", style="dim")


def _split(row: PipelineRow) -> Text:
    """SMs of attention and of the FFN."""
    stats = row.stats
    if stats is None or not stats.attention_sm + stats.ffn_sm:
        return Text("–", style="dim")
    attention = round(stats.attention_sm * SPLIT / (stats.attention_sm + stats.ffn_sm))
    bar = ("█" * attention, "magenta"), ("█" * (SPLIT - attention), "blue")
    return Text.assemble(f"{stats.attention_sm:>3} ", *bar, f" {stats.ffn_sm:<3}")


def _stages(row: PipelineRow) -> str:
    stats = row.stats
    if stats is None or not stats.num_profiled_steps:
        return "–"
    return f"{stats.attention_stage_p50_ms:.3f} / {stats.ffn_stage_p50_ms:.3f} ms"


def _gain(row: PipelineRow) -> str:
    return f"{row.stats.gain:.2f} x" if row.stats and row.stats.gain else "–"


def _pipelined(row: PipelineRow) -> str:
    stats = row.stats
    return f"{stats.num_pipelined_steps / stats.num_steps:.0%}" if stats and stats.num_steps else "–"


ROUTERS = (
    Column("router", lambda row: row.load.instance_id or row.address if row.load else row.address, is_number=False),
    Column("address", lambda row: row.address, spare=4, is_number=False),
    Column("running", lambda row: _load(row, "num_running_requests")),
    Column("waiting", lambda row: _load(row, "num_queued_requests")),
    Column("tokens waiting", lambda row: _load(row, "num_queued_tokens"), spare=5),
    Column("held back", lambda row: _load(row, "num_held_requests"), spare=3),
    Column("OK/s", lambda row: _rate(row.ok_per_s)),
    Column("refused/s", lambda row: _rate(row.refused_per_s), spare=1),
    Column("failed/s", lambda row: _rate(row.failed_per_s), spare=1),
    Column("", _router_state, is_number=False),
)
_WORKER = Column("worker", _worker_name, is_number=False)
_ADDRESS = Column("address", lambda row: row.worker.address, spare=6, is_number=False)
_STATE = Column("state", _state, is_number=False)
_BLOCKS = Column("KV blocks", _blocks, spare=3, is_number=False)
_RUNNING = Column("run", lambda row: f"{row.worker.num_running:,}")
_WAITING = Column("wait", lambda row: f"{row.worker.num_waiting:,}")
_PAIRS = Column("pairs", lambda row: f"{row.worker.num_pairs:,}", spare=4)
_STEP = Column("step", lambda row: _ms(row.worker.step_ms), spare=2)
_HISTORY = Column("", _spark, spare=7, is_number=False)
DECODE = (
    _WORKER,
    _ADDRESS,
    _STATE,
    _BLOCKS,
    _RUNNING,
    Column("KV coming", lambda row: f"{row.worker.num_reserved:,}", spare=5),
    _WAITING,
    _PAIRS,
    _STEP,
    Column("tokens/s", lambda row: _rate(row.out_per_s)),
    _HISTORY,
)
PREFILL = (
    _WORKER,
    _ADDRESS,
    _STATE,
    _BLOCKS,
    _RUNNING,
    _WAITING,
    Column("tokens left", lambda row: f"{row.worker.num_waiting_tokens:,}", spare=5),
    _PAIRS,
    _STEP,
    Column("tokens/s", lambda row: _rate(row.in_per_s)),
    _HISTORY,
)
PIPELINES = (
    Column("worker", lambda row: row.name, is_number=False),
    Column("mode", lambda row: row.stats.mode.lower() if row.stats else "", is_number=False),
    Column("SMs attention:FFN", _split, spare=1, is_number=False),
    Column("stages, p50", _stages, spare=2),
    Column("pipelined", _pipelined, spare=4),
    Column("step", lambda row: _ms(row.stats.total_ms) if row.stats else "", spare=3),
    Column("gain", _gain),
    Column("", _runs, is_number=False),
)
