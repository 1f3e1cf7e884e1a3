"""Percentiles of measured values, as numpy's default has them: between two values, in proportion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

PERCENTS = (50, 90, 95, 99)


def percentile(ordered: list[float], percent: float) -> float:
    """Of values in ascending order, at least one."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Iterable[float]) -> Mapping[str, float] | None:
    """Mean, p50 to p99 and the largest; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    percents = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTS}
    return {"mean": math.fsum(ordered) / len(ordered), **percents, "max": ordered[-1]}
