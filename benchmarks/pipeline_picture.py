"""A picture of steps in two lanes: which stage of which micro-batch runs when, and where a lane stands idle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode_service.pipeline.order import Lane, Stage, Timeline
from decode_service.pipeline.trace import Track, micro_batch_name

# Of micro-batches, in two shades for layers in turn. Colours of Okabe and Ito, which the colour-blind tell apart.
COLOURS = (("#0072B2", "#5BA9D6"), ("#D55E00", "#F09A55"), ("#009E73", "#5CC4A5"), ("#CC79A7", "#E3B1CD"))
WHOLE = ("#555555", "#8C8C8C")
IDLE = "#EFEFEF"
HEIGHT = 0.78


def idle_share(track: Track, lane: Lane) -> float:
    """Of the time of its steps, how much the lane stands idle."""
    steps = [Timeline(dict(spans)) for spans in track.steps]
    return 1 - sum(step.busy_s(lane) for step in steps) / sum(step.makespan_s for step in steps)


def step_s(track: Track) -> float:
    """Mean of its steps."""
    return sum(Timeline(dict(spans)).makespan_s for spans in track.steps) / len(track.steps)


def draw(tracks: Sequence[Track], path: Path, *, title: str) -> None:
    """Writes a PNG: the last step of each track, below one another, on one axis of time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    longest_ms = max(Timeline(dict(track.steps[-1])).makespan_s for track in tracks) * 1e3
    figure, panels = pyplot.subplots(
        len(tracks), 1, figsize=(14, 1.3 + 1.9 * len(tracks)), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, track in zip(panels[:, 0], tracks, strict=True):
        _draw_track(panel, track, longest_ms)
    panels[-1, 0].set_xlabel("milliseconds from the start of the step")
    most = max(track.order.num_micro_batches for track in tracks)
    handles = [
        Patch(color=COLOURS[index % len(COLOURS)][0], label=f"micro-batch {micro_batch_name(index)}")
        for index in range(most)
    ]
    if any(track.order.num_micro_batches == 1 for track in tracks):
        handles.append(Patch(color=WHOLE[0], label="whole batch"))
    handles.append(Patch(facecolor=IDLE, edgecolor="#BBBBBB", hatch="////", label="idle"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_track(panel: Any, track: Track, longest_ms: float) -> None:
    spans = track.steps[-1]
    end_ms = Timeline(dict(spans)).makespan_s * 1e3
    places = {Lane.ATTENTION: 1, Lane.FFN: 0}
    for place in places.values():
        panel.barh(place, end_ms, height=HEIGHT, color=IDLE, edgecolor="#CCCCCC", hatch="////", linewidth=0, zorder=1)
    for stage, span in spans.items():
        width_ms = (span.end_s - span.start_s) * 1e3
        panel.barh(
            places[stage.lane],
            width_ms,
            left=span.start_s * 1e3,
            height=HEIGHT,
            color=_colour(track, stage),
            edgecolor="white",
            linewidth=0.4,
            zorder=2,
        )
        # Where there is room for the number of any layer.
        if width_ms / longest_ms > 0.007 * len(str(track.order.num_layers)) + 0.003:
            middle_ms = (span.start_s + span.end_s) / 2 * 1e3
            panel.text(
                middle_ms,
                places[stage.lane],
                str(stage.layer),
                ha="center",
                va="center",
                fontsize=8,
                color="white",
                zorder=3,
            )
    panel.set_yticks(
        list(places.values()),
        [f"{track.title(lane)}\n{idle_share(track, lane):.0%} idle" for lane in places],
        fontsize=10,
    )
    panel.set_ylim(-0.5, 1.5)
    panel.set_xlim(0, longest_ms * 1.005)
    panel.axvline(end_ms, color="black", linewidth=1)
    panel.set_title(f"{track.name}: {_ms(step_s(track))} ms a step", loc="left", fontsize=10)
    panel.tick_params(axis="y", length=0)
    for edge in ("top", "right", "left"):
        panel.spines[edge].set_visible(False)


def _colour(track: Track, stage: Stage) -> str:
    shades = WHOLE if track.order.num_micro_batches == 1 else COLOURS[stage.micro_batch % len(COLOURS)]
    return shades[stage.layer % 2]


def _ms(seconds: float) -> str:
    """Three digits."""
    ms = seconds * 1e3
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}"
