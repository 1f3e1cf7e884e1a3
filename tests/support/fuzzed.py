"""A real cluster that is told nonsense, and what must hold of it meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import psutil

from common.transport import wire
from common.transport.authentication import Credentials, authenticate
from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import PREFILL_RANK, PairBroken
from common.transport.messages import PROTOCOL_VERSION, PairHello, PairIdentity, PairWelcome
from pdserve.v1 import decode_pb2, types_pb2
from tests.fakes.cluster import eventually
from tests.support import fuzzing
from tests.support.cluster import RealCluster

# More than any honest answer takes on a busy machine, the whole context put out included: what is not over then hangs.
HANG_S = 120.0
CANARY = [100, 101, 102, 103] * 10
# What a request may be told. Whatever else comes is a bug, INTERNAL and UNKNOWN above all.
HONEST = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Fuzzed:
    """`running()` ends with the proof that nothing leaked, and that what is served is what was served before."""

    def __init__(self, cluster: RealCluster) -> None:
        self._cluster = cluster
        self.codes: Counter[str] = Counter()
        self.num_headers = 0
        self.num_pairs = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls) -> AsyncIterator[Fuzzed]:
        # Everything shares one interpreter here, so that a busy machine is no dead worker.
        async with RealCluster(num_blocks=1024).running(heartbeat_timeout_s=HANG_S) as cluster:
            fuzzed = cls(cluster)
            canary = await fuzzed._canary()
            yield fuzzed
            await cluster.settled()
            assert await fuzzed._canary() == canary
            # Nobody was taken out of service, and no engine has died.
            assert all(one.is_serving for one in cluster.router.fleet.workers)
            assert len(cluster.router._in_flight) == 0

    async def _canary(self) -> list[int]:
        reply = await self._cluster.generate(CANARY, max_tokens=8, ignore_eos=True, sampling={"temperature": 0})
        return reply.token_ids

    async def request(self, draw: random.Random) -> None:
        """One random request, as bytes; AssertionError for an answer that is none, or none within HANG_S."""
        raw = fuzzing.spoilt(draw, fuzzing.generate_request(draw).SerializeToString())
        call = self._cluster.raw("/pdserve.v1.RouterService/Generate")(raw, timeout=HANG_S)
        code, answer = grpc.StatusCode.OK, None
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            code, answer = error.code(), error.details()
        assert code in HONEST, f"{code.name}: {answer} for {raw!r}"
        self.codes[code.name] += 1

    async def pair(self, draw: random.Random, *, most: int) -> int:
        """One pair that is proven and then says at most so many random things; how many it came to say.

        AssertionError when decode does not end it within HANG_S.
        """
        decode = self._cluster.decodes[0]
        num_others = decode.worker.pairs.num_pairs
        async with asyncio.timeout(HANG_S):
            async with self._reservation() as key:
                self.num_pairs += 1
                said = await self._speak(decode, draw, [key], most)
        await eventually(lambda: decode.worker.pairs.num_pairs <= num_others, within_s=HANG_S)
        return said

    @contextlib.asynccontextmanager
    async def _reservation(self) -> AsyncIterator[tuple[int, int]]:
        """A live one at decode, to be aimed at."""
        identity = self._cluster.decodes[0].worker.front.identity
        opening = decode_pb2.Open(
            request_id="aimed at",
            token_ids=types_pb2.TokenIds(ids=range(10, 50)),
            num_prompt_tokens=40,
            sampling=types_pb2.SamplingParams(seed=1, temperature=0),
            stopping=types_pb2.StoppingParams(max_tokens=2),
            model_fingerprint=identity.model_fingerprint,
            cache_salt=str(self.num_pairs),
        )
        call = self._cluster.decode_stub.Decode(timeout=HANG_S)
        await call.write(decode_pb2.DecodeRequest(open=opening))
        reserved = (await call.read()).reserved
        try:
            yield reserved.reservation, reserved.attempt
        finally:
            call.cancel()

    async def _speak(self, decode, draw: random.Random, keys: list[tuple[int, int]], most: int) -> int:
        own = decode.worker.pairs._identity
        call = decode.raw("/pdserve.v1.DecodeService/ConnectPair")(timeout=HANG_S)
        joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=HANG_S)
        group: GlooGroup | None = None
        num_said = 0
        try:
            boot_id = f"boot-{self.num_pairs}"
            identity = PairIdentity("fuzz", boot_id, own.model_fingerprint, own.kv_layout, PROTOCOL_VERSION)
            hello = PairHello(identity, ("gloo",), await joining.rendezvous())
            await call.write(wire.request_to_proto(hello).SerializeToString())
            welcome = wire.response_from_proto(decode_pb2.ConnectPairResponse.FromString(await call.read()))
            assert isinstance(welcome, PairWelcome)
            group = await joining.connect(welcome.rendezvous)
            credentials = Credentials(welcome.token, identity.boot_id, welcome.boot_id)
            await asyncio.to_thread(authenticate, group, PREFILL_RANK, credentials, timeout_s=HANG_S)
            block_bytes = decode.worker.engine._cache.block_bytes
            sequence_number, pays = 0, draw.random() < 0.8
            while num_said < most:
                message = fuzzing.header(draw, keys, sequence_number, block_bytes=block_bytes)
                raw = message.SerializeToString()
                told = fuzzing.spoilt(draw, raw, 0.02)
                await call.write(told)
                num_said += 1
                sequence_number += message.HasField("announcement")
                # Every payload as it was announced or none any more: a larger one ends the process, inside gloo.
                pays = pays and told == raw
                if pays and message.HasField("announcement") and message.announcement.num_bytes < 2**20:
                    with contextlib.suppress(PairBroken):
                        group.send(group.send_buffer(message.announcement.num_bytes))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # Decode has ended the stream, as it may.
            pass
        finally:
            call.cancel()
            joining.cancel()
            if group is not None:
                await asyncio.to_thread(group.close)
                group.release()
        self.num_headers += num_said
        return num_said


def footprint() -> dict[str, float]:
    """What this process takes, after what is garbage has been collected."""
    gc.collect()
    process = psutil.Process()
    return {
        "memory, MiB": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "tasks": len(asyncio.all_tasks()),
    }
