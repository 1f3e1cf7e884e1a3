"""`python -m common.metrics_page` prints docs/metrics.md, the table of all metrics."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from common.metrics import DecodeMetrics, Metrics, PrefillMetrics, RouterMetrics, WorkerMetrics

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
        _row(metric)
        for name, metric in vars(metrics).items()
        if isinstance(metric, MetricWrapperBase) and name not in shown_already
    ]
    return "\n".join([f"## {title}", "", "| name | type | labels | what it says |", "|---|---|---|---|", *rows, ""])


def _row(metric: MetricWrapperBase) -> str:
    (family,) = metric.describe()
    name = family.name + ("_total" if family.type == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


if __name__ == "__main__":
    print(page(), end="")
