"""A bare client that does what the router does for one request: opens Decode, calls Prefill, reads the tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import grpc.aio

from common import rpc
from common.params import SamplingParams, StoppingParams
from common.wire import sampling_to_proto, stopping_to_proto
from pdserve.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

TIMEOUT_S = 120.0


class Timeline(NamedTuple):
    """When things happened, on this process's monotonic clock, in seconds."""

    prefill_called: float
    # Of every message with tokens: (when, how many).
    arrivals: list[tuple[float, int]]
    prefill: prefill_pb2.PrefillResponse

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


class DirectClient:
    """One prefill and one decode worker, without a router."""

    def __init__(self, prefill_address: str, decode_address: str) -> None:
        self._decode_address = decode_address
        self._prefill_channel = rpc.connect(prefill_address)
        self._decode_channel = rpc.connect(decode_address)
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(self._prefill_channel)
        self._decode = decode_pb2_grpc.DecodeServiceStub(self._decode_channel)
        self._fingerprint = ""

    async def __aenter__(self) -> DirectClient:
        watch = worker_pb2_grpc.WorkerServiceStub(self._decode_channel).WatchLoad(
            worker_pb2.WatchLoadRequest(), timeout=10
        )
        self._fingerprint = (await watch.read()).identity.model_fingerprint
        watch.cancel()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._prefill_channel.close()
        await self._decode_channel.close()

    async def generate(self, token_ids: Sequence[int], max_tokens: int) -> Timeline:
        """Greedy, without end tokens."""
        fields = {
            "request_id": "benchmark",
            "token_ids": types_pb2.TokenIds(ids=token_ids),
            "num_prompt_tokens": len(token_ids),
            "sampling": sampling_to_proto(SamplingParams(temperature=0.0)),
            "stopping": stopping_to_proto(StoppingParams(max_tokens=max_tokens, ignore_eos=True)),
            "model_fingerprint": self._fingerprint,
        }
        stream = self._decode.Decode(timeout=TIMEOUT_S)
        await stream.write(decode_pb2.DecodeRequest(open=decode_pb2.Open(**fields)))
        reserved = (await stream.read()).reserved
        request = prefill_pb2.PrefillRequest(
            reservation=reserved.reservation,
            attempt=reserved.attempt,
            pair_endpoint=reserved.pair_endpoint or self._decode_address,
            num_cached_tokens=reserved.num_cached_tokens,
            **fields,
        )
        prefill_called = time.monotonic()
        prefill = asyncio.ensure_future(self._call_prefill(request))
        arrivals = []
        while (response := await stream.read()) is not grpc.aio.EOF:
            if response.HasField("chunk"):
                arrivals.append((time.monotonic(), len(response.chunk.token_ids)))
        return Timeline(prefill_called, arrivals, await prefill)

    async def _call_prefill(self, request: prefill_pb2.PrefillRequest) -> prefill_pb2.PrefillResponse:
        return await self._prefill.Prefill(request, timeout=TIMEOUT_S)
