"""The life of one pair at prefill: connect, serve its control stream, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc
import grpc.aio

from common import rpc
from common.clock import Clock
from common.config import MAX_STAGING_CHUNKS, PrefillConfig
from common.errors import FailedPrecondition, Internal, InvalidArgument, PdserveError, Unavailable
from common.tls import Tls
from common.transport.authentication import Credentials
from common.transport.group import MAX_RENDEZVOUS_BYTES, PREFILL_RANK
from common.transport.limits import chunk_bytes
from common.transport.meeting import Meeting
from common.transport.messages import (
    MAX_TOKEN_BYTES,
    MAX_WORD_BYTES,
    FromPrefill,
    PairHello,
    PairIdentity,
    PairWelcome,
)
from common.transport.outbox import Outbox
from common.transport.sending import BlockSource, SendingPair
from common.transport.transports import Transports, name_of
from common.transport.wire import request_to_proto, response_from_proto
from pdserve.v1 import decode_pb2_grpc

log = logging.getLogger(__name__)

# Decode counts as wedged when it leaves a chunk or a commit without an answer for this long.
ANSWER_S = 30.0
# A goodbye has this long to arrive.
GOODBYE_S = 1.0
# Idleness and answers are looked after this often, or four times in a shorter `pair_idle_s`.
CHECK_S = 1.0


class Link:
    """Begins to connect when it is made. Belongs to the event loop."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        *,
        identity: PairIdentity,
        source: BlockSource,
        config: PrefillConfig,
        tls: Tls | None,
        transports: Transports,
        clock: Clock,
    ) -> None:
        self.endpoint = endpoint
        # The pair, or the PdserveError because of which there is none.
        self.made: asyncio.Future[SendingPair] = asyncio.get_running_loop().create_future()
        self._name = name
        self._identity = identity
        self._source = source
        self._config = config
        self._tls = tls
        self._transports = transports
        self._clock = clock
        self.task = asyncio.create_task(self._run(), name=name)
        self.task.add_done_callback(self._over)

    @property
    def pair(self) -> SendingPair | None:
        """While it lives."""
        if not self.made.done() or self.made.exception() is not None or self.made.result().ended:
            return None
        return self.made.result()

    @property
    def is_over(self) -> bool:
        return self.made.done() and self.pair is None

    async def _run(self) -> None:
        try:
            async with rpc.connect(self.endpoint, self._tls) as channel:
                call = decode_pb2_grpc.DecodeServiceStub(channel).ConnectPair()
                outbox: Outbox[FromPrefill] = Outbox()
                async with asyncio.timeout(self._config.pair_connect_s):
                    pair = await self._connect(call, outbox)
                self.made.set_result(pair)
                await self._serve(call, pair, outbox)
        except TimeoutError:
            self._fail(Unavailable(f"connecting to {self.endpoint} took more than {self._config.pair_connect_s:g} s"))
        except PdserveError as error:
            self._fail(error)

    def _over(self, task: asyncio.Task[None]) -> None:
        # Not a `finally` in the task: one that is cancelled before its first step never gets there.
        if task.cancelled():
            self._fail(Unavailable("the prefill worker is shutting down"))
        elif task.exception() is not None:
            log.error("bug in %s with %s", self._name, self.endpoint, exc_info=task.exception())
            self._fail(Internal(f"{self._name} with {self.endpoint}: {task.exception()}"))

    def _fail(self, error: PdserveError) -> None:
        if not self.made.done():
            log.warning("no pair with %s: %s", self.endpoint, error)
            self.made.set_exception(error)
            # Whoever waited may have left.
            self.made.exception()

    async def _connect(self, call: Any, outbox: Outbox[FromPrefill]) -> SendingPair:
        """Hello, welcome, process group, proofs."""
        names, config = self._transports.names, self._config
        meeting = Meeting(
            PREFILL_RANK, self._transports, interface=config.kv_interface, timeout_s=config.pair_connect_s
        )
        try:
            hello = PairHello(self._identity, self._transports.offers, await meeting.rendezvous())
            welcome = await self._exchange(call, hello)
            if name_of(welcome.transport) not in names:
                offered = ", ".join(names)
                raise FailedPrecondition(f"decode chose the transport {welcome.transport!r}; offered was {offered}")
            own_max_bytes = chunk_bytes(name_of(welcome.transport), config.max_chunk_bytes)
            max_chunk_bytes = min(welcome.max_chunk_bytes, own_max_bytes)
            if max_chunk_bytes < self._source.block_bytes:
                raise FailedPrecondition(
                    f"a layer's KV block has {self._source.block_bytes} bytes, of which decode takes "
                    f"{welcome.max_chunk_bytes} and this worker sends {own_max_bytes} at once: raise max_chunk_bytes, "
                    "or lower block_size everywhere",
                    field="max_chunk_bytes",
                )
            credentials = Credentials(welcome.token, self._identity.boot_id, welcome.boot_id)
            group = await meeting.connect(welcome.rendezvous, welcome.transport, credentials)
        except BaseException:
            meeting.cancel()
            raise

        def on_end(reason: str) -> None:
            log.info("%s with %s ended: %s", self._name, welcome.worker, reason)
            outbox.close()

        log.info("%s with %s over %s", self._name, welcome.worker, welcome.transport)
        return SendingPair(
            self._name,
            group,
            self._source,
            num_credits=welcome.num_credits,
            max_chunk_bytes=max_chunk_bytes,
            post=outbox.post,
            on_end=on_end,
            clock=self._clock,
        )

    async def _exchange(self, call: Any, hello: PairHello) -> PairWelcome:
        with rpc.translate():
            try:
                # The call may be over already; reading says why.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.write(request_to_proto(hello))
                response = await call.read()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise FailedPrecondition(f"{self.endpoint} is no decode worker", reason="WRONG_ROLE") from error
                raise
        welcome = None if response is grpc.aio.EOF else response_from_proto(response)
        if not isinstance(welcome, PairWelcome):
            raise Unavailable(f"decode worker {self.endpoint} did not answer a hello with a welcome")
        if (
            len(welcome.worker.encode()) > MAX_WORD_BYTES
            or not 0 < len(welcome.token) <= MAX_TOKEN_BYTES
            or not 0 < len(welcome.rendezvous) <= MAX_RENDEZVOUS_BYTES
            or not 0 < welcome.num_credits <= MAX_STAGING_CHUNKS
        ):
            raise Unavailable(f"the welcome of decode worker {self.endpoint} is beyond the limits of one")
        return welcome

    async def _serve(self, call: Any, pair: SendingPair, outbox: Outbox[FromPrefill]) -> None:
        reader = asyncio.create_task(self._read(call, pair))
        keeper = asyncio.create_task(self._keep(pair))
        try:
            async for message in outbox:
                await call.write(request_to_proto(message))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream broke; the reader says how.
            pass
        finally:
            keeper.cancel()
            await asyncio.wait([reader], timeout=GOODBYE_S)
            reader.cancel()
            pair.end("the control stream ended")
            await asyncio.wait([reader, keeper])

    async def _read(self, call: Any, pair: SendingPair) -> None:
        reason = "decode closed the control stream"
        try:
            with rpc.translate():
                while (response := await call.read()) is not grpc.aio.EOF:
                    message = response_from_proto(response)
                    if isinstance(message, PairWelcome):
                        raise InvalidArgument("a second welcome on one stream")
                    pair.handle(message)
        except PdserveError as error:
            reason = error.message
        finally:
            pair.end(reason)

    async def _keep(self, pair: SendingPair) -> None:
        idle_s = self._config.pair_idle_s
        while True:
            await asyncio.sleep(min(CHECK_S, idle_s / 4))
            if pair.idle_s >= idle_s:
                pair.end(f"idle for {idle_s:g} s")
            if pair.unanswered_s >= ANSWER_S:
                pair.end(f"decode left chunks or commits without an answer for {ANSWER_S:g} s")
