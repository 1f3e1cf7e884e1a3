"""The HTTP face of a router that runs in this process, and clients of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import openai

from common.config import RouterConfig
from router.http.server import listening
from router.router import Router


class Face(NamedTuple):
    url: str
    # One connection for each request, so that none is kept when it is cancelled.
    session: aiohttp.ClientSession
    # Tries nothing again by itself.
    client: openai.AsyncOpenAI

    async def post(self, path: str, body: object = None, **options: Any) -> Answer:
        """`body` as JSON, unless `options` have `data`."""
        if "data" not in options:
            options["json"] = body
        async with self.session.post(self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, method: str = "GET", **options: Any) -> Answer:
        async with self.session.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def events(self, path: str, body: dict[str, Any], **options: Any) -> AsyncIterator[Any]:
        """Every event of a stream, `[DONE]` included."""
        async with self.session.post(self.url + path, json={**body, "stream": True}, **options) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                if line.startswith(b"data: "):
                    data = line.removeprefix(b"data: ").strip()
                    yield data.decode() if data == b"[DONE]" else json.loads(data)


class Answer(NamedTuple):
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@contextlib.asynccontextmanager
async def http_face(
    router: Router, *, key: str = "none", ssl: Any = True, http_client: Any = None, **settings: object
) -> AsyncIterator[Face]:
    """`settings` are the router's, as far as the face looks at them."""
    config = RouterConfig(**{"http_listen": "127.0.0.1:0", **settings})
    scheme = "https" if config.tls_certificate else "http"
    async with listening(config, router) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=ssl)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30, http_client=http_client
            ) as client,
        ):
            yield Face(url, session, client)
