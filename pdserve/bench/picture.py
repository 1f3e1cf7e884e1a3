"""The PNG of a run: a sweep as curves against the load, a single point as distributions and a time line.

matplotlib is imported only here, and only when a picture is asked for: the extra `bench` brings it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.settings import ConfigError
from pdserve.bench.figures import inter_token_ms, ttft_ms
from pdserve.bench.following import Sent
from pdserve.bench.tables import LATENCIES, PERCENTILES

COLOURS = {"p50": "#4c78a8", "p90": "#72b7b2", "p95": "#eeca3b", "p99": "#e45756"}
GOOD, ALL, LIMIT = "#54a24b", "#4c78a8", "#888888"
NUM_BINS = 60


class Trace(NamedTuple):
    """What became of the requests of one point, and when the load began."""

    start_s: float
    sent: Sequence[Sent]


def require() -> None:
    """Before anything is measured. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'pdserve[bench]'") from None
    matplotlib.use("Agg")


def draw(path: str, run: Mapping[str, Any], trace: Trace) -> None:
    """`trace` is of the last point. Raises ConfigError when the file cannot be written."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5))
    panels = list(axes.flat)
    if len(run["points"]) > 1:
        _sweep(panels, run)
    else:
        _single(panels, run, trace)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    models = ", ".join(dict.fromkeys(target["model"]["model_id"] for target in run["targets"]))
    settings = run["settings"]
    prompts = f"prompts {settings['prompts'] or settings['prompt_tokens']}"
    figure.suptitle(f"{models} · {prompts} · output {settings['output_tokens']} tokens · {run['started']}", fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _sweep(panels: Sequence[Any], run: Mapping[str, Any]) -> None:
    points = run["points"]
    is_open = points[0]["rate"] is not None
    loads = [point["rate"] if is_open else point["concurrency"] for point in points]
    what = "requests/s asked for" if is_open else "requests at a time"
    for panel, (key, title) in zip(panels, LATENCIES, strict=False):
        for name in PERCENTILES:
            values = [(point[key] or {}).get(name, math.nan) for point in points]
            panel.plot(loads, values, "o-", markersize=4, color=COLOURS[name], label=name)
        limit = run["settings"]["limits_ms"][key]
        if limit is not None:
            panel.axhline(limit, linestyle="--", color=LIMIT, label=f"limit {limit:g}")
        panel.set(title=title, xlabel=what, ylim=(0, None))
        panel.legend(fontsize=8)
    panel = panels[3]
    panel.plot(loads, [point["throughput"]["requests_per_s"] for point in points], "o-", color=ALL, label="completed")
    panel.plot(loads, [point["goodput"]["requests_per_s"] for point in points], "o-", color=GOOD, label="goodput")
    if is_open:
        panel.plot(loads, loads, ":", color=LIMIT, label="asked for")
    panel.set(title="requests/s", xlabel=what, ylim=(0, None))
    panel.legend(fontsize=8)


def _single(panels: Sequence[Any], run: Mapping[str, Any], trace: Trace) -> None:
    (point,) = run["points"]
    ok = [one for one in trace.sent if one.is_measured and one.is_ok]
    limits = run["settings"]["limits_ms"]
    firsts = [value for one in ok if (value := ttft_ms(one)) is not None]
    gaps = [value for one in ok for value in inter_token_ms(one)]
    _distribution(panels[0], firsts, point["ttft_ms"], limits["ttft_ms"], "first token, ms", "requests")
    _distribution(panels[1], gaps, point["inter_token_ms"], limits["inter_token_ms"], "inter-token, ms", "tokens")
    _tokens_over_time(panels[2], point, trace)
    _requests_over_time(panels[3], point, trace)


def _distribution(
    panel: Any, values: Sequence[float], spread: Mapping[str, float] | None, limit: float | None, title: str, what: str
) -> None:
    panel.set(title=title, ylabel=what, xlabel="ms")
    if spread is None:
        return
    # The few beyond do not press the rest into one bar; they stand in the last one.
    most = max(spread["p99"] * 1.5, 1e-6)
    panel.hist([min(value, most) for value in values], bins=NUM_BINS, range=(0, most), color=ALL, alpha=0.75)
    for name in PERCENTILES:
        panel.axvline(spread[name], color=COLOURS[name], label=f"{name} {spread[name]:.3g}")
    if limit is not None:
        panel.axvline(limit, linestyle="--", color=LIMIT, label=f"limit {limit:g}")
    panel.legend(fontsize=8, title=f"largest {spread['max']:.3g}", title_fontsize=8)


def _tokens_over_time(panel: Any, point: Mapping[str, Any], trace: Trace) -> None:
    events = [(at_s - trace.start_s, count) for one in trace.sent for at_s, count in one.messages]
    length_s = max((at_s for at_s, _ in events), default=1.0)
    bin_s = max(0.25, length_s / 120)
    counts = [0.0] * (int(length_s / bin_s) + 1)
    for at_s, count in events:
        counts[int(at_s / bin_s)] += count
    edges = [bin_s * place for place in range(len(counts))]
    panel.step(edges, [count / bin_s for count in counts], where="post", color=ALL)
    panel.set(title="output tokens/s", xlabel="s", ylim=(0, None))
    _window(panel, point)


def _requests_over_time(panel: Any, point: Mapping[str, Any], trace: Trace) -> None:
    changes = sorted(
        [(one.due_s - trace.start_s, 1) for one in trace.sent]
        + [(one.ended_s - trace.start_s, -1) for one in trace.sent]
    )
    times, open_now, number = [], [], 0
    for at_s, step in changes:
        number += step
        times.append(at_s)
        open_now.append(number)
    panel.step(times, open_now, where="post", color=ALL, label="open requests")
    failed = [one.ended_s - trace.start_s for one in trace.sent if not one.is_ok]
    if failed:
        panel.plot(failed, [0] * len(failed), "x", color=COLOURS["p99"], label="not OK", clip_on=False)
        panel.legend(fontsize=8)
    panel.set(title="requests that are open", xlabel="s", ylim=(0, None))
    _window(panel, point)


def _window(panel: Any, point: Mapping[str, Any]) -> None:
    """What counts is on white."""
    panel.axvspan(0, point["warmup_s"], color=LIMIT, alpha=0.15, linewidth=0)
    right = panel.get_xlim()[1]
    panel.axvspan(point["warmup_s"] + point["window_s"], max(right, 0), color=LIMIT, alpha=0.15, linewidth=0)
    panel.set_xlim(0, right)
