"""The attention/FFN pipeline of a decode worker in Prometheus: its statistics, read once for each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "pdserve_decode_pipeline_"
LANES = ("attention", "ffn")


class Family(NamedTuple):
    """One metric. `values` finds its samples in the statistics, by label values."""

    name: str
    help: str
    labels: tuple[str, ...]
    values: Callable[[Any], Mapping[tuple[str, ...], float]]
    is_counter: bool = False

    def metric(self) -> Metric:
        kind = CounterMetricFamily if self.is_counter else GaugeMetricFamily
        return kind(PREFIX + self.name, self.help, labels=self.labels)


def _one(name: str) -> Callable[[Any], Mapping[tuple[str, ...], float]]:
    return lambda stats: {(): float(getattr(stats, name))}


def _of_lanes(suffix: str) -> Callable[[Any], Mapping[tuple[str, ...], float]]:
    return lambda stats: {(lane,): float(getattr(stats, f"{lane}_{suffix}")) for lane in LANES}


def _stage_seconds(stats: Any) -> Mapping[tuple[str, ...], float]:
    return {
        (lane, f"0.{percent}"): getattr(stats, f"{lane}_stage_p{percent}_ms") / 1e3
        for lane in LANES
        for percent in (50, 99)
    }


def _steps(stats: Any) -> Mapping[tuple[str, ...], float]:
    return {
        ("pipelined",): stats.num_pipelined_steps,
        ("sequential",): stats.num_steps - stats.num_pipelined_steps,
    }


def _reason(stats: Any) -> Mapping[tuple[str, ...], float]:
    return {(stats.fallback_reason,): 1.0} if stats.fallback_reason else {}


def _mode(stats: Any) -> Mapping[tuple[str, ...], float]:
    return {(stats.mode.value,): 1.0}


FAMILIES = (
    Family("mode", "1 for the mode that was asked for: auto, static or disabled.", ("mode",), _mode),
    Family("active", "1 while steps run on the attention/FFN pipeline.", (), _one("active")),
    Family("fallback", "1 for the reason why steps are sequential.", ("reason",), _reason),
    Family("steps", "Decode steps, by how they were computed.", ("how",), _steps, is_counter=True),
    Family("profiled_steps", "Steps whose stages were timed.", (), _one("num_profiled_steps"), is_counter=True),
    Family("switches", "From sequential to pipelined or back.", (), _one("num_switches"), is_counter=True),
    Family("rebalances", "Moves of SMs between the lanes.", (), _one("num_rebalances"), is_counter=True),
    Family("gain", "Speed against sequential steps; 0 while not measured.", (), _one("gain")),
    Family("sm_asked", "SMs asked for.", ("lane",), _of_lanes("sm_asked")),
    Family("sm", "SMs granted to what runs; 0 when sequential.", ("lane",), _of_lanes("sm")),
    Family("stage_seconds", "One stage of one layer, latest profiled steps.", ("lane", "quantile"), _stage_seconds),
    Family("occupancy", "Share of profiled steps in which a lane was busy.", ("lane",), _of_lanes("occupancy")),
    Family("queue_depth", "Stages that waited for their lane, mean.", ("lane",), _of_lanes("queue_depth")),
    Family("bubble_share", "Share of both lanes' time that no stage filled.", (), _one("bubble_share")),
    Family("handoff_bytes", "From attention to the FFN, per layer and token.", (), _one("handoff_bytes")),
)


class PipelineCollector(Collector):
    """Empty until `stats` is set to what gives the statistics."""

    def __init__(self) -> None:
        self.stats: Callable[[], Any] | None = None

    def describe(self) -> Iterator[Metric]:
        return (family.metric() for family in FAMILIES)

    def collect(self) -> Iterator[Metric]:
        if self.stats is None:
            return
        stats = self.stats()
        for family in FAMILIES:
            metric = family.metric()
            for labels, value in family.values(stats).items():
                metric.add_metric(labels, value)  # type: ignore[attr-defined]
            yield metric
