"""What the services really export, and whether a query asks for anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import grpc
import promql_parser

from common.load import PressureReason
from common.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from common.metrics_page import families
from decode_service.pipeline.decisions import Mode
from router.workers import Role, WorkerState

# What Prometheus adds to whatever it scrapes.
TARGET = frozenset({"instance", "job", "namespace", "pod"})
# Values of labels that are known beforehand.
VALUES: Mapping[str, Set[str]] = {
    "role": {role.value for role in Role},
    "state": {state.value for state in WorkerState},
    "code": {code.name for code in grpc.StatusCode} - {"UNKNOWN"},
    "mode": {mode.value for mode in Mode},
    "cause": {"CHECKSUM_MISMATCH", "HANDED_OVER", "KV_LOST", "PREEMPTED", "WORKER_LOST"},
    "reason": {reason.value for reason in PressureReason},
}


def exported() -> dict[str, frozenset[str]]:
    """The labels of every series, by its name."""
    series: dict[str, frozenset[str]] = {}
    for metrics in (RouterMetrics(), PrefillMetrics(), DecodeMetrics()):
        for metric in vars(metrics).values():
            for family, labels in families(metric):
                for name, more in _series(family.name, family.type):
                    series[name] = frozenset(labels) | more
        for family in metrics.registry.collect():
            for sample in family.samples:
                series.setdefault(sample.name, frozenset(sample.labels))
    return series


def _series(name: str, kind: str) -> list[tuple[str, frozenset[str]]]:
    if kind == "histogram":
        return [(name + "_bucket", frozenset({"le"})), (name + "_sum", frozenset()), (name + "_count", frozenset())]
    return [(name + "_total" if kind == "counter" else name, frozenset())]


def faults(query: str, series: Mapping[str, frozenset[str]]) -> list[str]:
    """Series, labels and values in `query` that nobody exports. Raises ValueError when it is not PromQL."""
    found, wrong = set(TARGET), []
    tree = promql_parser.parse(query)
    for node in walk(tree):
        if not isinstance(node, promql_parser.VectorSelector):
            continue
        if node.name not in series:
            wrong.append(f"no series {node.name}")
            continue
        found |= series[node.name]
        for matcher in node.matchers.matchers:
            if matcher.name not in series[node.name] | TARGET:
                wrong.append(f"{node.name} has no label {matcher.name}")
            elif matcher.name in VALUES:
                unknown = set(matcher.value.split("|")) - VALUES[matcher.name]
                wrong += [f"{matcher.name} is never {value}" for value in sorted(unknown)]
    for node in walk(tree):
        wrong += [f"nothing here has the label {label}" for label in sorted(_grouping(node) - found)]
    return wrong


def selectors(query: str) -> set[str]:
    """The names of the series in `query`."""
    return {node.name for node in walk(promql_parser.parse(query)) if isinstance(node, promql_parser.VectorSelector)}


def walk(node: Any) -> Iterator[Any]:
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from walk(child)
    for argument in getattr(node, "args", ()):
        yield from walk(argument)


def _grouping(node: Any) -> set[str]:
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql_parser.AggregateExpr):
        return set(modifier.labels) if modifier else set()
    if isinstance(node, promql_parser.BinaryExpr) and modifier:
        return {*(modifier.matching.labels if modifier.matching else ()), *(modifier.group_labels or ())}
    return set()
