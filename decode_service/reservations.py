"""What decode promised to one request, and who may write into it.

The life of a reservation:

     open            blocks: all or nothing            commit of attempt n
    ──────▶ WAITING ─────────────────────▶ FILLING(n) ─────────────────────▶ RUNNING ──▶ ended: stop, length, finish
               ▲                            │    ▲                              │
               │ retry                      │    │ retry: n + 1, same blocks    │ preempted: blocks go at once
               │                 pair lost  ▼    │                              ▼
               └──────────────────────────  LOST(n)  ◀──────────────────────────┘

What decode computes itself it commits when the first token comes from the device; until then the reservation is
FILLING, even if all of its chunks have been launched. Its blocks may be given away at any time: whoever gets them
computes on the same stream, or waits for it (`common.engine.kv_writer`), so that nothing written late survives.

The end of the stream ends it from any state. Only FILLING(n) accepts writes, and only of attempt n: minting n + 1
fences off every lower one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum

from common.sequence import Sequence
from common.transport.messages import AttemptKey, ChunkHeader, Commit, TransferStatus


class State(Enum):
    WAITING = "waiting"
    FILLING = "filling"
    RUNNING = "running"
    LOST = "lost"
    ENDED = "ended"


# Asked of every row of every step, and finding a member of an Enum takes Python 3.11 longer than all else there.
_RUNNING = State.RUNNING


class Verdict(Enum):
    """KV's way into a reservation, as the final message names it."""

    REMOTE = "remote"
    LOCAL = "local"
    RECOMPUTED = "recomputed"
    CACHED = "cached"


@dataclass(eq=False, slots=True)
class Reservation:
    """One request at this worker. `sequence.block_table` is what it holds."""

    id: int
    sequence: Sequence
    # The engine computes the KV itself, in this attempt.
    local: bool
    opened_s: float
    # When waiting for blocks (again) began, and until when it may last.
    queued_s: float
    wait_until_s: float
    # Tokens at which it ends at the latest, those of the prompt among them.
    most_tokens: int
    state: State = State.WAITING
    # 0: none minted yet.
    attempt: int = 0
    # Leading blocks that came from the prefix cache in this attempt.
    num_cached_blocks: int = 0
    # Which pair fills it in this attempt.
    pair_id: int | None = None
    # Of each layer, which of the sequence's blocks this attempt has written: bit n stands for block n.
    landed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    attempt_kv_bytes: int = 0
    # Over all attempts.
    kv_bytes: int = 0
    kv_transport: str = ""
    # Tokens had been put out when the KV was lost.
    recomputed: bool = False
    local_prefill_ms: float = 0.0
    num_local_cached_tokens: int = 0
    committed_s: float = 0.0
    first_decode_ms: float = 0.0
    # Slot in the sampling state while running.
    slot: int = -1
    # What its next step computes, while running: beyond the computed ones by the steps in flight.
    next_position: int = 0

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.id, self.attempt)

    @property
    def num_in_flight(self) -> int:
        """Steps that have been launched and not read: tokens that the host does not know yet. Of a running one."""
        return self.next_position - self.sequence.num_computed

    def is_running(self, attempt: int) -> bool:
        return self.state is _RUNNING and self.attempt == attempt

    @property
    def kv_path(self) -> Verdict:
        if self.recomputed:
            return Verdict.RECOMPUTED
        if self.local:
            return Verdict.LOCAL
        return Verdict.REMOTE if self.kv_bytes else Verdict.CACHED

    def begin_attempt(self) -> None:
        """Mints the next attempt; whatever the last one was doing is fenced off from here on."""
        self.attempt += 1
        self.state = State.FILLING
        self.pair_id = None
        self.landed.clear()
        self.attempt_kv_bytes = 0

    def judge_pair(self, pair_id: int, key: AttemptKey) -> tuple[TransferStatus, str]:
        """May this attempt write, or commit, over that pair? It is the pair's that began it."""
        verdict = self.judge_key(key)
        if verdict[0] is TransferStatus.OK and self.pair_id != pair_id:
            return TransferStatus.INVALID, f"attempt {key.attempt} was not begun on this pair"
        return verdict

    def judge_key(self, key: AttemptKey) -> tuple[TransferStatus, str]:
        """May this attempt write, or commit?"""
        if self.state is State.FILLING and not self.local and key.attempt == self.attempt:
            return TransferStatus.OK, ""
        if key.attempt > self.attempt:
            return TransferStatus.INVALID, f"attempt {key.attempt} was never minted; the newest is {self.attempt}"
        return (
            TransferStatus.FENCED,
            f"attempt {key.attempt} is over: reservation {self.id} is {self.state.value} at attempt {self.attempt}",
        )

    def judge_chunk(
        self, header: ChunkHeader, *, num_layers: int, block_bytes: int, num_blocks: int
    ) -> tuple[TransferStatus, str]:
        """May this chunk be written? The sequence's tokens fill `num_blocks`, one layer's block has `block_bytes`."""
        verdict = self.judge_key(header.key)
        if verdict[0] is not TransferStatus.OK:
            return verdict
        if header.first_layer + header.num_layers > num_layers:
            return (
                TransferStatus.INVALID,
                f"layers {header.first_layer}+{header.num_layers} exceed the model's {num_layers}",
            )
        if header.first_block < self.num_cached_blocks or header.first_block + header.num_blocks > num_blocks:
            wanted = f"[{self.num_cached_blocks}, {num_blocks})"
            return TransferStatus.INVALID, f"blocks {header.first_block}+{header.num_blocks} are not within {wanted}"
        if header.num_bytes != header.num_layers * header.num_blocks * block_bytes:
            expected = header.num_layers * header.num_blocks * block_bytes
            return TransferStatus.INVALID, f"{header.num_bytes} bytes announced where {expected} are due"
        return verdict

    def record(self, header: ChunkHeader) -> None:
        """The chunk has been written."""
        blocks = (1 << header.num_blocks) - 1 << header.first_block
        for layer in range(header.first_layer, header.first_layer + header.num_layers):
            self.landed[layer] |= blocks
        self.attempt_kv_bytes += header.num_bytes
        self.kv_bytes += header.num_bytes

    def judge_commit(
        self, commit: Commit, *, num_layers: int, num_blocks: int, vocab_size: int
    ) -> tuple[TransferStatus, str]:
        """May this commit make the attempt live? Every block of every layer must have landed."""
        verdict = self.judge_key(commit.key)
        if verdict[0] is not TransferStatus.OK:
            return verdict
        due = num_layers * (num_blocks - self.num_cached_blocks)
        num_landed = sum(blocks.bit_count() for blocks in self.landed.values())
        if num_landed != due or commit.num_bytes != self.attempt_kv_bytes:
            return (
                TransferStatus.INVALID,
                f"{num_landed} of {due} layer blocks and {self.attempt_kv_bytes} of {commit.num_bytes} bytes "
                "have landed",
            )
        if commit.first_token_id >= vocab_size:
            return (
                TransferStatus.INVALID,
                f"token {commit.first_token_id} is not below the vocabulary size {vocab_size}",
            )
        if len(commit.prompt_logprobs) >= self.sequence.num_tokens:
            return TransferStatus.INVALID, f"{len(commit.prompt_logprobs)} log-probabilities are more than the prompt's"
        return verdict
