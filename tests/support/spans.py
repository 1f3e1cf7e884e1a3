"""Spans that are recorded into memory, as a tree that a test can compare with what it expects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from common.otlp import Recorder


class Node(NamedTuple):
    """A span and those under it, in the order of their beginning."""

    span: ReadableSpan
    children: list[Node]

    @property
    def name(self) -> str:
        return self.span.name.rpartition("/")[2]

    @property
    def attributes(self) -> dict[str, object]:
        return {name.removeprefix("pdserve."): value for name, value in (self.span.attributes or {}).items()}

    @property
    def error(self) -> str | None:
        """None: it did not fail."""
        return self.span.status.description if not self.span.status.is_ok else None

    @property
    def events(self) -> list[str]:
        return [event.name for event in self.span.events]

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()

    def named(self, *path: str) -> list[Node]:
        """Those that the path of names leads to from here."""
        if not path:
            return [self]
        return [found for child in self.children if child.name == path[0] for found in child.named(*path[1:])]

    def outline(self) -> object:
        """Its name, and the outlines of its children if it has any."""
        return (self.name, [child.outline() for child in self.children]) if self.children else self.name


class Spans:
    """What `tracer` has recorded."""

    def __init__(self, *, sample_ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(sample_ratio)), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = Recorder(provider)

    @property
    def recorded(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def roots(self) -> list[Node]:
        """Those whose parent is not recorded here."""
        return forest(self.recorded)

    def root(self) -> Node:
        """The only one."""
        [root] = self.roots()
        return root


def forest(spans: Iterable[ReadableSpan]) -> list[Node]:
    nodes = {span.context.span_id: Node(span, []) for span in sorted(spans, key=lambda span: span.start_time or 0)}
    roots = []
    for node in nodes.values():
        parent = node.span.parent and nodes.get(node.span.parent.span_id)
        (parent.children if parent else roots).append(node)
    return roots
