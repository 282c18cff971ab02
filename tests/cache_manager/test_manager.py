"""CacheManager on the device: hits, copy-on-write, drafts, and calls that fail without a trace."""

from __future__ import annotations

import numpy as np
import pytest

from cache_manager import (
    BlockTable,
    CacheConfig,
    CacheController,
    CacheInUse,
    CacheManager,
    NoHostTier,
    OutOfBlocks,
    TransferFailed,
    UnknownTable,
    WrongState,
)
from tests.cache_manager.kit import SHAPES, Cache

PROMPT = list(range(100, 110))  # two full blocks of four tokens, and a half


@pytest.fixture(params=SHAPES)
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param)


def check(cache: Cache, **tables: tuple[BlockTable, list[int]]) -> None:
    cache.manager.check_integrity()
    cache.check_cached()
    for table, tokens in tables.values():
        cache.check_table(table, tokens)


def test_a_second_request_shares_the_full_blocks_of_a_common_prefix(cache: Cache) -> None:
    first = cache.start(PROMPT)
    match = cache.manager.match(PROMPT)
    assert (match.num_tokens, match.num_blocks_needed, match.fits) == (8, 1, True)
    second = cache.start(PROMPT)
    assert (second.num_device_hits, second.blocks[:2]) == (8, first.blocks[:2])
    assert second.blocks[2] != first.blocks[2]
    check(cache, first=(first, PROMPT), second=(second, PROMPT))


def test_blocks_of_a_closed_request_serve_a_later_one(cache: Cache) -> None:
    cache.manager.close(cache.start(PROMPT))
    assert cache.manager.num_available == 10
    again = cache.start(PROMPT)
    assert again.num_device_hits == 8
    check(cache, again=(again, PROMPT))


def test_another_salt_shares_nothing(cache: Cache) -> None:
    first = cache.start(PROMPT)
    second = cache.start(PROMPT, salt=b"adapter")
    assert not set(first.blocks) & set(second.blocks)
    assert [cache.manager.match(PROMPT, salt=salt).num_tokens for salt in (b"", b"adapter", b"other")] == [8, 8, 0]
    check(cache, first=(first, PROMPT), second=(second, PROMPT))


def test_a_fully_cached_prompt_computes_its_last_token_in_a_copy(cache: Cache) -> None:
    tokens = PROMPT[:8]
    first = cache.start(tokens)
    second = cache.manager.open(tokens)
    assert second.num_computed == 7
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] != first.blocks[1]
    cache.write(second, tokens, 7, 8)
    check(cache, first=(first, tokens))
    assert cache.manager.commit(second, tokens) == 1  # the copy gives way to the cached block
    assert second.blocks == first.blocks
    assert cache.manager.stats().num_copied_blocks == 1
    check(cache, first=(first, tokens), second=(second, tokens))


def test_a_fully_cached_prompt_in_a_full_cache_computes_its_last_block() -> None:
    cache = Cache(num_blocks=2)
    cache.manager.close(cache.start(PROMPT[:8]))
    table = cache.manager.open(PROMPT[:8])
    assert table.num_computed == 4
    cache.run(table, PROMPT[:8])
    check(cache, table=(table, PROMPT[:8]))


def test_extending_a_forked_request_copies_only_its_tail(cache: Cache) -> None:
    first = cache.start(PROMPT)
    second = cache.manager.fork(first)
    assert cache.manager.extend(second, 11) == 2
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    cache.write(second, [*PROMPT, 7], 10, 11)
    cache.manager.commit(second, [*PROMPT, 7])
    assert cache.manager.extend(first, 11) == 3  # it is the only owner of its tail again
    cache.write(first, [*PROMPT, 8], 10, 11)
    cache.manager.commit(first, [*PROMPT, 8])
    check(cache, first=(first, [*PROMPT, 8]), second=(second, [*PROMPT, 7]))


def test_two_requests_that_computed_the_same_block_end_with_one(cache: Cache) -> None:
    first, second = cache.manager.open(PROMPT), cache.manager.open(PROMPT)
    assert not set(first.blocks) & set(second.blocks)
    available = cache.manager.num_available
    cache.run(first, PROMPT)
    cache.run(second, PROMPT)
    assert second.blocks[:2] == first.blocks[:2]
    assert cache.manager.num_available == available + 2
    check(cache, first=(first, PROMPT), second=(second, PROMPT))


def test_rejected_drafts_are_neither_cached_nor_kept(cache: Cache) -> None:
    table = cache.start(PROMPT)
    cache.manager.extend(table, 18)  # one confirmed token and seven drafts
    cache.write(table, [*PROMPT, 5, *[99] * 7], 10, 18)
    cache.manager.commit(table, [*PROMPT, 5])
    assert (len(table.blocks), len(table.path), table.num_computed) == (5, 2, 11)
    cache.manager.truncate(table, 12)
    assert len(table.blocks) == 3
    assert cache.manager.match([*PROMPT, 5, 99, 99]).num_tokens == 8
    check(cache, table=(table, [*PROMPT, 5]))
    cache.run(table, [*PROMPT, 5, 6, 7])
    check(cache, table=(table, [*PROMPT, 5, 6, 7]))


def test_a_block_that_depends_on_the_next_token_is_found_only_where_that_token_follows() -> None:
    cache = Cache(num_lookahead_tokens=1)
    table = cache.start(PROMPT)
    hits = {n: cache.manager.match([*PROMPT[:n], 99]).num_tokens for n in (4, 5, 8, 9, 10)}
    assert hits == {4: 0, 5: 4, 8: 4, 9: 8, 10: 8}
    assert cache.manager.match(PROMPT[:8]).num_tokens == 4, "one block less than without: the token behind is unknown"
    cache.manager.commit(table, [*PROMPT, 5, 6], num_computed=10)
    cache.manager.extend(table, 12)
    cache.write(table, [*PROMPT, 5, 6], 10, 12)
    cache.manager.commit(table, [*PROMPT, 5, 6])
    assert len(table.path) == 2, "the third block is full, but nothing follows yet"
    cache.manager.commit(table, [*PROMPT, 5, 6, 7], num_computed=12)
    assert len(table.path) == 3
    cache.manager.check_integrity()


def test_blocks_with_equal_tokens_and_another_next_token_stay_apart() -> None:
    cache = Cache(num_lookahead_tokens=1)
    first, second = cache.manager.open(PROMPT[:9]), cache.manager.open([*PROMPT[:8], 99])
    cache.run(first, PROMPT[:9])
    cache.run(second, [*PROMPT[:8], 99])
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] != first.blocks[1]
    cache.manager.check_integrity()


def test_blocks_beyond_what_is_complete_are_cached_later(cache: Cache) -> None:
    table = cache.manager.open(PROMPT)
    cache.write(table, PROMPT, 0, 10)
    cache.manager.commit(table, PROMPT, num_complete=7)
    assert (len(table.path), table.num_computed) == (1, 10)
    assert cache.manager.match(PROMPT).num_tokens == 4
    cache.manager.commit(table, PROMPT)
    assert len(table.path) == 2
    check(cache, table=(table, PROMPT))


@pytest.mark.parametrize("num_computed", [3, 11])
def test_computed_tokens_are_known_ones_and_grow(cache: Cache, num_computed: int) -> None:
    table = cache.start(PROMPT[:4])
    with pytest.raises(ValueError, match=f"num_computed: expected 4 .. 4 of 10 tokens, got {num_computed}"):
        cache.manager.commit(table, PROMPT, num_computed=num_computed)
    check(cache, table=(table, PROMPT[:4]))


def test_rollback_never_gives_back_a_cached_block(cache: Cache) -> None:
    table = cache.start(PROMPT)
    cache.manager.truncate(table, 8)
    assert table.num_computed == 8
    for num_tokens in (7, -1, 9):
        with pytest.raises(ValueError, match=f"num_tokens: expected 8 .. 8, got {num_tokens}"):
            cache.manager.truncate(table, num_tokens)
    check(cache, table=(table, PROMPT))


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    cache = Cache(num_blocks=5)
    cache.manager.close(cache.start([1] * 8))
    cache.manager.close(cache.start([2] * 8))
    cache.manager.close(cache.start([1] * 9))  # used again
    third = cache.start([3] * 8)  # one block is free, one has to go
    assert [cache.manager.match([token] * 9).num_tokens for token in (1, 2, 3)] == [8, 4, 8]
    cache.run(third, [3] * 16)
    assert [cache.manager.match([token] * 9).num_tokens for token in (1, 2, 3)] == [4, 0, 8]
    check(cache, third=(third, [3] * 16))


def test_open_without_room_changes_nothing_not_even_the_order_of_eviction() -> None:
    cache = Cache(num_blocks=5)
    cache.manager.close(cache.start([1] * 8))
    cache.manager.close(cache.start([2] * 8))
    queue = cache.manager._tiers.device.least_recently_used(9)
    match = cache.manager.match([1] * 8 + [5] * 16)
    assert (match.num_blocks_needed, match.fits) == (6, False)
    with pytest.raises(OutOfBlocks, match="6 blocks needed, 5 are free or evictable"):
        cache.manager.open([1] * 8 + [5] * 16)
    assert cache.manager._tiers.device.least_recently_used(9) == queue
    assert cache.manager.stats().num_queried_tokens == 16
    check(cache)


def test_extend_without_room_changes_nothing() -> None:
    cache = Cache(num_blocks=4)
    table = cache.start(PROMPT)
    blocks = list(table.blocks)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 are free or evictable"):
        cache.manager.extend(table, 20)
    assert (table.blocks, table.num_computed) == (blocks, 10)
    check(cache, table=(table, PROMPT))


@pytest.mark.parametrize("num_good_copies", range(3))
def test_a_failed_copy_of_a_shared_tail_changes_nothing(num_good_copies: int) -> None:
    cache = Cache()
    first = cache.start(PROMPT)
    second = cache.manager.fork(first)
    available = cache.manager.num_available
    cache.copier.fails_in = num_good_copies
    with pytest.raises(TransferFailed, match="injected failure"):
        cache.manager.extend(second, 11)
    assert second.blocks == first.blocks
    assert cache.manager.num_available == available
    check(cache, first=(first, PROMPT), second=(second, PROMPT))
    cache.run(second, [*PROMPT, 1])
    check(cache, first=(first, PROMPT), second=(second, [*PROMPT, 1]))


def test_open_that_fails_in_its_copy_is_undone() -> None:
    cache = Cache()
    cache.manager.close(cache.start(PROMPT[:8]))
    cache.copier.fails_in = 0
    with pytest.raises(TransferFailed):
        cache.manager.open(PROMPT[:8])
    assert cache.manager.stats().num_tables == 0
    assert cache.manager.num_available == 10
    check(cache)


def test_foreign_and_closed_tables_are_refused() -> None:
    cache, other = Cache(), Cache()
    table, foreign = cache.start(PROMPT), other.start(PROMPT)
    cache.manager.close(table)
    for stranger in (table, foreign, BlockTable(b"")):
        for call in (
            lambda table: cache.manager.extend(table, 20),
            lambda table: cache.manager.commit(table, PROMPT),
            lambda table: cache.manager.truncate(table, 8),
            cache.manager.fork,
            cache.manager.swap_out,
            cache.manager.swap_in,
            cache.manager.can_swap_out,
            cache.manager.close,
        ):
            with pytest.raises(UnknownTable):
                call(stranger)
    assert foreign.blocks
    check(cache)


def test_wrong_numbers_of_tokens_are_refused() -> None:
    cache = Cache()
    table = cache.start(PROMPT)
    for call, message in (
        (lambda: cache.manager.open([]), "tokens: expected 1 or more, got 0"),
        (lambda: cache.manager.open(PROMPT, num_tokens=9), "num_tokens: expected 10 or more, got 9"),
        (lambda: cache.manager.open([1.5]), "tokens: expected one row of integers"),
        (lambda: cache.manager.extend(table, 9), "num_tokens: expected 10 or more, got 9"),
        (lambda: cache.manager.extend(table, -1), "num_tokens: expected 10 or more, got -1"),
        (lambda: cache.manager.commit(table, PROMPT[:9]), "num_computed: expected 10 .. 12 of 9 tokens, got 9"),
        (
            lambda: cache.manager.commit(table, [*PROMPT, 1, 2, 3]),
            "num_computed: expected 10 .. 12 of 13 tokens, got 13",
        ),
        (lambda: cache.manager.resize(11), "num_blocks: expected 1 .. 10, got 11"),
        (lambda: CacheManager(cache.controller, num_blocks=0, block_size=4), "num_blocks: expected 1 .. 10, got 0"),
        (lambda: CacheManager(cache.controller, num_blocks=1, block_size=0), "block_size: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    check(cache, table=(table, PROMPT))


def test_without_a_host_tier_swapping_is_refused_with_the_reason() -> None:
    cache = Cache()
    table = cache.start(PROMPT)
    assert cache.manager.can_swap_out(table) == (False, "there is no host tier")
    with pytest.raises(NoHostTier):
        cache.manager.swap_out(table)
    with pytest.raises(WrongState, match="on the device already"):
        cache.manager.swap_in(table)
    check(cache, table=(table, PROMPT))


def test_resize_evicts_cached_blocks_but_refuses_owned_ones() -> None:
    cache = Cache()
    table = cache.start(PROMPT)
    cache.manager.close(cache.start([1] * 8))
    assert max(table.blocks) == 2
    with pytest.raises(CacheInUse, match="expected 3 or more while block 2 is owned"):
        cache.manager.resize(2)
    assert cache.manager.match([1] * 9).num_tokens == 8
    cache.manager.resize(3)
    assert cache.manager.match([1] * 9).num_tokens == 0
    assert cache.manager.num_available == 0
    cache.manager.resize(10)
    assert cache.manager.num_available == 7
    check(cache, table=(table, PROMPT))


def test_after_a_reset_nothing_from_before_is_ever_a_hit() -> None:
    cache = Cache()
    old = cache.start(PROMPT)
    cache.manager.reset()
    assert cache.manager.match(PROMPT).num_tokens == 0
    cache.run(old, [*PROMPT, 1, 2])  # computed in part with what may have been other weights
    assert cache.manager.match([*PROMPT, 1, 2]).num_tokens == 0
    cache.start(PROMPT)
    assert cache.manager.match(PROMPT).num_tokens == 8
    check(cache, old=(old, [*PROMPT, 1, 2]))


def test_without_prefix_caching_nothing_is_shared() -> None:
    cache = Cache(is_prefix_cached=False)
    first, second = cache.start(PROMPT), cache.start(PROMPT)
    assert not set(first.blocks) & set(second.blocks)
    cache.manager.close(first)
    stats = cache.manager.stats()
    assert (stats.device.num_evictable, stats.hit_rate) == (0, 0.0)
    check(cache, second=(second, PROMPT))


def test_a_weak_hash_costs_hits_but_mixes_nothing() -> None:
    cache = Cache()
    cache.manager._tiers.tree._hash = lambda content: bytes([len(content) & 1])
    first = cache.start(PROMPT)
    second = cache.start([9] * 10)
    assert second.is_closed_to_cache
    assert second.num_device_hits == 0
    for table, tokens in ((first, PROMPT), (second, [9] * 10)):
        cache.check_table(table, tokens)
    cache.check_cached()
    cache.manager.check_integrity()


def test_a_controller_without_caches_serves_a_scheduler_alone() -> None:
    manager = CacheManager(CacheController(CacheConfig(num_layers=0)), num_blocks=4, block_size=2)
    table = manager.open(np.arange(4))
    manager.commit(table, np.arange(4))
    twin = manager.open(np.arange(4))
    assert twin.num_computed == 3
    manager.close(table)
    manager.close(twin)
    manager.check_integrity()


def test_statistics_count_hits_and_blocks_by_state() -> None:
    cache = Cache()
    cache.manager.close(cache.start(PROMPT))
    cache.start(PROMPT)
    stats = cache.manager.stats()
    assert (stats.num_queried_tokens, stats.num_device_hit_tokens, stats.hit_rate) == (20, 8, 0.4)
    assert (stats.num_tables, stats.device.num_owned, stats.device.num_evictable, stats.device.num_free) == (
        1,
        3,
        0,
        7,
    )
    assert stats.bytes_moved == {"device_to_device": 0, "device_to_host": 0, "host_to_device": 0}
