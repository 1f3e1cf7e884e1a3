"""Watches one worker: a `WatchLoad` stream, redone for as long as the router is interested, on a channel of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

import grpc.aio

from common import rpc
from common.clock import Clock
from common.load import Load
from common.tls import Tls
from common.wire import pressure_from_proto
from pdserve.v1 import decode_pb2_grpc, prefill_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from router.workers import Identity, Role, Worker, WorkerState

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0

_ROLE_NUMBERS = {Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}

# Around a change of what is known of a worker.
Noting = Callable[[Worker], AbstractContextManager[None]]


class Silence:
    """A context manager: tells once nothing was heard for so long.

    Counted in quarters. While this process stands still (its cores are taken, its machine is paused) it hears nobody,
    and what was said meanwhile is read afterwards: that is a quarter at most, whatever it took.
    """

    def __init__(self, after_s: float, tell: Callable[[], object]) -> None:
        self.has_lasted = False
        self._quarter_s = after_s / 4
        self._tell = tell
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Silence:
        self._wait(4)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def broken(self) -> None:
        """Something was heard."""
        self._timer.cancel()
        self._wait(4)

    def _wait(self, num_quarters: int) -> None:
        self._timer = self._loop.call_later(self._quarter_s, self._passed, num_quarters)

    def _passed(self, num_quarters: int) -> None:
        if num_quarters > 1:
            self._wait(num_quarters - 1)
        else:
            self.has_lasted = True
            self._tell()


class Watch:
    """Keeps a `Worker` true from when it is made until `close`. Belongs to the event loop."""

    def __init__(
        self,
        worker: Worker,
        *,
        heartbeat_timeout_s: float,
        min_interval_s: float,
        tls: Tls | None,
        clock: Clock,
        noting: Noting,
    ) -> None:
        """The worker is to tell of its load at most every `min_interval_s`, and is lost after `heartbeat_timeout_s`
        of silence."""
        self._worker = worker
        self._request = worker_pb2.WatchLoadRequest(min_interval_s=min_interval_s)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._clock = clock
        self._noting = noting
        self._tls = tls
        self._open()
        self._task = asyncio.create_task(self._run(), name=f"watch {worker}")

    async def close(self) -> None:
        """Ends the stream, and whatever else is under way on the channel."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    def _open(self) -> None:
        self._certificates = self._tls and self._tls.version
        self._channel = rpc.connect(self._worker.address, self._tls)
        self.decode = decode_pb2_grpc.DecodeServiceStub(self._channel)
        self.prefill = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    async def _run(self) -> None:
        worker = self._worker
        retry_s = FIRST_RETRY_S
        while True:
            generation = worker.generation
            reason = await self._follow(worker_pb2_grpc.WorkerServiceStub(self._channel))
            with self._noting(worker):
                worker.lose(reason)
            retry_s = FIRST_RETRY_S if worker.generation > generation else min(2 * retry_s, LAST_RETRY_S)
            await asyncio.sleep(retry_s)
            if self._tls and self._tls.version != self._certificates:
                # A channel would connect again with the certificates that it was made with.
                await self._channel.close()
                self._open()

    async def _follow(self, stub: worker_pb2_grpc.WorkerServiceStub) -> str:
        """Reads one load stream to its end, and says why it ended."""
        worker = self._worker
        call = stub.WatchLoad(self._request)
        silence = Silence(self._heartbeat_timeout_s, call.cancel)
        try:
            with silence:
                while (message := await call.read()) is not grpc.aio.EOF:
                    silence.broken()
                    if message.HasField("identity"):
                        if message.identity.role != _ROLE_NUMBERS[worker.role]:
                            told = types_pb2.Role.Name(message.identity.role)
                            return f"it is {told}, configured as {worker.role.value}"
                        worker.meet(_identity(message.identity), self._clock())
                    elif worker.identity is None:
                        return "it did not say who it is"
                    with self._noting(worker):
                        self._hear(message)
            return "it ended its load stream"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if silence.has_lasted:
                return f"nothing was heard of it for {self._heartbeat_timeout_s:g} s"
            return "it cancelled its load stream"
        finally:
            call.cancel()

    def _hear(self, message: worker_pb2.WatchLoadResponse) -> None:
        serves = message.state == types_pb2.WORKER_STATE_SERVING
        state = WorkerState.SERVING if serves else WorkerState.DRAINING
        load = Load(**{name: getattr(message, name) for name in Load._fields})
        load = load._replace(pressure=pressure_from_proto(message.pressure))
        self._worker.num_watchers = message.num_watchers
        self._worker.num_output_tokens = message.num_output_tokens
        self._worker.num_prompt_tokens = message.num_prompt_tokens
        self._worker.hear(state, load, message.num_pairs, self._clock())


def _identity(message: worker_pb2.WorkerIdentity) -> Identity:
    fields = {name: getattr(message, name) for name in Identity._fields if name != "eos_token_ids"}
    return Identity(**fields, eos_token_ids=tuple(message.eos_token_ids))
