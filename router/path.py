"""Puts together the proof of the path that a request took, from what both workers and the router measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.decode_stream import DecodeCompletion, KvPath
from router.prefill_call import PrefillResult


class ServingPath(NamedTuple):
    """The fields mean what ServingPath of the protocol says."""

    prefill_worker: str
    decode_worker: str
    kv_path: KvPath
    kv_bytes: int
    kv_transport: str
    queue_ms: float
    prefill_ms: float
    kv_transfer_ms: float
    first_decode_ms: float
    num_resumptions: int


@dataclass(slots=True)
class PathRecord:
    """Gathers what becomes known while a request is served."""

    # In the router, at decode and at prefill, over all attempts.
    queue_ms: float = 0.0
    num_resumptions: int = 0
    # What the last attempt's prefill worker is called; empty when decode computes the prompt itself.
    prefill_worker: str = ""
    prefill_ms: float = 0.0
    kv_transfer_ms: float = 0.0
    kv_transport: str = ""
    # Shipped to the reservation at hand, and to those that were lost with their worker.
    leg_kv_bytes: int = 0
    lost_kv_bytes: int = 0
    # By the first attempt that succeeded: what was cached when the request came.
    num_cached_tokens: int | None = None

    def begin_leg(self) -> None:
        """Another reservation; what the last one was given is lost."""
        self.lost_kv_bytes += self.leg_kv_bytes
        self.leg_kv_bytes = 0

    def begin_attempt(self, prefill_worker: str) -> None:
        """Nothing is known of it yet but its worker, none when decode computes the prompt itself."""
        self.prefill_worker = prefill_worker
        self.prefill_ms = self.kv_transfer_ms = 0.0

    def prefilled(self, result: PrefillResult) -> None:
        """The attempt succeeded."""
        self.prefill_worker = result.prefill_worker
        self.prefill_ms, self.kv_transfer_ms = result.prefill_ms, result.kv_transfer_ms
        self.queue_ms += result.queue_ms
        self.kv_transport = result.kv_transport
        self.leg_kv_bytes += result.kv_bytes
        if self.num_cached_tokens is None:
            self.num_cached_tokens = result.num_cached_tokens

    def completed(self, completion: DecodeCompletion) -> ServingPath:
        """The whole path."""
        is_local = not self.prefill_worker
        if self.num_cached_tokens is None and is_local:
            self.num_cached_tokens = completion.num_cached_tokens
        return ServingPath(
            prefill_worker=self.prefill_worker or completion.decode_worker,
            decode_worker=completion.decode_worker,
            kv_path=KvPath.RECOMPUTED if self.num_resumptions else completion.kv_path,
            kv_bytes=self.lost_kv_bytes + completion.kv_bytes,
            kv_transport=completion.kv_transport,
            queue_ms=self.queue_ms,
            prefill_ms=completion.local_prefill_ms if is_local else self.prefill_ms,
            kv_transfer_ms=self.kv_transfer_ms,
            first_decode_ms=completion.first_decode_ms,
            num_resumptions=self.num_resumptions,
        )
