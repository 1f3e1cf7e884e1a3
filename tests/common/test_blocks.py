import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.blocks import BlockPool, block_hashes, cache_seed
from common.errors import ResourceExhausted

SEED = cache_seed("model", "")


def test_a_hash_names_everything_before_it():
    one = block_hashes([1, 2, 3, 4], 2, seed=SEED)
    other = block_hashes([9, 2, 3, 4], 2, seed=SEED)
    assert len(one) == 2
    assert one[1] != other[1]
    assert block_hashes([1, 2, 3], 2, seed=SEED) == one[:1]


def test_hashes_continue_from_their_parent():
    whole = block_hashes(range(8), 2, seed=SEED)
    assert block_hashes(range(4, 8), 2, seed=whole[1]) == whole[2:]


def test_salts_and_models_share_nothing():
    seeds = {cache_seed("ab", "c"), cache_seed("a", "bc"), cache_seed("abc", ""), cache_seed("", "abc")}
    assert len(seeds) == 4
    assert len({block_hashes([1, 2], 2, seed=seed)[0] for seed in seeds}) == 4


def test_a_freed_prefix_is_found_again_until_its_blocks_are_needed():
    pool = BlockPool(4, 2)
    hashes = block_hashes([1, 2, 3, 4], 2, seed=SEED)
    blocks = pool.allocate(2)
    for block, value in zip(blocks, hashes, strict=True):
        pool.publish(block, value)
    pool.free(blocks)
    assert (pool.num_free, pool.num_cached) == (4, 2)
    assert pool.match(hashes) == blocks
    held = pool.allocate(3)
    assert pool.match(hashes) == blocks[:1], "the end of a prefix is evicted before its beginning"
    pool.free(held)


def test_a_pinned_block_is_never_evicted():
    pool = BlockPool(2, 2)
    (block,) = pool.allocate(1)
    value = block_hashes([1, 2], 2, seed=SEED)[0]
    pool.publish(block, value)
    pool.free([block])
    pool.pin([block])
    assert pool.num_free == 1
    with pytest.raises(ResourceExhausted, match="2 KV blocks wanted, 1 of 2 free"):
        pool.allocate(2)
    pool.check([[block]])


def test_the_least_recently_used_prefix_goes_first():
    pool = BlockPool(2, 1)
    values = [block_hashes([token], 1, seed=SEED)[0] for token in (1, 2)]
    blocks = pool.allocate(2)
    for block, value in zip(blocks, values, strict=True):
        pool.publish(block, value)
    pool.free(blocks[:1])
    pool.free(blocks[1:])
    pool.pin(blocks[:1])
    pool.free(blocks[:1])
    pool.allocate(1)
    assert pool.match(values[:1]) == blocks[:1]
    assert pool.match(values[1:]) == []


def test_without_a_prefix_cache_nothing_is_found():
    pool = BlockPool(2, 2, prefix_cache=False)
    (block,) = pool.allocate(1)
    value = block_hashes([1, 2], 2, seed=SEED)[0]
    pool.publish(block, value)
    pool.free([block])
    assert pool.match([value]) == []
    assert pool.num_cached == 0


def test_a_leak_is_named():
    pool = BlockPool(4, 2)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match=f"{{{block}: \\(1, 0\\)}}"):
        pool.check([])


class PoolAgainstHolders(RuleBasedStateMachine):
    """Random allocation, sharing, publication and release; the pool must always agree with who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 1)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.tables.append(self.pool.allocate(count))
        else:
            with pytest.raises(ResourceExhausted):
                self.pool.allocate(count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data) -> None:
        table = data.draw(st.sampled_from(self.tables))
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=len(table), max_size=len(table)))
        for block, value in zip(table, block_hashes(tokens, 1, seed=SEED), strict=True):
            self.pool.publish(block, value)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=5))
    def share(self, tokens: list[int]) -> None:
        found = self.pool.match(block_hashes(tokens, 1, seed=SEED))
        self.pool.pin(found)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(index))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(self.tables)


TestPoolAgainstHolders = PoolAgainstHolders.TestCase
TestPoolAgainstHolders.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
