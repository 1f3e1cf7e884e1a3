"""The plot of the decode step against the batch, from kept results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES

# Of each column: its label, and how it is drawn. Colours of Okabe and Ito, which the colour-blind tell apart.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm_ms": ("vLLM 0.26.0", {"color": "#D55E00", "marker": "s"}),
    "target_ms": (
        "target",
        {"color": "#009E73", "linestyle": ":", "marker": "D", "markerfacecolor": "white", "zorder": 3},
    ),
    "step_ms": ("pdserve", {"color": "#0072B2", "marker": "o", "linewidth": 2.5}),
    "floor_ms": ("floor", {"color": "#555555", "linestyle": "--"}),
}


def plot(kept: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Step time against batch, a panel for each model; False where no decode step was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    models = [model for model in SHAPES if f"decode-step-{model.lower()}" in kept]
    if not models:
        return False
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(1.5 + 5 * len(models), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[0], models, strict=True):
        rows = kept[f"decode-step-{model.lower()}"]["rows"]
        batches = [row["batch"] for row in rows]
        ends = {}
        for key, (label, style) in STYLES.items():
            values = [row[key] for row in rows]
            panel.plot(batches, values, label=label, **{"linewidth": 1.5, "markersize": 5, **style})
            ends[key] = values[-1]
        panel.set(xscale="log", yscale="log", xlabel="batch (sequences)", title=SHAPES[model].name)
        panel.set_xlim(batches[0] * 0.85, batches[-1] * 9)
        panel.margins(y=0.08)
        panel.xaxis.set_major_locator(ticker.FixedLocator(batches))
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.tick_params(labelleft=True)
        panel.grid(True, color="#dddddd", linewidth=0.6)
        for key, place in apart(ends).items():
            label, style = STYLES[key]
            text = f"{label.split()[0]} {ends[key]:.3g} ms"
            panel.text(batches[-1] * 1.15, place, text, color=style["color"], va="center", fontsize=9)
    panels[0][0].set_ylabel("decode step (ms)")
    panels[0][0].legend(loc="upper left", frameon=False)
    hardware = kept[f"decode-step-{models[0].lower()}"]["hardware"].partition(",")[0]
    figure.suptitle(f"Decode step, prompts of 512 tokens, 128 tokens out, {hardware}; labels at the largest batch")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def apart(values: Mapping[str, float], *, least: float = 0.085) -> dict[str, float]:
    """Where labels of these values go on a logarithmic axis so that none covers another: `least` decades apart."""
    names = sorted(values, key=lambda name: values[name])
    places = [math.log10(values[name]) for name in names]
    for _ in range(100):
        for low in range(len(places) - 1):
            lacking = least - (places[low + 1] - places[low])
            if lacking > 1e-9:
                places[low] -= lacking / 2
                places[low + 1] += lacking / 2
    return {name: 10**place for name, place in zip(names, places, strict=True)}
