"""Where a request's time goes, as spans of one trace over all three services. Without `trace_endpoint` nothing is
recorded, and OpenTelemetry is not even imported: `common.otlp` is what records.

    Generate                     router; its parent is the client's span, if it sent one
    ├── queue                    received until placed
    └── Decode                   router: one for each decode worker that is asked
        ├── Decode               decode worker
        │   ├── queue            opened until its blocks are reserved
        │   ├── prefill          where it computes the prompt itself
        │   ├── first_decode     first token known until the second one is
        │   └── stream           until the last one is
        └── Prefill              router: one for each attempt
            └── Prefill          prefill worker
                ├── connect      until there is a pair
                ├── queue        until its first chunk is scheduled
                ├── prefill      until the first token is known
                └── transfer     until decode's last acknowledgement

Spans travel as W3C `traceparent` in the metadata of Decode and Prefill. Times are seconds on the service's clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from common.settings import ConfigError

if TYPE_CHECKING:
    from common.config import ServiceConfig

GENERATE = "pdserve.v1.RouterService/Generate"
DECODE = "pdserve.v1.DecodeService/Decode"
PREFILL = "pdserve.v1.PrefillService/Prefill"

Attribute = str | bool | int | float
# W3C's fields of a call's metadata that name its trace.
TRACE_FIELDS = ("traceparent", "tracestate")
# What a caller sent along with its call, by names in small letters.
Metadata = Iterable[tuple[str, str | bytes]]


class Span:
    """A part of a request's life; this one is not recorded. A context manager: it ends with what is inside it, and an
    error in there becomes its status."""

    is_recorded = False
    # To be sent along with calls, so that what they cause becomes part of this.
    metadata: tuple[tuple[str, str], ...] = ()
    # What log lines say of the trace.
    log_fields: Mapping[str, str] = MappingProxyType({})

    def child(self, name: str, *, start_s: float | None = None) -> Span:
        """A part of this one, beginning at once unless it began earlier."""
        return self

    def call(self, method: str, address: str) -> Span:
        """A call to another service that is about to be made with this span's `metadata`."""
        return self

    def stage(
        self, name: str, start_s: float, end_s: float, error: BaseException | None = None, **attributes: Attribute
    ) -> None:
        """A part of this one that is over."""

    def set(self, **attributes: Attribute) -> None:
        """Adds attributes; `pdserve.` is put before their names, unless OpenTelemetry has names for them."""

    def event(self, name: str, **attributes: Attribute) -> None:
        """Something that happened at this moment."""

    def fail(self, error: BaseException) -> None:
        """`error` is the span's status, however it ends."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Tracer:
    """Makes the spans of one service; this one makes none that is recorded."""

    def serving(self, method: str, metadata: Metadata, *, start_s: float | None = None) -> Span:
        """A call that is being served; its parent is the caller's span, if its metadata names one."""
        return NO_SPAN


NO_SPAN = Span()
OFF = Tracer()


@contextlib.contextmanager
def tracing(config: ServiceConfig) -> Iterator[Tracer]:
    """What the configuration asks for. At the end what is recorded is sent, within two seconds or not at all.

    Raises ConfigError when OpenTelemetry is asked for and not installed, or cannot be set up.
    """
    if not config.trace_endpoint:
        yield OFF
        return
    try:
        from common.otlp import recording
    except ImportError as error:
        raise ConfigError(
            f"trace_endpoint={config.trace_endpoint!r}: {error}; install the packages of pdserve[tracing]"
        ) from error
    with recording(config) as tracer:
        yield tracer
