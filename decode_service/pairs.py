"""Decode's end of every pair: the handshake of ConnectPair, and the control stream for as long as the pair lives."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import grpc.aio

from common.clock import Clock, monotonic
from common.config import DecodeConfig
from common.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, PdserveError, Unavailable
from common.transport.authentication import Credentials, new_token
from common.transport.crowd import longest_idle
from common.transport.group import DECODE_RANK, MAX_RENDEZVOUS_BYTES, PairGroup
from common.transport.limits import chunk_bytes
from common.transport.meeting import Meeting
from common.transport.messages import (
    MAX_OFFERS,
    MAX_WORD_BYTES,
    AttemptKey,
    FromDecode,
    PairHello,
    PairIdentity,
    PairWelcome,
)
from common.transport.outbox import Outbox
from common.transport.receiving import KvSink, ReceivingPair
from common.transport.transports import Choice, Transports, name_of
from common.transport.wire import request_from_proto, response_to_proto
from pdserve.v1 import decode_pb2

log = logging.getLogger(__name__)

# From the hello to a proven process group.
HANDSHAKE_S = 5.0
CLOSE_S = 2.0


@dataclass(eq=False, slots=True)
class _Member:
    """The newest hello of one prefill worker, and its pair once that is made."""

    boot_id: str
    # Boot ids that a hello of this worker has replaced.
    superseded: frozenset[str]
    pair: ReceivingPair | None = None


class PairServer:
    """Any number of pairs, at most one for each prefill worker. Belongs to the event loop, save where it says so."""

    def __init__(
        self,
        identity: PairIdentity,
        sink: KvSink,
        config: DecodeConfig,
        *,
        transports: Transports,
        clock: Clock = monotonic,
    ) -> None:
        self._identity = identity
        self._sink = sink
        self._config = config
        self._transports = transports
        self._clock = clock
        self._num_made = 0
        self._closed = ""
        self._members: dict[str, _Member] = {}
        self._pairs: dict[int, ReceivingPair] = {}

    @property
    def num_pairs(self) -> int:
        return len(self._pairs)

    def transport_of(self, pair_id: int) -> str:
        """How the pair's payload travels, as the serving path names it; empty once the pair is gone. Thread-safe."""
        pair = self._pairs.get(pair_id)
        return "" if pair is None else pair.transport

    def reservation_gone(self, pair_id: int, key: AttemptKey) -> None:
        """Stops prefill's work on an attempt and older ones. Thread-safe; without effect once the pair is gone."""
        pair = self._pairs.get(pair_id)
        if pair is not None:
            pair.reservation_gone(key)

    async def connect(
        self,
        requests: AsyncIterator[decode_pb2.ConnectPairRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncGenerator[decode_pb2.ConnectPairResponse, None]:
        """Behind DecodeService.ConnectPair: the life of one pair. Closing this generator ends it.

        Raises:
            FailedPrecondition: the two sides would not understand one another; names both values.
            InvalidArgument: the stream does not begin with a usable hello.
            ResourceExhausted: this worker is paired with as many as it may be, and all are in use.
            Unavailable: the process group could not be made, or a newer hello of the same worker came.
        """
        hello = await self._read_hello(requests)
        choice = self._check(hello)
        worker = hello.identity.worker
        member = self._enter(hello.identity)
        meeting = Meeting(DECODE_RANK, self._transports, interface=self._config.kv_interface, timeout_s=HANDSHAKE_S)
        try:
            credentials = Credentials(new_token(), hello.identity.boot_id, self._identity.boot_id)
            welcome = PairWelcome(
                worker=self._identity.worker,
                boot_id=self._identity.boot_id,
                token=credentials.token,
                transport=choice.label,
                rendezvous=await meeting.rendezvous(),
                num_credits=self._config.staging_chunks,
                max_chunk_bytes=self._max_chunk_bytes(choice),
            )
            yield response_to_proto(welcome)
            group = await meeting.connect(hello.rendezvous, choice.label, credentials)
            if self._members.get(worker) is not member:
                raise Unavailable(self._closed or f"a newer hello of {worker} came while this one was being answered")
        except BaseException:
            meeting.cancel()
            self._leave(worker, member)
            raise
        async with contextlib.aclosing(self._serve(worker, member, group, choice, requests)) as responses:
            async for response in responses:
                yield response

    async def close(self, reason: str = "the decode worker is shutting down") -> None:
        """Ends every pair, for good, and waits a moment for what they hold."""
        self._closed = reason
        self._members.clear()
        pairs = list(self._pairs.values())
        for pair in pairs:
            pair.end(reason)
        await asyncio.gather(*(asyncio.to_thread(pair.wait_released, CLOSE_S) for pair in pairs))

    async def _serve(
        self,
        worker: str,
        member: _Member,
        group: PairGroup,
        choice: Choice,
        requests: AsyncIterator[decode_pb2.ConnectPairRequest],
    ) -> AsyncGenerator[decode_pb2.ConnectPairResponse, None]:
        self._num_made += 1
        pair_id = self._num_made
        outbox: Outbox[FromDecode] = Outbox()

        def on_end(reason: str) -> None:
            log.info("pair %d with %s ended: %s", pair_id, worker, reason)
            outbox.close()

        pair = ReceivingPair(
            pair_id,
            f"pair-{pair_id}",
            group,
            self._sink,
            num_slots=self._config.staging_chunks,
            max_chunk_bytes=self._max_chunk_bytes(choice),
            post=outbox.post,
            on_end=on_end,
            clock=self._clock,
        )
        del group
        log.info("pair %d with %s over %s", pair_id, worker, choice)
        self._pairs[pair_id] = member.pair = pair
        reader = asyncio.create_task(self._read(requests, pair))
        try:
            async for message in outbox:
                yield response_to_proto(message)
        finally:
            reader.cancel()
            pair.end(f"the control stream with {worker} ended")
            del self._pairs[pair_id]
            self._leave(worker, member)

    async def _read(self, requests: AsyncIterator[decode_pb2.ConnectPairRequest], pair: ReceivingPair) -> None:
        reason = "prefill closed the control stream"
        try:
            async for request in requests:
                message = request_from_proto(request)
                if isinstance(message, PairHello):
                    raise InvalidArgument("a second hello on one stream", field="hello")
                pair.handle(message)
        except PdserveError as error:
            reason = error.message
        except grpc.aio.UsageError as error:
            reason = f"the control stream broke: {error}"
        finally:
            pair.end(reason)

    async def _read_hello(self, requests: AsyncIterator[decode_pb2.ConnectPairRequest]) -> PairHello:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                request = await anext(aiter(requests), None)
        except TimeoutError:
            raise DeadlineExceeded(f"no hello within {HANDSHAKE_S:g} s") from None
        hello = None if request is None else request_from_proto(request)
        if not isinstance(hello, PairHello):
            raise InvalidArgument("the first request of a ConnectPair stream is `hello`", field="hello")
        if not hello.identity.worker or not hello.identity.boot_id:
            raise InvalidArgument("a hello names its worker and boot id", field="hello")
        words = (*dataclasses.asdict(hello.identity).values(), *hello.transports)
        if any(isinstance(word, str) and len(word.encode()) > MAX_WORD_BYTES for word in words):
            raise InvalidArgument(f"no word of a hello has more than {MAX_WORD_BYTES} bytes", field="hello")
        if len(hello.transports) > MAX_OFFERS:
            raise InvalidArgument(
                f"{len(hello.transports)} transports are offered, allowed are {MAX_OFFERS}", field="hello.transports"
            )
        if not 0 < len(hello.rendezvous) <= MAX_RENDEZVOUS_BYTES:
            raise InvalidArgument(
                f"{len(hello.rendezvous)} bytes of rendezvous, allowed are 1 to {MAX_RENDEZVOUS_BYTES}",
                field="hello.rendezvous",
            )
        return hello

    def _check(self, hello: PairHello) -> Choice:
        """The transport to use."""
        own, peer = self._identity, hello.identity
        for what, field in (
            ("pair protocol version", "protocol_version"),
            ("KV layout", "kv_layout"),
            ("model fingerprint", "model_fingerprint"),
        ):
            ours, theirs = getattr(own, field), getattr(peer, field)
            if ours != theirs:
                raise FailedPrecondition(
                    f"{what} of prefill worker {peer.worker} is {theirs!r}, of decode worker {own.worker} {ours!r}",
                    field=f"hello.{field}",
                    reason=f"{field.upper()}_MISMATCH",
                )
        choice = self._transports.choose(hello.transports)
        if choice is None:
            names = ", ".join(map(name_of, hello.transports)) or "none"
            raise FailedPrecondition(
                f"no common transport: prefill worker {peer.worker} has {names}, "
                f"decode worker {own.worker} has {', '.join(self._transports.names)}",
                field="hello.transports",
                reason="TRANSPORT_MISMATCH",
            )
        return choice

    def _max_chunk_bytes(self, choice: Choice) -> int:
        return chunk_bytes(name_of(choice.label), self._config.max_chunk_bytes)

    def _enter(self, peer: PairIdentity) -> _Member:
        """The newest hello of a worker counts: it ends the pair of an older one, of this boot or of an earlier."""
        if self._closed:
            raise Unavailable(self._closed)
        old = self._members.get(peer.worker)
        superseded: frozenset[str] = frozenset()
        if old is None:
            self._make_room()
        else:
            if peer.boot_id in old.superseded:
                raise FailedPrecondition(
                    f"prefill worker {peer.worker} has started again since boot {peer.boot_id} (boot {old.boot_id}); "
                    "if these are two workers, give each its own instance_id",
                    field="hello.boot_id",
                    reason="BOOT_ID_SUPERSEDED",
                )
            superseded = (old.superseded | {old.boot_id}) - {peer.boot_id}
            if old.pair is not None:
                old.pair.end(f"prefill worker {peer.worker} has connected again")
        member = self._members[peer.worker] = _Member(peer.boot_id, superseded)
        return member

    def _make_room(self) -> None:
        """For one member more."""
        max_pairs = self._config.max_pairs
        if len(self._members) >= max_pairs:
            by_pair = {member.pair: worker for worker, member in self._members.items() if member.pair}
            idle = longest_idle(by_pair, max_pairs=max_pairs)
            del self._members[by_pair[idle]]
            idle.end(f"closed for another: a worker holds {max_pairs} pairs (max_pairs)")

    def _leave(self, worker: str, member: _Member) -> None:
        if self._members.get(worker) is member:
            del self._members[worker]
