"""The values that the two sides of a pair exchange. No torch, no protobuf: `common.transport.wire` knows the latter.

On the control stream prefill sends PairHello, then AttemptBegin, ChunkHeader, Commit and AbandonAttempt; decode sends
PairWelcome, then Acknowledgement, Credit, CommitAcknowledgement and ReservationGone; the last of either is Goodbye.
Payload alone goes over the pair's process group, one message for each ChunkHeader, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from common.params import TokenLogprob

# Raised whenever an older peer would misunderstand a message of this file.
PROTOCOL_VERSION = 1
# Of a name, a boot id, a fingerprint, a layout or a transport in a hello or welcome.
MAX_WORD_BYTES = 1024
MAX_OFFERS = 16
MAX_TOKEN_BYTES = 64


class AttemptKey(NamedTuple):
    """One try to fill one reservation. Decode mints both numbers; a higher attempt fences off every lower one."""

    reservation: int
    attempt: int


class TransferStatus(Enum):
    """How a chunk, a commit or an attempt fared."""

    OK = "ok"
    # An older attempt, or a reservation that is gone: dropped.
    FENCED = "fenced"
    # The payload is not what was announced: dropped.
    CORRUPT = "corrupt"
    # Lengths, layers or blocks do not fit the reservation: dropped.
    INVALID = "invalid"


class AttemptOutcome(NamedTuple):
    """How an attempt ended at prefill. `status` None: the pair broke. `num_bytes`: payload announced for it."""

    status: TransferStatus | None
    detail: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PairIdentity:
    """Who one side of a pair is. Two sides pair only when fingerprint, layout and protocol version are equal."""

    worker: str
    # Drawn anew at each start of the process.
    boot_id: str
    model_fingerprint: str
    kv_layout: str
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class PairHello:
    identity: PairIdentity
    # Best first, as `common.transport.transports` writes them.
    transports: tuple[str, ...]
    rendezvous: bytes


@dataclass(frozen=True, slots=True)
class PairWelcome:
    worker: str
    boot_id: str
    # Single use: keys the proofs that open the process group.
    token: bytes
    transport: str
    rendezvous: bytes
    num_credits: int
    max_chunk_bytes: int


class AttemptBegin(NamedTuple):
    """Chunks of this attempt may follow. Answered by ReservationGone when decode does not know it."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Announces one payload: `num_layers` x `num_blocks` x one layer's block, in that order. Costs one credit."""

    # Counts from 0 on each pair.
    sequence_number: int
    key: AttemptKey
    first_layer: int
    num_layers: int
    # Place in the reservation's block table.
    first_block: int
    num_blocks: int
    num_bytes: int
    # Of the payload; `common.transport.checksum` says which.
    checksum: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Makes the KV of an attempt live; every chunk of it was announced before."""

    key: AttemptKey
    # Payload of all its chunks.
    num_bytes: int
    first_token_id: int
    first_token_logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class AbandonAttempt(NamedTuple):
    """Nothing more of this attempt follows."""

    key: AttemptKey


class Acknowledgement(NamedTuple):
    """Answers every ChunkHeader up to this one that is not answered yet; those before it are OK."""

    sequence_number: int
    status: TransferStatus
    detail: str


class Credit(NamedTuple):
    """That many more chunks may be announced."""

    num_chunks: int


class CommitAcknowledgement(NamedTuple):
    key: AttemptKey
    status: TransferStatus
    detail: str


class ReservationGone(NamedTuple):
    """Every attempt of this reservation up to this one is over."""

    key: AttemptKey


class Goodbye(NamedTuple):
    """The pair ends."""

    reason: str


FromPrefill = AttemptBegin | ChunkHeader | Commit | AbandonAttempt | Goodbye
FromDecode = Acknowledgement | Credit | CommitAcknowledgement | ReservationGone | Goodbye
