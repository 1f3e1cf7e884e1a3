"""An OpenTelemetry collector that keeps what it gets, over gRPC or HTTP."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


class Received(NamedTuple):
    """A span, and who sent it."""

    resource: dict[str, str]
    span: trace_pb2.Span

    @property
    def service(self) -> str:
        return self.resource["service.name"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """`wait_for` waits for spans; any number of services may send."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[Received] = []
        self._arrived = threading.Condition()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext | None
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._arrived:
            for group in request.resource_spans:
                resource = {one.key: one.value.string_value for one in group.resource.attributes}
                self.spans += [Received(resource, span) for scope in group.scope_spans for span in scope.spans]
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, num_spans: int, *, timeout_s: float) -> list[Received]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.spans) >= num_spans, timeout_s), self.spans
            return list(self.spans)


@contextlib.contextmanager
def collecting_over_grpc() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def collecting_over_http(collector: Collector) -> Iterator[str]:
    """What comes by HTTP goes to `collector` too; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            is_known = self.path == "/v1/traces"
            if is_known:
                collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(raw), None)
            self.send_response(200 if is_known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
