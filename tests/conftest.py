"""What tests of every package share: real gRPC servers on free ports, and processes that cannot outlive their test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc.aio
import hypothesis
import pytest
import torch

from common import rpc

# Without a CUDA device, kernels run in Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        from tests.support import interpreter

        interpreter.mend()

# How long an example takes says something about the machine.
hypothesis.settings.register_profile("pdserve", deadline=None)
hypothesis.settings.load_profile("pdserve")

# What workers measure and keep, they keep for this run alone.
_CACHE = tempfile.TemporaryDirectory(prefix="pdserve-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

AddServicers = Callable[[grpc.aio.Server], None]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """`address = await serve(add_servicers)`: a real server with the product's options, until the test ends. On a free
    port, or at the address that is given."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(add_servicers: AddServicers, address: str = "127.0.0.1:0") -> str:
            server = rpc.create_server()
            add_servicers(server)
            port = rpc.bind(server, address)
            await server.start()
            stack.push_async_callback(server.stop, None)
            return f"127.0.0.1:{port}"

        yield start


@pytest.fixture
async def channel_to() -> AsyncIterator[Callable[[str], grpc.aio.Channel]]:
    """`channel = channel_to(address)`: a channel with the product's options, closed when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(address: str) -> grpc.aio.Channel:
            channel = rpc.connect(address)
            stack.push_async_callback(channel.close)
            return channel

        yield connect


@pytest.fixture
def unused_address() -> str:
    """HOST:PORT on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`process = spawn("-m", "router", ..., NAME=value)`: this Python, on pipes, killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                text=True,
                env={**os.environ, **environment},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start
