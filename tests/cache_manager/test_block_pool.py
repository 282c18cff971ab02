"""BlockPool: every block is free or in use, exactly once, whatever is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_manager import BlockId, BlockPool, CacheInUse, OutOfBlocks, UnknownBlock


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.randoms(use_true_random=False)), max_size=60),
)
def test_random_use_conserves_blocks(num_blocks: int, calls: list[tuple[bool, int, object]]) -> None:
    pool, owned = BlockPool(num_blocks), list[BlockId]()
    for is_allocation, count, random in calls:
        if is_allocation and count > pool.num_free:
            with pytest.raises(OutOfBlocks):
                pool.allocate(count)
        elif is_allocation:
            taken = pool.allocate(count)
            assert len(taken) == count
            assert not set(taken) & set(owned)
            owned += taken
        else:
            random.shuffle(owned)  # type: ignore[attr-defined]
            pool.free(owned[:count])
            del owned[:count]
        pool.check_integrity()
        assert pool.num_free == num_blocks - len(owned)


def test_the_integrity_check_notices_a_lost_and_a_doubled_block() -> None:
    pool = BlockPool(3)
    pool._free.pop()
    with pytest.raises(AssertionError, match="neither free nor in use"):
        pool.check_integrity()
    pool = BlockPool(3)
    pool._free.append(BlockId(0))
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()


@pytest.mark.parametrize(
    "blocks", [[5], [-1], [0, 0], [2], [0, 7]], ids=["foreign", "negative", "twice", "not in use", "one bad"]
)
def test_a_refused_free_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(UnknownBlock):
        pool.free([BlockId(block) for block in blocks])
    assert pool.num_free == 2
    pool.check_integrity()
    pool.free([BlockId(0), BlockId(1)])
    assert pool.num_free == 4


def test_a_refused_allocation_says_how_many_are_free() -> None:
    pool = BlockPool(2)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 of 2 are free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_needs_a_block(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks: expected 1 or more, got {num_blocks}"):
        BlockPool(num_blocks)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count: expected 0 or more, got -1"):
        BlockPool(2).allocate(-1)


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert (pool.num_free, pool.num_owners(block)) == (1, 1)
    pool.free([block])
    assert (pool.num_free, pool.num_owners(block)) == (2, 0)
    with pytest.raises(UnknownBlock, match="block 0 is not in use"):
        pool.free([block])
    pool.check_integrity({})


def test_cached_blocks_wait_in_the_order_of_use_with_the_last_of_a_sequence_in_front() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in first + second:
        pool.cache(block)
    pool.free(second)
    pool.free(first)
    assert pool.least_recently_used(9) == [3, 2, 1, 0]
    assert (pool.num_free, pool.num_evictable, pool.num_owned) == (1, 4, 0)
    pool.share([BlockId(2)])  # out of the middle of the queue
    assert pool.least_recently_used(9) == [3, 1, 0]
    pool.touch(BlockId(3))
    assert pool.least_recently_used(9) == [1, 0, 3]
    pool.uncache(BlockId(1))
    assert pool.allocate(2) == [1, 4]
    pool.check_integrity({BlockId(2): 1, BlockId(1): 1, BlockId(4): 1})


def test_sharing_or_caching_a_free_block_is_refused() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(UnknownBlock, match="block 1 is neither owned nor cached"):
        pool.share([BlockId(0), BlockId(1)])
    assert pool.num_owners(BlockId(0)) == 1
    with pytest.raises(UnknownBlock, match="block 1 is not in use"):
        pool.cache(BlockId(1))
    with pytest.raises(UnknownBlock, match="block 0 is not cached"):
        pool.uncache(BlockId(0))
    with pytest.raises(UnknownBlock, match="block 2 is not one of the pool's 2"):
        pool.num_owners(BlockId(2))
    pool.check_integrity({BlockId(0): 1})


def test_resize_refuses_to_cut_off_a_used_block() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(8)
    pool.free(blocks[:7])
    with pytest.raises(CacheInUse, match="expected 8 or more while block 7 is used"):
        pool.resize(4)
    pool.free(blocks[7:])
    pool.resize(4)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    pool.resize(6)
    assert sorted(pool.allocate(2)) == [4, 5]
    pool.check_integrity()
    with pytest.raises(ValueError, match="num_blocks: expected 1 or more, got 0"):
        pool.resize(0)


def test_the_integrity_check_compares_reference_counts_with_owners() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    pool.check_integrity({BlockId(0): 1})
    for owners in ({}, {BlockId(0): 2}, {BlockId(0): 1, BlockId(1): 1}):
        with pytest.raises(AssertionError, match="reference counts"):
            pool.check_integrity(owners)
