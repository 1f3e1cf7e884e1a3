"""A decode engine that keeps books, real caches of a few kilobytes, and process groups with fault knobs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common.engine.kv_cache import KvCache
from common.engine.kv_writer import KvWriter
from common.model.config import ModelConfig
from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import DECODE_RANK, PREFILL_RANK
from common.transport.messages import AttemptKey, AttemptOutcome, ChunkHeader, Commit, PairIdentity, TransferStatus
from common.transport.places import place_of
from common.transport.transports import Transports
from decode_service.pairs import PairServer
from pdserve.v1 import decode_pb2_grpc

WAIT_S = 10.0
NUM_LAYERS = 3

PREFILL = PairIdentity("prefill-0", "prefill-boot", "digest", "layout")
DECODE = PairIdentity("decode-0", "decode-boot", "digest", "layout")
CPU = torch.device("cpu")
# What a worker on a CPU has.
GLOO = Transports(("gloo",), CPU, place_of(CPU))


def until(condition: Callable[[], object]) -> None:
    """Blocks until it holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.001)


async def until_async(condition: Callable[[], object]) -> None:
    """Lets the event loop run until it holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def small_cache(
    num_blocks: int = 16, *, num_layers: int = NUM_LAYERS, head_dim: int = 8, random: bool = False, device: str = "cpu"
) -> KvCache:
    """Blocks of 2 x 16 x 2 x head_dim fp32: 2 KiB a layer by default."""
    config = ModelConfig(
        model_id="kv-only",
        num_layers=num_layers,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=32,
        vocab_size=32,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        context_length=256,
        dtype="float32",
        eos_token_ids=(0,),
    )
    cache = KvCache(config, num_blocks, 16, torch.float32, device)
    if random:
        for layer in cache.layers:
            layer.normal_()
    return cache


@dataclass
class FakeReservation:
    attempt: int
    block_ids: list[int]
    committed: Commit | None = None


@dataclass
class FakeEngine:
    """A KvSink with a thread of its own, as the decode engine has: fence check and scatter are one step of it."""

    cache: KvCache
    reservations: dict[int, FakeReservation] = field(default_factory=dict)
    # Everything that came, in order, as (what, key or reason).
    heard: list[tuple[str, object]] = field(default_factory=list)
    on_gone: Callable[[int, AttemptKey], None] = lambda pair_id, key: None

    def __post_init__(self) -> None:
        self._writer = KvWriter(self.cache)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running = threading.Event()
        self._running.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._running.set()
        self._inbox.put(None)
        self._thread.join(WAIT_S)

    def pause(self) -> None:
        """What comes waits in the inbox, as in the middle of a long step."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def words(self) -> list[str]:
        return [what for what, _ in self.heard]

    def attempt_begun(self, pair_id, key):
        self._put(
            "begun", key, lambda: None if self._verdict(key)[0] is TransferStatus.OK else self.on_gone(pair_id, key)
        )

    def chunk_landed(self, pair_id, header, payload, done):
        self._put("chunk", header, lambda: done(*self._write(header, payload)))

    def commit_received(self, pair_id, commit, done):
        self._put("commit", commit.key, lambda: done(*self._commit(commit)))

    def attempt_abandoned(self, pair_id, key):
        self._put("abandoned", key, lambda: None)

    def pair_lost(self, pair_id, reason):
        self._put("lost", reason, lambda: None)

    def _put(self, what: str, about: object, act: Callable[[], None]) -> None:
        self.heard.append((what, about))
        self._inbox.put(act)

    def _run(self) -> None:
        while (act := self._inbox.get()) is not None:
            self._running.wait(WAIT_S)
            act()

    def _verdict(self, key: AttemptKey) -> tuple[TransferStatus, str]:
        reservation = self.reservations.get(key.reservation)
        if reservation is None or reservation.attempt != key.attempt:
            return TransferStatus.FENCED, f"{key} is over"
        return TransferStatus.OK, ""

    def _write(self, header: ChunkHeader, payload: torch.Tensor) -> tuple[TransferStatus, str, torch.cuda.Event | None]:
        verdict, still_read = self._verdict(header.key), None
        if verdict[0] is TransferStatus.OK:
            block_ids = self.reservations[header.key.reservation].block_ids
            block_ids = block_ids[header.first_block : header.first_block + header.num_blocks]
            if len(block_ids) != header.num_blocks or header.first_layer + header.num_layers > self.cache.num_layers:
                return TransferStatus.INVALID, "does not fit", None
            still_read = self._writer.write(header.first_layer, header.num_layers, block_ids, payload)
        return *verdict, still_read

    def _commit(self, commit: Commit) -> tuple[TransferStatus, str]:
        verdict = self._verdict(commit.key)
        if verdict[0] is TransferStatus.OK:
            self._writer.join()
            self.reservations[commit.key.reservation].committed = commit
        return verdict


class Outcomes:
    """Takes `on_done`, and says so when one attempt ends twice."""

    def __init__(self) -> None:
        self._by_key: dict[AttemptKey, AttemptOutcome] = {}
        self._changed = threading.Condition()

    def of(self, key: AttemptKey) -> Callable[[AttemptOutcome], None]:
        def on_done(outcome: AttemptOutcome) -> None:
            with self._changed:
                assert key not in self._by_key, "ended twice"
                self._by_key[key] = outcome
                self._changed.notify_all()

        return on_done

    def has(self, key: AttemptKey) -> bool:
        return key in self._by_key

    def wait(self, key: AttemptKey) -> AttemptOutcome:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._by_key, WAIT_S), f"{key} never ended"
            return self._by_key[key]


class FaultyGroup:
    """A process group with knobs."""

    def __init__(self, group: GlooGroup) -> None:
        self.transport = group.transport
        self.num_sent = 0
        # Flips one bit of the payload with this number.
        self.corrupt_send: int | None = None
        self._group = group
        self.wait_for_end = group.wait_for_end
        self.close = group.close
        self.receive = group.receive
        self.device = group.device
        self.send_buffer = group.send_buffer
        self.receive_buffer = group.receive_buffer
        self.release = group.release

    def send(self, payload: torch.Tensor):
        if self.num_sent == self.corrupt_send:
            payload = payload.clone()
            payload[len(payload) // 2] ^= 1
        self.num_sent += 1
        return self._group.send(payload)


async def gloo_groups() -> tuple[GlooGroup, GlooGroup]:
    """Prefill's and decode's member of one group, in one process."""
    prefill, decode = (GlooJoining(rank, interface="127.0.0.1", timeout_s=5) for rank in (PREFILL_RANK, DECODE_RANK))
    rendezvous = [await prefill.rendezvous(), await decode.rendezvous()]
    return tuple(await asyncio.gather(prefill.connect(rendezvous[1]), decode.connect(rendezvous[0])))  # type: ignore[return-value]


class PairServicer(decode_pb2_grpc.DecodeServiceServicer):
    """DecodeService with nothing but ConnectPair."""

    def __init__(self, pairs: PairServer) -> None:
        self._pairs = pairs

    async def ConnectPair(self, request_iterator, context):
        async with contextlib.aclosing(self._pairs.connect(request_iterator, context)) as responses:
            async for response in responses:
                yield response
