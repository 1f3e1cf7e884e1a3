"""What is served: completions, chats, models, health. Each is one call of the router's own, asked in JSON."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from aiohttp import web

from common.config import RouterConfig
from common.errors import InvalidArgument, NotFound
from common.identities import Caller, Gate, bearer_token
from router.http import asked as reading
from router.http.asked import Asked
from router.http.choices import choices_of, run
from router.http.failures import body_of, error_of
from router.http.fields import Json
from router.http.logprobs import TokenNames
from router.http.replies import EventReply, WholeReply, head_of
from router.http.shapes import ChatShape, CompletionShape, Shape
from router.request import Arrival
from router.router import Router

# How long the body of a request may take to come in.
BODY_S = 30.0
TIMEOUT = "X-Request-Timeout"
# Set once they are known: what the request is called, and what its body says.
ID = web.RequestKey("id", str)
BODY = web.RequestKey("body", dict)

_GENERATE = "/pdserve.v1.RouterService/Generate"
_GET_MODEL = "/pdserve.v1.RouterService/GetModel"


class Api:
    """Handlers raise PdserveError, and aiohttp's own errors for what never became a request."""

    def __init__(self, config: RouterConfig, router: Router, gate: Gate | None) -> None:
        self._config = config
        self._router = router
        self._gate = gate
        self._names = TokenNames(router.parts.tokenizer)
        self._started_s = int(time.time())

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, reading.completion, CompletionShape)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, reading.chat, ChatShape)

    async def models(self, request: web.Request) -> web.Response:
        self._caller(request, _GET_MODEL)
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        self._caller(request, _GET_MODEL)
        asked_for = request.match_info["id"]
        if asked_for != self._config.model_id:
            raise NotFound(f"no model {asked_for!r} here; there is {self._config.model_id!r}", field="model")
        return web.json_response(self._model())

    async def health(self, request: web.Request) -> web.Response:
        """Readiness, as health `""` says it over gRPC; asks nobody who he is."""
        health = self._router.health
        is_serving = health.is_ready and health.is_live
        status = "SERVING" if is_serving else "NOT_SERVING"
        return web.json_response({"status": status}, status=200 if is_serving else 503)

    async def _generate(
        self, request: web.Request, read: Callable[[Json], Asked], shape: type[Shape]
    ) -> web.StreamResponse:
        arrival = self._arrival(request, self._caller(request, _GENERATE))
        body = request[BODY] = reading.parse(await _body(request))
        asked = read(body)
        choices = choices_of(asked, request[ID])
        shapes = {choice: shape(choice, asked, self._names) for choice in choices}
        head = head_of(request[ID], shape, asked, body.get("model") or self._config.model_id)
        if not asked.is_stream:
            whole = WholeReply(head, shapes, asked)
            await run(choices, self._router.generations, arrival, whole)
            return whole.response()
        events = EventReply(request, head, shapes, asked)
        try:
            await run(choices, self._router.generations, arrival, events)
        except Exception as failure:
            if not events.has_begun:
                raise
            await events.fail(body_of(error_of(failure), body))
        else:
            await events.end()
        return events.response

    def _caller(self, request: web.Request, method: str) -> Caller | None:
        """None: nobody is asked. Raises Unauthenticated and PermissionDenied."""
        if self._gate is None:
            return None
        header = request.headers.get("Authorization")
        return self._gate.caller(method, bearer_token(header) if header else None, _names(request))

    def _arrival(self, request: web.Request, caller: Caller | None) -> Arrival:
        headers = tuple((name.lower(), value) for name, value in request.headers.items())
        return self._router.generations.arrival(
            request.remote or "", caller, timeout_s=_timeout_s(request), metadata=headers
        )

    def _model(self) -> Json:
        model = self._router.generations.model
        return {
            "id": self._config.model_id,
            "object": "model",
            "created": self._started_s,
            "owned_by": "pdserve",
            # Most tokens of prompt and output together.
            "max_model_len": model.context_length,
        }


async def _body(request: web.Request) -> bytes:
    """Raises aiohttp's errors for one that is no JSON by its headers, is too large, or does not come."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise web.HTTPUnsupportedMediaType(text="a body must not be compressed: send it without Content-Encoding")
    # A web page may send other types to this machine without asking.
    if request.content_type != "application/json" or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise web.HTTPUnsupportedMediaType(text="the body must be JSON: send Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {BODY_S:g} s") from None


def _timeout_s(request: web.Request) -> float | None:
    """None: the caller sets no deadline. Raises InvalidArgument."""
    text = request.headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidArgument(f"{TIMEOUT} must be a number of seconds above 0, got {text[:80]!r}", field=TIMEOUT)
    return timeout_s


def _names(request: web.Request) -> set[str]:
    """The common name and the alternative names of a verified certificate; none without one."""
    shown = request.transport.get_extra_info("peercert") if request.transport else None
    if not shown:
        return set()
    common = {value for part in shown.get("subject", ()) for kind, value in part if kind == "commonName"}
    return common | {value for _, value in shown.get("subjectAltName", ())}
