"""Errors as OpenAI's clients expect them, from one table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import grpc
from aiohttp import web

from common.errors import Internal, PdserveError
from router.http.fields import Json, param_of

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    status: int
    type: str
    # Trying again may help. OpenAI's clients do so by themselves where they are told.
    may_repeat: bool = False


ANSWERS: Mapping[grpc.StatusCode, Answer] = {
    grpc.StatusCode.INVALID_ARGUMENT: Answer(400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: Answer(400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: Answer(401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: Answer(403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: Answer(404, "invalid_request_error"),
    grpc.StatusCode.ALREADY_EXISTS: Answer(409, "invalid_request_error"),
    grpc.StatusCode.ABORTED: Answer(409, "server_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: Answer(429, "rate_limit_error", may_repeat=True),
    grpc.StatusCode.CANCELLED: Answer(499, "server_error"),
    grpc.StatusCode.INTERNAL: Answer(500, "server_error"),
    grpc.StatusCode.DATA_LOSS: Answer(500, "server_error", may_repeat=True),
    grpc.StatusCode.UNAVAILABLE: Answer(503, "server_error", may_repeat=True),
    grpc.StatusCode.DEADLINE_EXCEEDED: Answer(504, "timeout_error"),
}
# Of the errors that are to be repeated and do not say when.
RETRY_AFTER_S = 1.0


def error_of(failure: BaseException) -> PdserveError:
    """Whatever is none is a bug, and logged. A group counts as the first bug in it, or else as its first error."""
    while isinstance(failure, BaseExceptionGroup):
        _, bugs = failure.split(PdserveError)
        failure = (bugs or failure).exceptions[0]
    if isinstance(failure, PdserveError):
        return failure
    log.error("bug in the HTTP face", exc_info=failure)
    return Internal(f"{type(failure).__name__}: {failure}")


def body_of(error: PdserveError, request: Json) -> Json:
    """Names the parameter as it is called in the body of the `request`."""
    param = param_of(error.field, request) if error.field else None
    is_named = param is not None and error.message.startswith(error.field)
    message = f"{param}{error.message.removeprefix(error.field)}" if is_named else error.message
    return _body(message, ANSWERS[error.code].type, param, error.reason)


def response_of(error: PdserveError, request: Json) -> web.Response:
    answer = ANSWERS[error.code]
    headers = {"x-should-retry": "true" if answer.may_repeat else "false"}
    if answer.may_repeat:
        retry_after_s = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(answer.status, body_of(error, request), headers)


def response_of_http(refusal: web.HTTPException, request: web.Request) -> web.Response:
    """For what never became one of the router's requests: no such path, too large a body and the like."""
    code = "_".join(refusal.reason.upper().replace("-", " ").split())
    words = {404: f"there is nothing at {request.path}", 405: f"{request.path} does not take {request.method}"}
    message = words.get(refusal.status) or refusal.text or refusal.reason
    headers = {"x-should-retry": "false"} | ({"Allow": refusal.headers["Allow"]} if "Allow" in refusal.headers else {})
    return _json(refusal.status, _body(message, "invalid_request_error", None, code), headers)


def _body(message: str, type: str, param: str | None, code: str) -> Json:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _json(status: int, body: Json, headers: Mapping[str, str]) -> web.Response:
    # In ASCII: what was sent may be quoted, and need not be Unicode.
    return web.Response(status=status, body=json.dumps(body).encode(), content_type="application/json", headers=headers)
