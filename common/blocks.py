"""The pool of KV blocks. Knows block ids and hashes, never tensors.

The life of a block:

              allocate                     free (last reference)
    [free] ──────────────▶ [held, n refs] ──────────────────────▶ [free]           no hash was published for it
       ▲                     ▲        │
       │ evicted by          │ pin    │ free (last reference), hash published
       │ allocate (LRU)      │        ▼
       └──────────────────[cached]◀───┘                            no reference, content reusable

Cached blocks count as free: `allocate` takes plain free blocks first and then evicts the least recently used cached
ones. A hash names the content of a block *and of everything before it* (chained), so one lookup per block finds the
longest prefix.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import xxhash

from common.errors import ResourceExhausted


def block_hashes(token_ids: Sequence[int], block_size: int, *, seed: bytes) -> list[bytes]:
    """Chained hashes (16 bytes each, xxh3-128) of the whole blocks of `token_ids`, first block first.

    `seed` keeps apart what must not be shared: the model fingerprint and the cache salt.
    """
    hashes: list[bytes] = []
    parent, size = seed, 4 * block_size
    content = struct.pack(f"<{len(token_ids)}I", *token_ids)
    for end in range(size, len(content) + 1, size):
        parent = xxhash.xxh3_128_digest(parent + content[end - size : end])
        hashes.append(parent)
    return hashes


def cache_seed(model_fingerprint: str, cache_salt: str) -> bytes:
    """Seed of `block_hashes`: length-prefixed, so that no two (fingerprint, salt) pairs collide."""
    return b"".join(
        len(part).to_bytes(4, "little") + part for part in (model_fingerprint.encode(), cache_salt.encode())
    )


class BlockPool:
    """Reference-counted blocks with a prefix cache. Not thread-safe: one engine thread owns it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Unreferenced blocks with a published hash, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, in no particular order of ids.

        Raises:
            ResourceExhausted: fewer are free; nothing is taken.
        """
        if count > self.num_free:
            raise ResourceExhausted(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def pin(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are held or cached."""
        for block in blocks:
            assert self._refs[block] or block in self._cached, f"block {block} is free and cannot be pinned"
            self._refs[block] += 1
            self._cached.pop(block, None)

    def free(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each; the last one returns the block, cached if its hash is published.

        Pass a sequence's blocks in order: later blocks are evicted first, since a prefix is useless without its
        beginning.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is freed twice"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix whose hashes are all published. Takes no reference: `pin` is the caller's."""
        blocks = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, value: bytes) -> None:
        """Makes a held, completely written block findable. A hash that is published already keeps its first block."""
        assert self._refs[block] > 0, f"block {block} is published but not held"
        if not self.prefix_cache or value in self._block_of or block in self._hash_of:
            return
        self._hash_of[block] = value
        self._block_of[value] = block

    def clear_cache(self) -> None:
        """Forgets every published hash; held blocks stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Proves that nothing leaked: every block's references are exactly those of `holders` (one block table each).

        Raises:
            AssertionError: naming the first blocks that are held by nobody, or held but not counted.
        """
        expected = Counter(block for table in holders for block in table)
        wrong = {block: (refs, expected[block]) for block, refs in enumerate(self._refs) if refs != expected[block]}
        assert not wrong, f"blocks whose (references, holders) differ: {dict(list(wrong.items())[:8])}"
        unreferenced = sorted([*self._free, *self._cached])
        assert unreferenced == [block for block, refs in enumerate(self._refs) if not refs], (
            "free lists and references differ"
        )
        assert all(self._hash_of[block] == value for value, block in self._block_of.items()), "hash tables differ"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
