"""Records spans with OpenTelemetry and sends them to a collector (OTLP), from a thread of its own.

Serving never waits for the collector: spans wait in a bounded queue, which loses the oldest when it is full. The
standard OTEL_* variables hold for what has no setting here: headers, certificates, compression, timeouts, batches,
resource attributes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from types import TracebackType
from urllib.parse import urlsplit

import grpc
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace import Tracer as OtelTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.address import Address
from common.clock import Clock, monotonic
from common.config import ServiceConfig
from common.errors import PdserveError
from common.settings import ConfigError
from common.tracing import Attribute, Metadata, Span, Tracer

log = logging.getLogger(__name__)

# How long a process that ends tries to send what it has recorded.
FLUSH_S = 2.0
# Nothing is sent for so long after a failure.
REST_S = 5.0

# Attributes for which OpenTelemetry has names.
_STANDARD = {
    "num_prompt_tokens": "gen_ai.usage.input_tokens",
    "num_output_tokens": "gen_ai.usage.output_tokens",
}
_PROPAGATOR = TraceContextTextMapPropagator()


@contextlib.contextmanager
def recording(config: ServiceConfig) -> Iterator[Tracer]:
    """See `common.tracing.tracing`."""
    # The exporters tell of every single failure; `Delivery` tells when there begin to be any.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        delivery = Delivery(_exporter(config), config.trace_endpoint)
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.trace_sample_ratio)),
            resource=_resource(config),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(delivery))
    except Exception as error:
        raise ConfigError(f"trace_endpoint={config.trace_endpoint!r}: {error}") from error
    try:
        yield Recorder(provider)
    finally:
        # Of its own accord it would wait for half a minute.
        flush = threading.Thread(target=provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        if flush.is_alive():
            delivery.shutdown()


class Recorder(Tracer):
    """Makes spans with `provider`."""

    def __init__(self, provider: TracerProvider, clock: Clock = monotonic) -> None:
        self._tracer = provider.get_tracer("pdserve")
        self._clock = clock

    def serving(self, method: str, metadata: Metadata, *, start_s: float | None = None) -> Span:
        now_s = self._clock()
        epoch_ns = time.time_ns() - int(now_s * 1e9)
        span = self._tracer.start_span(
            method,
            context=_caller(metadata),
            kind=SpanKind.SERVER,
            start_time=epoch_ns + int((now_s if start_s is None else start_s) * 1e9),
            attributes=_call_attributes(method),
        )
        if not span.is_recording():
            return _Unsampled(span)
        return _RecordedSpan(self._tracer, span, self._clock, epoch_ns, is_call=True)


class _Unsampled(Span):
    """Not recorded, and the services that are called hear so."""

    def __init__(self, span: OtelSpan) -> None:
        self.metadata = _metadata(span)


class _RecordedSpan(Span):
    is_recorded = True

    def __init__(self, tracer: OtelTracer, span: OtelSpan, clock: Clock, epoch_ns: int, *, is_call: bool) -> None:
        """`epoch_ns`: what lies between the clock and the time of day. One value for all spans of a call: they stay
        in order when the time of day is set."""
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._epoch_ns = epoch_ns
        self._is_call = is_call
        self._has_failed = False
        self.metadata = _metadata(span)
        self.log_fields = {"trace_id": format_trace_id(span.get_span_context().trace_id)}

    def child(self, name: str, *, start_s: float | None = None) -> Span:
        return self._start(name, SpanKind.INTERNAL, self._now_s if start_s is None else start_s, {})

    def call(self, method: str, address: str) -> Span:
        where = Address.parse(address)
        attributes = _call_attributes(method) | {"server.address": where.host, "server.port": where.port}
        return self._start(method, SpanKind.CLIENT, self._now_s, attributes)

    def stage(
        self, name: str, start_s: float, end_s: float, error: BaseException | None = None, **attributes: Attribute
    ) -> None:
        stage = self._start(name, SpanKind.INTERNAL, start_s, {})
        stage.set(**attributes)
        stage._end(error, end_s)

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, _named(attributes), self._ns(self._now_s))

    def fail(self, error: BaseException) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        code = error.code if isinstance(error, PdserveError) else grpc.StatusCode.INTERNAL
        self._note_code(code)
        self._span.set_attribute(
            "error.type", error.reason if isinstance(error, PdserveError) else type(error).__name__
        )
        self._span.set_status(Status(StatusCode.ERROR, str(error)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error, self._now_s)

    @property
    def _now_s(self) -> float:
        return self._clock()

    def _ns(self, at_s: float) -> int:
        return self._epoch_ns + int(at_s * 1e9)

    def _start(self, name: str, kind: SpanKind, start_s: float, attributes: dict[str, Attribute]) -> _RecordedSpan:
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(self._span, Context()),
            kind=kind,
            start_time=self._ns(start_s),
            attributes=attributes,
        )
        return _RecordedSpan(self._tracer, span, self._clock, self._epoch_ns, is_call=kind is SpanKind.CLIENT)

    def _end(self, error: BaseException | None, at_s: float) -> None:
        if error is None:
            if not self._has_failed:
                self._note_code(grpc.StatusCode.OK)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            # Somebody left, which is nobody's failure.
            if not self._has_failed:
                self.set(cancelled=True)
                self._note_code(grpc.StatusCode.CANCELLED)
        else:
            self.fail(error)
        self._span.end(self._ns(at_s))

    def _note_code(self, code: grpc.StatusCode) -> None:
        if self._is_call:
            self._span.set_attribute("rpc.grpc.status_code", code.value[0])


class Delivery(SpanExporter):
    """An exporter that rests after a failure, and of which is said when it begins to fail and when it is well again.

    Trying takes CPU from what serves: every try of an exporter encodes all its spans anew. What comes then is lost.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, clock: Clock = monotonic) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._clock = clock
        self._is_failing = False
        self._rests_until_s = 0.0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._is_failing and self._clock() < self._rests_until_s:
            return SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            log.debug("%s", error)
            result = SpanExportResult.FAILURE
        self._note(is_failing=result is not SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def _note(self, *, is_failing: bool) -> None:
        if is_failing and not self._is_failing:
            log.warning("traces do not reach %s, and are lost until they do", self._endpoint)
        elif self._is_failing and not is_failing:
            log.info("traces reach %s again", self._endpoint)
        self._is_failing = is_failing
        self._rests_until_s = self._clock() + REST_S


def _exporter(config: ServiceConfig) -> SpanExporter:
    if config.trace_protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=config.trace_endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    has_path = urlsplit(config.trace_endpoint).path.strip("/")
    return HttpExporter(config.trace_endpoint if has_path else config.trace_endpoint.rstrip("/") + "/v1/traces")


def _resource(config: ServiceConfig) -> Resource:
    own = {
        "service.namespace": "pdserve",
        "service.name": f"pdserve-{config.role}",
        "service.instance.id": config.instance_id,
        "service.version": version("pdserve"),
    }
    # The operator's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES stand over ours.
    return Resource.create(own).merge(OTELResourceDetector().detect())


def _caller(metadata: Metadata) -> Context:
    """The span that the call's metadata names, as a parent. What cannot be read is as if it were not there."""
    carrier: dict[str, list[str]] = {}
    for key, value in metadata:
        if key in _PROPAGATOR.fields and isinstance(value, str):
            carrier.setdefault(key, []).append(value)
    return _PROPAGATOR.extract(carrier, Context())


def _metadata(span: OtelSpan) -> tuple[tuple[str, str], ...]:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    return tuple(carrier.items())


def _call_attributes(method: str) -> dict[str, Attribute]:
    service, _, name = method.partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _named(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    return {_STANDARD.get(name, f"pdserve.{name}"): value for name, value in attributes.items()}
