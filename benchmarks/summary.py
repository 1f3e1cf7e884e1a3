"""One table of what the kept results of one hardware say, beside targets and vLLM, and the plot of the decode step.

Measures nothing and needs no GPU: `python -m benchmarks.summary [HARDWARE]`, as the names of the results begin. Without
it, it is this machine, or the one GPU that there are results of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.decode_step_plot import plot
from benchmarks.pipeline_heat_map import best_of, cells_of
from benchmarks.report import RESULTS, environment, table
from benchmarks.shapes import PIPELINE_SHAPES, SHAPES

Row = Mapping[str, Any]


class Line(NamedTuple):
    """One figure, as text."""

    what: str
    measured: str
    floor: str = ""
    vllm: str = ""
    target: str = ""
    outcome: str = ""


class Source(NamedTuple):
    """A result that belongs into the table."""

    # Its file is <hardware>-<stem>.json.
    stem: str
    title: str
    lines: Callable[[Sequence[Row]], list[Line]]


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def at_most(value: float, target: float) -> str:
    return "met" if value <= target else f"missed by {(value / target - 1) * 100:.1f} %"


def at_least(value: float, target: float) -> str:
    return "met" if value >= target else f"missed by {(1 - value / target) * 100:.1f} %"


def _decode_step(rows: Sequence[Row]) -> list[Line]:
    return [
        Line(
            f"decode step, {row['model']}, batch {row['batch']:,}",
            number(row["step_ms"], "ms"),
            number(row["floor_ms"], "ms"),
            number(row["vllm_ms"], "ms"),
            f"≤ {number(row['target_ms'], 'ms')}",
            at_most(row["step_ms"], row["target_ms"]),
        )
        for row in rows
    ]


def _prefill(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for row in rows:
        what, _, unit = row["what"].rpartition(", ") if row["what"].endswith(", ms") else (row["what"], "", "")
        is_time = unit == "ms"
        judge, sign = (at_most, "≤") if is_time else (at_least, "≥")
        columns = {"measured": "ours", "floor": "floor", "vllm": "vllm"}
        figures = {name: number(row[key], unit) for name, key in columns.items()}
        target, outcome = f"{sign} {number(row['target'], unit)}", judge(row["ours"], row["target"])
        lines.append(Line(f"prefill, {row['model']}, {what}", **figures, target=target, outcome=outcome))
    return lines


def _mixed_workload(rows: Sequence[Row]) -> list[Line]:
    return [
        Line(
            f"mixed workload, {row['model']}",
            number(row["tokens_per_s"], "tokens/s"),
            vllm=number(row["vllm"], "tokens/s"),
            target=f"≥ {number(row['target'], 'tokens/s')}",
            outcome=at_least(row["tokens_per_s"], row["target"]),
        )
        for row in rows
    ]


def _through_services(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for row in rows:
        if not row["routers"]:
            continue
        counts = ("streams", "stream"), ("routers", "router"), ("clients", "client process")
        how = ", ".join(plural(row[key], noun) for key, noun in counts)
        if row["streams"] > 1:
            measured = (
                f"{number(row['ratio'])} of the engine's {number(row['tokens_per_s'] / row['ratio'], 'tokens/s')}"
            )
            lines.append(
                Line(f"through the services, {how}", measured, target="≥ 0.95", outcome=at_least(row["ratio"], 0.95))
            )
        added_ms = row["first_token_added_ms"]
        lines.append(
            Line(
                f"first token through the services, {how}",
                f"{number(added_ms, 'ms')} more than the engine alone",
                target="≤ 3 ms",
                outcome="met" if added_ms <= 3 else f"missed by {number(added_ms - 3, 'ms')}",
            )
        )
        if row.get("idle_share") is not None:
            lines.append(Line(f"share of a step that waits for the services, {how}", number(row["idle_share"])))
    return lines


def _handover(rows: Sequence[Row]) -> list[Line]:
    return [
        Line(
            f"hand-over on one GPU over {row['transport']}, {row['prompt_tokens']:,} tokens",
            f"p50 {number(row['p50_ms'])}, p99 {number(row['p99_ms'])} ms; at a client of the router "
            f"{number(row['router_p50_ms'])}, {number(row['router_p99_ms'])} ms",
        )
        for row in rows
    ]


def _interference(rows: Sequence[Row]) -> list[Line]:
    return [
        Line(
            f"64 decodes of Qwen3-8B, {row['what']}: largest gap between tokens",
            f"{number(row['largest_ms'], 'ms')}, p99 {number(row['p99_ms'], 'ms')}"
            + (f", {number(row['ratio'])} × the undisturbed step" if row["ratio"] else ""),
            vllm=number(row["vllm_ms"], "ms"),
            target=f"≤ {row['target_ratio']} ×" if row["target_ratio"] else "",
            outcome=at_most(row["ratio"], row["target_ratio"]) if row["target_ratio"] else "",
        )
        for row in rows
    ]


def _determinism_cost(rows: Sequence[Row]) -> list[Line]:
    return [
        Line(
            f"decode step with deterministic, {row['model']}, batch {row['batch']:,}",
            f"{number(row['deterministic_ms'], 'ms')}, {number(row['ratio'])} × the step without",
        )
        for row in rows
    ]


def _agreement(rows: Sequence[Row]) -> list[Line]:
    lines = []
    for row in rows:
        measured = f"{row['identical']} of {row['prompts']} prompts alike in all {row['tokens']} tokens"
        if row["first_divergence_min"] is not None:
            positions = (
                f"{row['first_divergence_min']} at the earliest, median {number(row['first_divergence_median'])}"
            )
            measured += f"; the others until token {positions}"
        target = "all" if row["must_be_identical"] else ""
        outcome = at_least(row["identical"], row["prompts"]) if target else ""
        lines.append(Line(f"greedy tokens, {row['what']}", measured, target=target, outcome=outcome))
    return lines


def _decode_pipeline(rows: Sequence[Row]) -> list[Line]:
    """The best cell; of 8B, among those that the target is for."""
    model = rows[0]["model"]
    has_target = model == SHAPES["8B"].name
    cells = [cell for cell in cells_of(rows) if not has_target or cell.num_seqs >= 512]
    if not cells:
        return []
    best = max((best_of(rows, cell) for cell in cells), key=lambda row: row["gain"])
    return [
        Line(
            f"attention/FFN pipeline, {model}, best of {plural(len(cells), 'cell')}: batch {best['batch']:,}, context "
            f"{best['context']:,}, {best['what']}",
            f"{number(best['gain'])} × as fast as the sequential step",
            target="≥ 1.10" if has_target else "",
            outcome=at_least(best["gain"], 1.1) if has_target else "",
        )
    ]


SOURCES = (
    *(Source(f"decode-step-{model.lower()}", f"decode step, {SHAPES[model].name}", _decode_step) for model in SHAPES),
    *(Source(f"prefill-{model.lower()}", f"prefill, {SHAPES[model].name}", _prefill) for model in SHAPES),
    Source("mixed-workload", "mixed workload", _mixed_workload),
    Source("through-services", "through the services", _through_services),
    Source("handover-gpu", "hand-over on one GPU", _handover),
    Source("interference", "decodes while a prompt arrives", _interference),
    Source("determinism-cost", "cost of determinism", _determinism_cost),
    Source("agreement", "agreement with Transformers", _agreement),
    *(
        Source(f"decode-pipeline-{model.lower()}", f"attention/FFN pipeline, {shape.name}", _decode_pipeline)
        for model, shape in PIPELINE_SHAPES.items()
    ),
)


def load(results: Path, hardware: str) -> dict[str, dict[str, Any]]:
    """What is kept, by stem."""
    paths = {source.stem: results / f"{hardware}-{source.stem}.json" for source in SOURCES}
    return {stem: json.loads(path.read_text()) for stem, path in paths.items() if path.exists()}


def summary(kept: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of the table, those of missing results among them."""
    rows = []
    for source in SOURCES:
        content = kept.get(source.stem)
        if content is None:
            rows.append(Line(source.title, "not run")._asdict() | {"commit": ""})
        else:
            rows += [line._asdict() | {"commit": content["commit"]} for line in source.lines(content["rows"])]
    return rows


def chosen_hardware(arguments: Sequence[str], results: Path) -> str:
    """Raises SystemExit: nothing is kept of it, or it has to be named."""
    known = sorted({json.loads(path.read_text())["slug"] for path in results.glob("*.json")})
    if arguments:
        if len(arguments) != 1 or arguments[0] not in known:
            raise SystemExit(f"name one hardware of {', '.join(known) or 'none'}, not {' '.join(arguments)}")
        return arguments[0]
    own = str(environment()["slug"])
    if not own.startswith("cpu-"):
        return own
    gpus = [slug for slug in known if not slug.startswith("cpu-")]
    if len(gpus) != 1:
        raise SystemExit(f"name one hardware of {', '.join(known) or 'none'}")
    return gpus[0]


def write(results: Path, hardware: str) -> Path:
    """Table and plot."""
    kept = load(results, hardware)
    if not kept:
        raise SystemExit(f"no results of {hardware} in {results.name}/")
    settings = dict.fromkeys(f"{content['hardware']}; {content['versions']}" for content in kept.values())
    lines = [f"# Results on {hardware}", "", *(f"- {setting}" for setting in settings), ""]
    picture = results / f"{hardware}-decode-step.png"
    try:
        if plot(kept, picture):
            lines += [f"![Decode step against batch]({picture.name})", ""]
    except ImportError:
        print("  no plot: matplotlib is not installed", flush=True)
    lines += table(summary(kept))
    lines += [
        "",
        "vLLM: 0.26.0 on one NVIDIA H200, measured once and not in these runs. Floor: what bytes at 4.2 TB/s and "
        "products at 800 TFLOP/s take. A row's commit is that of its run.",
        "",
    ]
    path = results / f"{hardware}-summary.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines), flush=True)
    return path


def run() -> None:
    if not sys.argv[1:]:
        # Names the GPU of this machine, where there is one.
        import torch  # noqa: F401
    write(RESULTS, chosen_hardware(sys.argv[1:], RESULTS))


if __name__ == "__main__":
    run()
