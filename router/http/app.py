"""The routes, and what holds for all of them: names of requests, errors as JSON, headers, an end to every reply."""

from __future__ import annotations

import asyncio
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from common.errors import InvalidArgument
from common.metrics import RouterMetrics
from common.params import MAX_REQUEST_ID_BYTES
from router.http.api import BODY, ID, Api
from router.http.failures import error_of, response_of, response_of_http
from router.http.replies import last_words

MAX_BODY_BYTES = 4 * 2**20
REQUEST_ID = "X-Request-Id"
# The status of a reply whose reader did not wait for it, in the metrics alone.
LEFT = "499"


def build(api: Api, metrics: RouterMetrics) -> web.Application:
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_guard(metrics)])
    posted = {"/v1/completions": api.completions, "/v1/chat/completions": api.chat_completions}
    gotten = {"/v1/models": api.models, "/v1/models/{id:.+}": api.model, "/health": api.health}
    for path, handler in posted.items():
        app.router.add_post(path, handler)
        app.router.add_options(path, _options("OPTIONS, POST"))
    for path, handler in gotten.items():
        app.router.add_get(path, handler)
        app.router.add_options(path, _options("GET, HEAD, OPTIONS"))
    app.on_response_prepare.append(_add_headers)
    return app


def _options(allowed: str) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=204, headers={"Allow": allowed})

    return answer


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "pdserve"
    response.headers[REQUEST_ID] = request[ID]


def _guard(metrics: RouterMetrics) -> Middleware:
    """Every failure gets the reply that it deserves, and every reply is counted and brought to an end."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[ID] = str(uuid.uuid4())
        try:
            response = await _answer(request, handler)
            # Here, and not by aiohttp, which would wait for its reader for ever.
            async with last_words(request):
                await response.prepare(request)
                await response.write_eof()
                await request.writer.drain()
        except asyncio.CancelledError:
            metrics.http_replies.labels(status=LEFT).inc()
            raise
        has_left = request.transport is None or request.transport.is_closing()
        metrics.http_replies.labels(status=LEFT if has_left else str(response.status)).inc()
        return response

    return guard


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        request[ID] = _request_id(request)
        return await handler(request)
    except web.HTTPException as refusal:
        return response_of_http(refusal, request)
    except Exception as failure:
        error = error_of(failure)
        return response_of(error, request.get(BODY, {}))


def _request_id(request: web.Request) -> str:
    """The caller's, which is how logs and workers name the request too; drawn when it has none. Raises
    InvalidArgument."""
    given = request.headers.get(REQUEST_ID)
    if given is None:
        return request[ID]
    if not (given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID_BYTES):
        raise InvalidArgument(
            f"{REQUEST_ID} must be 1 to {MAX_REQUEST_ID_BYTES} printable ASCII characters", field=REQUEST_ID
        )
    return given
