"""What is kept of a request once it is over: its line in the access log, its part in the metrics and in its trace."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

import grpc

from common.clock import Clock
from common.config import RouterConfig
from common.errors import PdserveError
from common.metrics import RouterMetrics
from common.tracing import Span
from router.output import Piece
from router.request import Arrival, Request
from router.session import Completed

log = logging.getLogger("router.access")


class Record:
    """A context manager around the work for a request; tells how it ended."""

    def __init__(
        self, arrival: Arrival, config: RouterConfig, metrics: RouterMetrics, span: Span, clock: Clock
    ) -> None:
        self.request_id = ""
        self.span = span
        self._arrival = arrival
        self._metrics = metrics
        self._clock = clock
        self._config = config
        self._num_prompt_tokens = 0
        self._completed: Completed | None = None
        self._num_output_tokens = 0
        # Those that did not come with the first one.
        self._num_later_tokens = 0
        self._first_s: float | None = None
        self._last_s = 0.0

    def admitted(self, request: Request) -> None:
        self._num_prompt_tokens = request.num_prompt_tokens
        self.span.set(num_prompt_tokens=request.num_prompt_tokens)

    def put_out(self, piece: Piece) -> None:
        """A piece is about to be sent."""
        now_s = self._clock()
        num_tokens = len(piece.token_ids)
        if not num_tokens:
            return
        if self._first_s is None:
            self._first_s = now_s
            self._metrics.first_token_s.observe(now_s - self._arrival.received_s)
            self.span.event("first_token")
        else:
            self._metrics.inter_token_s.observe((now_s - self._last_s) / num_tokens)
            self._num_later_tokens += num_tokens
        self._last_s = now_s
        self._num_output_tokens += num_tokens

    def completed(self, completed: Completed) -> None:
        self._completed = completed
        path = completed.path
        self._metrics.completions.labels(kv_path=path.kv_path.name).inc()
        for stage in ("queue", "prefill", "kv_transfer", "first_decode"):
            self._metrics.stage_s.labels(stage=stage).observe(getattr(path, f"{stage}_ms") / 1e3)
        if self._is_good:
            self._metrics.good_requests.inc()
        self.span.set(
            finish_reason=completed.ending.reason.value,
            prefill_worker=path.prefill_worker,
            decode_worker=path.decode_worker,
            kv_path=path.kv_path.value,
            kv_bytes=path.kv_bytes,
            kv_transport=path.kv_transport,
            num_resumptions=path.num_resumptions,
        )

    @property
    def _is_good(self) -> bool:
        """Its first token came in time, and so did the others."""
        if self._first_s is None:
            return False
        first_token_s = self._first_s - self._arrival.received_s
        inter_token_s = (self._last_s - self._first_s) / max(1, self._num_later_tokens)
        return (
            first_token_s * 1e3 <= self._config.goodput_first_token_ms
            and inter_token_s * 1e3 <= self._config.goodput_inter_token_ms
        )

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = _code(error)
        self._metrics.requests.labels(code=code.name).inc()
        self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        self._metrics.output_tokens.inc(self._num_output_tokens)
        self._metrics.request_s.observe(self._clock() - self._arrival.received_s)
        self.span.set(request_id=self.request_id, num_output_tokens=self._num_output_tokens)
        if self._config.access_log:
            log.info("generate", extra=self._fields(code, error))

    def _fields(self, code: grpc.StatusCode, error: BaseException | None) -> dict[str, object]:
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "client": self._arrival.client,
            "code": code.name,
            "prompt_tokens": self._num_prompt_tokens,
            "output_tokens": self._num_output_tokens,
            "total_ms": _milliseconds(self._clock() - self._arrival.received_s),
        }
        if self._first_s is not None:
            fields["first_token_ms"] = _milliseconds(self._first_s - self._arrival.received_s)
        if self._completed is not None:
            path = self._completed.path
            fields |= {"reason": self._completed.ending.reason.value, "kv_path": path.kv_path.value}
            fields |= {"prefill": path.prefill_worker, "decode": path.decode_worker, "kv_bytes": path.kv_bytes}
            fields |= {"resumptions": path.num_resumptions}
        elif error is not None:
            fields["error"] = str(error)
        return fields


def _code(error: BaseException | None) -> grpc.StatusCode:
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, PdserveError):
        return error.code
    return grpc.StatusCode.CANCELLED if isinstance(error, asyncio.CancelledError) else grpc.StatusCode.INTERNAL


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 1)
