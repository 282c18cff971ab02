"""The host tier: every byte of every tensor moves both ways, when it has to and only then."""

from __future__ import annotations

from threading import Timer

import numpy as np
import pytest

from cache_manager import (
    NoHostTier,
    OutOfBlocks,
    Tier,
    WrongState,
)
from tests.cache_manager.kit import SHAPES, Cache

PROMPT = list(range(100, 110))


@pytest.fixture(params=SHAPES)
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param, num_host_blocks=10)


def poison_device(cache: Cache) -> None:
    for array in cache.controller.caches.values():
        array[...] = 0xBA


def test_a_request_survives_the_host_and_a_poisoned_device(cache: Cache) -> None:
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    assert (table.is_on_device, table.blocks, len(table.host_blocks)) == (False, [], 3)
    cache.check_table(table, PROMPT)
    other = cache.start([7] * 40)  # takes every block of the device
    poison_device(cache)
    cache.manager.close(other)
    cache.manager.reset()
    cache.manager.swap_in(table, num_tokens=12)
    cache.manager.wait_for_loads()
    cache.check_table(table, PROMPT)
    cache.run(table, [*PROMPT, 1, 2])
    cache.check_table(table, [*PROMPT, 1, 2])
    assert table.host_blocks == []
    cache.manager.check_integrity()


def test_evicted_blocks_come_back_from_the_host(cache: Cache) -> None:
    cache.manager.close(cache.start(PROMPT))
    other = cache.start([7] * 40)
    cache.manager.close(other)
    match = cache.manager.match(PROMPT)
    assert (match.num_tokens, match.num_host_tokens) == (8, 8)
    table = cache.manager.open(PROMPT)
    assert (table.num_device_hits, table.num_host_hits, table.num_computed) == (0, 8, 8)
    assert table.load is not None
    cache.run(table, PROMPT)
    assert table.load is None
    cache.check_table(table, PROMPT)
    cache.check_cached()
    cache.manager.check_integrity()
    stats = cache.manager.stats()
    per_block = cache.controller.bytes_per_block
    assert stats.bytes_moved["host_to_device"] == 2 * per_block
    # Two of the prompt's, and of the other request two that gave way to the loaded ones and one to the new block.
    assert stats.bytes_moved["device_to_host"] == 5 * per_block


def test_eviction_does_not_copy_what_is_on_the_host_already() -> None:
    cache = Cache(num_host_blocks=10)
    cache.manager.close(cache.start(PROMPT))
    cache.manager.close(cache.start([7] * 40))
    cache.manager.close(cache.start(PROMPT))
    before = cache.manager.stats().num_backed_up_blocks
    cache.manager.close(cache.start([7] * 36))
    assert cache.manager.stats().num_backed_up_blocks - before <= 3  # none of PROMPT's two
    assert cache.manager.match(PROMPT).num_tokens == 8


@pytest.mark.parametrize(("policy", "uses"), [("write_through", 1), ("write_through_selective", 2)])
def test_write_through_copies_with_the_first_or_the_second_use(policy: str, uses: int) -> None:
    cache = Cache(num_host_blocks=10, write_policy=policy)
    for use in range(1, 4):
        cache.manager.close(cache.start(PROMPT))
        cache.manager.drain()
        assert cache.manager.stats().num_backed_up_blocks == (2 if use >= uses else 0)
    cache.check_cached()
    cache.manager.check_integrity()


def test_an_eviction_waits_for_the_backup_of_the_same_block() -> None:
    cache = Cache(num_blocks=3, num_host_blocks=8, write_policy="write_through")
    with cache.closed_gate():
        cache.manager.close(cache.start([1] * 8))
        Timer(0.1, cache.copier.gate.set).start()
        cache.manager.open([2] * 12)
    match = cache.manager.match([1] * 9)
    assert (match.num_tokens, match.num_host_tokens) == (8, 8)
    cache.check_cached()
    cache.manager.check_integrity()


def test_a_backup_that_a_swap_out_overtook_gives_its_blocks_back() -> None:
    cache = Cache(num_host_blocks=8, write_policy="write_through")
    with cache.closed_gate():
        table = cache.start(PROMPT)
        Timer(0.1, cache.copier.gate.set).start()
        cache.manager.swap_out(table)
    cache.manager.drain()
    assert cache.manager.stats().host.num_free == 5
    cache.check_table(table, PROMPT)
    cache.manager.check_integrity()


def test_blocks_written_through_leave_the_host_from_the_end_of_their_prefix() -> None:
    cache = Cache(num_blocks=3, num_host_blocks=3, write_policy="write_through")
    cache.manager.close(cache.start([1] * 8))  # its first block is written first
    cache.manager.drain()
    cache.start([2] * 9)  # evicts both from the device; one of its own two blocks needs the place of one of theirs
    cache.manager.drain()
    assert cache.manager.match([1] * 9).num_tokens == 4
    cache.check_cached()
    cache.manager.check_integrity()


def test_without_room_on_the_host_the_least_recently_used_blocks_go() -> None:
    cache = Cache(num_blocks=4, num_host_blocks=2)
    for token in (1, 2, 3):
        cache.manager.close(cache.start([token] * 8))
    cache.manager.close(cache.start([4] * 16))
    hits = [cache.manager.match([token] * 9).num_tokens for token in (1, 2, 3, 4)]
    assert hits == [0, 0, 8, 8]
    cache.check_cached()
    cache.manager.check_integrity()


def test_a_request_larger_than_the_host_stays_on_the_device() -> None:
    cache = Cache(num_host_blocks=2)
    table = cache.start(PROMPT)
    assert cache.manager.can_swap_out(table) == (False, "3 host blocks needed, 2 are free or evictable")
    with pytest.raises(OutOfBlocks, match="3 host blocks asked for, 2 of 2 are free or evictable"):
        cache.manager.swap_out(table)
    cache.check_table(table, PROMPT)
    cache.manager.check_integrity()


def test_a_request_does_not_return_without_room_and_can_be_closed_on_the_host() -> None:
    cache = Cache(num_blocks=4, num_host_blocks=4)
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    other = cache.start([7] * 12)
    with pytest.raises(OutOfBlocks, match="3 blocks needed, 1 are free or evictable"):
        cache.manager.swap_in(table)
    with pytest.raises(WrongState, match="on the host"):
        cache.manager.extend(table, 11)
    with pytest.raises(WrongState):
        cache.manager.swap_out(table)
    with pytest.raises(ValueError, match="num_tokens: expected 10 or more, got 3"):
        cache.manager.swap_in(table, num_tokens=3)
    cache.check_table(table, PROMPT)
    cache.manager.close(table)
    cache.check_table(other, [7] * 12)
    cache.manager.check_integrity()


def test_a_load_for_a_request_that_is_gone_is_not_cached() -> None:
    cache = Cache(num_blocks=8, num_host_blocks=8)
    cache.manager.close(cache.start([1] * 12))
    cache.manager.close(cache.start([2] * 32))  # [1] * 12 is on the host
    cache.manager.close(cache.start([1] * 5))  # its first block is on the device again
    with cache.closed_gate():
        table = cache.manager.open([1] * 13)
        assert (table.num_device_hits, table.num_host_hits) == (4, 8)
        cache.manager.close(table)  # from now on the first block may be evicted before the two that load
    cache.manager.drain()
    cache.manager.check_integrity()
    for num_tokens in (20, 24, 28):
        cache.manager.close(cache.start([3] * num_tokens))
        cache.manager.check_integrity()
        cache.check_cached()


def test_a_second_request_waits_for_the_blocks_that_the_first_one_loads() -> None:
    cache = Cache(num_host_blocks=10)
    cache.manager.close(cache.start(PROMPT))
    cache.manager.close(cache.start([7] * 40))
    first, second = cache.manager.open(PROMPT), cache.manager.open(PROMPT)
    assert second.num_device_hits == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert cache.manager.stats().bytes_moved["host_to_device"] == 2 * cache.controller.bytes_per_block
    cache.manager.check_integrity()


def test_a_layer_may_be_read_as_soon_as_all_of_its_tensors_are_there() -> None:
    cache = Cache("gqa with scales", num_host_blocks=10)
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    cache.manager.reset()
    poison_device(cache)
    copied: list[int] = []
    copy = cache.copier.copy

    def slow_copy(**arguments: object) -> None:
        copied.append(len(copied))
        if len(copied) == 5:  # the first tensor of the second layer
            cache.copier.gate.clear()
        copy(**arguments)  # type: ignore[arg-type]

    cache.copier.copy = slow_copy  # type: ignore[method-assign, assignment]
    cache.manager.swap_in(table)
    cache.manager.wait_for_layer(0)
    assert table.load is not None
    assert table.load.is_layer_done(0)
    assert not table.load.is_layer_done(1)
    for key in [key for key in cache.keys if key[1] == 0]:
        expected = cache.block_bytes(key, cache.seeds(PROMPT)[:4])
        assert np.array_equal(cache.controller.caches[key][table.blocks[0]], expected)
    cache.copier.gate.set()
    cache.manager.wait_for_loads()
    cache.check_table(table, PROMPT)


def test_a_block_still_cached_on_the_device_is_not_loaded() -> None:
    cache = Cache(num_host_blocks=10)
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    cache.manager.swap_in(table)
    cache.manager.wait_for_loads()
    assert cache.manager.stats().bytes_moved["host_to_device"] == cache.controller.bytes_per_block  # its tail
    cache.check_table(table, PROMPT)
    cache.manager.check_integrity()


def test_forks_that_are_swapped_out_share_their_cached_host_blocks() -> None:
    cache = Cache(num_host_blocks=4)
    first = cache.start(PROMPT)
    second = cache.manager.fork(first)
    cache.manager.swap_out(first)
    cache.manager.swap_out(second)
    assert first.host_blocks[:2] == second.host_blocks[:2]
    assert cache.manager.stats().host.num_owned == 4
    for table in (first, second):
        cache.check_table(table, PROMPT)
    cache.manager.check_integrity()


def test_a_reset_keeps_the_bytes_of_requests_on_both_tiers() -> None:
    cache = Cache(num_host_blocks=10)
    on_host, on_device = cache.start(PROMPT), cache.start([5] * 10)
    cache.manager.swap_out(on_host)
    cache.manager.reset()
    assert not len(cache.manager._tiers.tree)
    cache.check_table(on_host, PROMPT)
    cache.check_table(on_device, [5] * 10)
    cache.manager.swap_in(on_host)
    cache.manager.wait_for_loads()
    cache.run(on_host, [*PROMPT, 1, 2, 3])
    cache.check_table(on_host, [*PROMPT, 1, 2, 3])
    assert cache.manager.match(PROMPT).num_tokens == 0
    cache.manager.check_integrity()


def test_without_a_host_tier_an_eviction_drops_blocks_and_copies_nothing() -> None:
    cache = Cache(num_host_blocks=0)
    cache.manager.close(cache.start(PROMPT))
    cache.start([7] * 40)
    assert cache.copier.num_copies == 0
    assert cache.manager.stats().num_lost_blocks == 2
    with pytest.raises(NoHostTier):
        _ = cache.manager._tiers.host


def test_draft_entries_beyond_the_confirmed_tokens_do_not_move() -> None:
    cache = Cache(num_host_blocks=10)
    table = cache.start(PROMPT)
    cache.manager.extend(table, 25)
    cache.manager.swap_out(table)
    assert len(table.host_blocks) == 3
    assert [node.blocks[Tier.HOST] for node in table.path] == table.host_blocks[:2]
    cache.manager.check_integrity()
