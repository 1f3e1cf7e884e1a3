"""`python -m common.metrics_page` prints docs/metrics.md, the table of all metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from common.metrics import DecodeMetrics, Metrics, PrefillMetrics, RouterMetrics, WorkerMetrics
from common.pipeline_metrics import FAMILIES, PipelineCollector

HEAD = """\
# Metrics

Each service serves its own over HTTP at `--metrics-listen` (router 9101, prefill 9102, decode 9103), beside the
`process_*` metrics of its process. This page is printed from `common/metrics.py` by `make docs`.
"""


def page() -> str:
    of_workers = set(vars(WorkerMetrics()))
    sections = [
        _section("Router", RouterMetrics(), set()),
        _section("Prefill and decode", WorkerMetrics(), set()),
        _section("Prefill", PrefillMetrics(), of_workers),
        _section("Decode", DecodeMetrics(), of_workers),
    ]
    return "\n".join([HEAD, *sections])


def _section(title: str, metrics: Metrics, shown_already: set[str]) -> str:
    rows = [
        _row(family, labels)
        for name, metric in vars(metrics).items()
        if name not in shown_already
        for family, labels in families(metric)
    ]
    return "\n".join([f"## {title}", "", "| name | type | labels | what it says |", "|---|---|---|---|", *rows, ""])


def families(metric: object) -> Iterator[tuple[Metric, Sequence[str]]]:
    """Those of an attribute of Metrics, each with its labels."""
    if isinstance(metric, MetricWrapperBase):
        (family,) = metric.describe()
        yield family, metric._labelnames
    elif isinstance(metric, PipelineCollector):
        yield from zip(metric.describe(), (family.labels for family in FAMILIES), strict=True)


def _row(family: Metric, label_names: Sequence[str]) -> str:
    name = family.name + ("_total" if family.type == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in label_names)
    return f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


if __name__ == "__main__":
    print(page(), end="")
