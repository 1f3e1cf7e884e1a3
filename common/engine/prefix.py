"""The prefix cache as sequences see it: hashes of whole blocks, and their publication. Knows no tensors."""

from __future__ import annotations

from common.blocks import BlockPool, block_hashes, cache_seed
from common.sequence import Sequence


class PrefixCache:
    """Hashes of a sequence's whole blocks, and their publication in the pool."""

    def __init__(self, pool: BlockPool, model_fingerprint: str) -> None:
        self.pool = pool
        self._fingerprint = model_fingerprint

    def hash(self, sequence: Sequence) -> None:
        """Hashes the whole blocks among the sequence's tokens that are not hashed yet."""
        if not self.pool.prefix_cache:
            return
        known, size = len(sequence.block_hashes), self.pool.block_size
        if sequence.num_tokens // size > known:
            seed = sequence.block_hashes[-1] if known else cache_seed(self._fingerprint, sequence.request.cache_salt)
            sequence.block_hashes += block_hashes(sequence.token_ids[known * size :], size, seed=seed)

    def publish(self, sequence: Sequence, start: int) -> None:
        """Makes the whole computed blocks from position `start` on findable."""
        if not self.pool.prefix_cache:
            return
        self.hash(sequence)
        size = self.pool.block_size
        for index in range(start // size, sequence.num_computed // size):
            self.pool.publish(sequence.block_table[index], sequence.block_hashes[index])
