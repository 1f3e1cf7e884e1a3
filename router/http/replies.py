"""Sends choices as they come: as server-sent events, or as one JSON object when all have ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping

from aiohttp import web

from common.errors import Cancelled
from router.http.asked import Asked
from router.http.choices import Choice
from router.http.fields import Json
from router.http.shapes import Shape, usage_of
from router.output import Piece

LAST_WORDS_S = 30.0
SEND_BUFFER_BYTES = 64 * 2**10
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would gather events otherwise.
    "X-Accel-Buffering": "no",
}

Shapes = Mapping[Choice, Shape]


def head_of(request_id: str, shape: type[Shape], asked: Asked, model: str) -> Json:
    """What the reply, or each event of it, has beside the choices."""
    return {
        "id": shape.id_prefix + request_id,
        "object": shape.event_object if asked.is_stream else shape.object,
        "created": int(time.time()),
        "model": model,
    }


class WholeReply:
    """One JSON object."""

    def __init__(self, head: Json, shapes: Shapes, asked: Asked) -> None:
        self._head = head
        self._shapes = shapes
        self._asked = asked
        self._pieces: dict[Choice, list[Piece]] = {choice: [] for choice in shapes}

    async def put_out(self, choice: Choice, piece: Piece) -> None:
        self._pieces[choice].append(piece)

    async def choice_ended(self, choice: Choice) -> None:
        """Nothing goes out before all have."""

    def response(self) -> web.Response:
        """When all choices have ended well."""
        choices = []
        for choice, shape in self._shapes.items():
            assert choice.completed is not None, "the reply comes when all have ended"
            choices.append(shape.whole(self._pieces[choice], choice.completed))
        whole = {**self._head, "choices": choices, "usage": usage_of(self._shapes, self._asked)}
        return web.Response(body=_json(whole), content_type="application/json")


class EventReply:
    """An event for each piece. The status goes out with the first one, so that what fails earlier has its own."""

    def __init__(self, request: web.Request, head: Json, shapes: Shapes, asked: Asked) -> None:
        self._request = request
        self._head = head | ({"usage": None} if asked.include_usage else {})
        self._shapes = shapes
        self._asked = asked
        self._beginning = asyncio.Lock()
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def has_begun(self) -> bool:
        return self.response.prepared

    async def put_out(self, choice: Choice, piece: Piece) -> None:
        """Returns when the reader has taken enough of what was sent before."""
        await self._send({**self._head, "choices": [self._shapes[choice].event(piece)]})

    async def choice_ended(self, choice: Choice) -> None:
        assert choice.completed is not None
        await self._send({**self._head, "choices": [self._shapes[choice].last_event(choice.completed)]})

    async def end(self) -> None:
        """When all choices have ended well."""
        async with last_words(self._request):
            if self._asked.include_usage:
                await self._send({**self._head, "choices": [], "usage": usage_of(self._shapes, self._asked)})
            await self._write(b"data: [DONE]\n\n")

    async def fail(self, body: Json) -> None:
        """The last event, of a stream that has begun."""
        async with last_words(self._request):
            await self._send(body)

    async def _send(self, event: Json) -> None:
        await self._write(b"data: " + _json(event) + b"\n\n")

    async def _begin(self) -> None:
        # Otherwise the system would take megabytes of events for a reader that takes none.
        self._request.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        await self.response.prepare(self._request)

    async def _write(self, data: bytes) -> None:
        try:
            if not self.response.prepared:
                async with self._beginning:
                    if not self.response.prepared:
                        await self._begin()
            # All writers of a connection wait for one future, which a deadline of one of them must not cancel.
            await asyncio.shield(self.response.write(data))
        except ConnectionError:
            raise Cancelled("the caller left") from None


@contextlib.asynccontextmanager
async def last_words(request: web.Request) -> AsyncIterator[None]:
    """Around what is sent when there is nothing to wait for but the reader. One that has left needs to hear nothing,
    and one that takes nothing is left."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            yield
    except (ConnectionError, Cancelled):
        pass
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()


def _json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
