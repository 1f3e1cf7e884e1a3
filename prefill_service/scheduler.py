"""Which prompts are computed next. Knows blocks and token counts, never tensors.

A job's life:

    submit ──▶ waiting ──blocks──▶ running ──last chunk──▶ shipping ──last acknowledgement──▶ ended, blocks freed
                  └────────────────────┴── attempt gone, deadline, cancel ──▶ ended once its announced chunks are done
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from common.blocks import BlockPool
from common.clock import Clock
from common.engine.chunks import Chunk, plan_chunks
from common.engine.prefix import PrefixCache
from common.errors import InvalidArgument, ResourceExhausted
from common.sequence import Sequence


@dataclass(eq=False, slots=True)
class Job:
    """One attempt of one request at this worker."""

    sequence: Sequence
    # Leading tokens that decode holds already.
    num_remote_cached_tokens: int = 0
    # Leading tokens that were cached here when the job started.
    num_cached_tokens: int = 0
    # Blocks handed to the transport so far, the cached ones of decode included.
    num_shipped_blocks: int = 0
    arrived_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0
    running: bool = False


@dataclass(eq=False)
class PrefillScheduler:
    """First come, first served within a priority; a job starts when all its blocks can be had."""

    pool: BlockPool
    prefix: PrefixCache
    max_batch_tokens: int
    max_num_seqs: int
    max_waiting: int
    clock: Clock
    running: list[Job] = field(default_factory=list)
    _waiting: list[tuple[int, int, Job]] = field(default_factory=list)
    _arrivals: itertools.count = field(default_factory=itertools.count)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens not computed yet, of waiting and running jobs."""
        jobs = [*self.running, *(job for _, _, job in self._waiting)]
        return sum(job.sequence.num_tokens - job.sequence.num_computed for job in jobs)

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            InvalidArgument: it can never fit into this worker's cache.
            ResourceExhausted: the queue is full.
        """
        needed = self._blocks_for(job.sequence)
        if needed > self.pool.num_blocks:
            raise InvalidArgument(
                f"{job.sequence.num_tokens} tokens need {needed} KV blocks, "
                f"this prefill worker has {self.pool.num_blocks}; "
                "shorten the prompt or raise num_blocks",
                field="token_ids",
            )
        if len(self._waiting) >= self.max_waiting:
            raise ResourceExhausted(
                f"{self.max_waiting} prompts are waiting at this prefill worker (max_waiting_requests)"
            )
        job.arrived_s = self.clock()
        heapq.heappush(self._waiting, (-job.sequence.request.priority, next(self._arrivals), job))

    def schedule(self) -> list[Chunk]:
        """Starts what fits and cuts the next chunks."""
        self.start_waiting()
        sequences = [job.sequence for job in self.running]
        return plan_chunks(sequences, max_batch_tokens=self.max_batch_tokens, block_size=self.pool.block_size)

    def start_waiting(self) -> None:
        """Gives blocks to waiting jobs, in order, as far as they go."""
        while self._waiting and len(self.running) < self.max_num_seqs and self._start(self._waiting[0][2]):
            heapq.heappop(self._waiting)

    def finish_computing(self, job: Job) -> None:
        """The last chunk is done: the job holds its blocks until `release`."""
        job.running = False
        self.running.remove(job)

    def drop(self, job: Job) -> None:
        """Stops computing a job, wherever it stands; it holds its blocks until `release`."""
        if job.running:
            self.finish_computing(job)
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] is not job]
            heapq.heapify(self._waiting)

    def release(self, job: Job) -> None:
        """Nothing reads the job's blocks any more."""
        self.pool.free(job.sequence.block_table)
        job.sequence.block_table = []

    def _start(self, job: Job) -> bool:
        sequence = job.sequence
        cached = self._cached_blocks(sequence)
        self.pool.pin(cached)
        needed = self._blocks_for(sequence) - len(cached)
        if needed > self.pool.num_free:
            self.pool.free(cached)
            return False
        sequence.block_table = cached + self.pool.allocate(needed)
        sequence.num_computed = job.num_cached_tokens = len(cached) * self.pool.block_size
        job.num_shipped_blocks = job.num_remote_cached_tokens // self.pool.block_size
        job.started_s = self.clock()
        job.running = True
        self.running.append(job)
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The last token is always computed, since its logits draw the next one; prompt logprobs need all logits."""
        if sequence.request.num_prompt_logprobs is not None:
            return []
        self.prefix.hash(sequence)
        return self.pool.match(sequence.block_hashes[: (sequence.num_tokens - 1) // self.pool.block_size])

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self.pool.block_size)
