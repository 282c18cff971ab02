"""A copy between the tiers that fails or hangs is seen by its caller, undone, and harms nobody else."""

from __future__ import annotations

from time import monotonic

import pytest

from cache_manager import CacheSwapMetadata, LayerDoneCounter, OutOfBlocks, TransferFailed, TransferTimeout
from tests.cache_manager.kit import Cache

PROMPT = list(range(100, 110))


def fail_next_load(cache: Cache, num_good_copies: int) -> None:
    load = cache.controller.load_host_to_device

    def failing(metadata: CacheSwapMetadata) -> LayerDoneCounter:
        cache.copier.fails_in = num_good_copies
        cache.controller.load_host_to_device = load  # type: ignore[method-assign]
        return load(metadata)

    cache.controller.load_host_to_device = failing  # type: ignore[method-assign]


def test_behind_a_copy_that_hangs_nothing_is_written_through() -> None:
    cache = Cache(num_host_blocks=8, write_policy="write_through", transfer_timeout=0.05)
    table = cache.manager.open(PROMPT[:3])
    cache.run(table, PROMPT[:3])
    with cache.closed_gate():
        with pytest.raises(TransferTimeout):
            cache.manager.swap_out(table)
        cache.start([1] * 8)
        assert cache.manager.stats().host.num_owned == 1


def test_a_backup_of_a_block_that_is_evicted_behind_a_hanging_copy_is_thrown_away() -> None:
    cache = Cache(num_blocks=4, num_host_blocks=8, write_policy="write_through", transfer_timeout=0.05)
    table = cache.manager.open([3] * 3)
    cache.run(table, [3] * 3)
    with cache.closed_gate():
        cache.manager.close(cache.start([1] * 8))  # starts to be written through
        with pytest.raises(TransferTimeout):
            cache.manager.swap_out(table)
        cache.manager.open([2] * 12)  # takes the blocks of [1] * 8
    cache.manager.drain()
    assert cache.manager.match([1] * 9).num_tokens == 0
    assert cache.manager.stats().host.num_free == 8
    cache.check_cached()
    cache.manager.check_integrity()


@pytest.mark.parametrize("num_good_copies", [0, 1, 5])
def test_a_failed_swap_out_leaves_the_request_on_the_device(num_good_copies: int) -> None:
    cache = Cache(num_host_blocks=10)
    table = cache.start(PROMPT)
    cache.copier.fails_in = num_good_copies
    with pytest.raises(TransferFailed, match="injected failure") as failure:
        cache.manager.swap_out(table)
    assert isinstance(failure.value.__cause__, OSError)
    assert (table.is_on_device, table.host_blocks) == (True, [])
    assert cache.manager.stats().host.num_free == 10
    cache.check_table(table, PROMPT)
    cache.manager.check_integrity()
    cache.manager.swap_out(table)
    cache.check_table(table, PROMPT)


@pytest.mark.parametrize("num_good_copies", [0, 1, 5])
def test_after_a_failed_load_of_hits_the_request_computes_them(num_good_copies: int) -> None:
    cache = Cache(num_host_blocks=10)
    cache.manager.close(cache.start(PROMPT))
    cache.manager.close(cache.start([7] * 40))
    fail_next_load(cache, num_good_copies)
    table = cache.manager.open(PROMPT)
    assert table.num_computed == 8
    with pytest.raises(TransferFailed, match="injected failure"):
        cache.manager.wait_for_loads()
    with pytest.raises(TransferFailed, match="take_failed"):
        cache.manager.commit(table, PROMPT)
    assert list(cache.manager.take_failed()) == [table]
    assert (table.num_computed, table.is_on_device, table.load) == (0, True, None)
    assert cache.manager.take_failed() == {}
    cache.run(table, PROMPT)
    cache.check_table(table, PROMPT)
    cache.check_cached()
    cache.manager.check_integrity()
    assert cache.manager.stats().num_failed_loads == 1


def test_after_a_failed_swap_in_the_request_is_on_the_host_as_before() -> None:
    cache = Cache(num_host_blocks=10)
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    cache.manager.reset()
    available = cache.manager.num_available
    fail_next_load(cache, 3)
    cache.manager.swap_in(table, num_tokens=20)
    with pytest.raises(TransferFailed):
        cache.manager.wait_for_layer(2)
    assert list(cache.manager.take_failed()) == [table]
    assert (table.is_on_device, table.blocks, cache.manager.num_available) == (False, [], available)
    cache.check_table(table, PROMPT)
    cache.manager.check_integrity()
    cache.manager.swap_in(table)
    cache.manager.wait_for_loads()
    cache.check_table(table, PROMPT)


def test_a_failed_write_back_loses_the_cached_block_and_is_counted() -> None:
    cache = Cache(num_host_blocks=10)
    cache.manager.close(cache.start(PROMPT))
    cache.copier.fails_in = 1
    table = cache.start([7] * 40)
    stats = cache.manager.stats()
    assert (stats.num_failed_backups, stats.num_lost_blocks) == (2, 2)
    assert stats.last_failure == "a copy failed: injected failure"
    assert cache.manager.match(PROMPT).num_tokens == 0
    cache.check_table(table, [7] * 40)
    cache.manager.check_integrity()


def test_a_late_copy_to_the_host_harms_nobody() -> None:
    cache = Cache(num_host_blocks=4, transfer_timeout=0.05)
    table = cache.start(PROMPT)
    with cache.closed_gate():
        with pytest.raises(TransferTimeout, match=r"layers \[0, 1, 2, 3\] were not copied within 0.05 s"):
            cache.manager.swap_out(table)
        assert table.is_on_device
        assert cache.manager.stats().host.num_owned == 3  # the copy keeps them
        cache.manager.check_integrity()
        cache.manager.close(table)
        begin = monotonic()
        other = cache.start([7] * 40)  # evicts what the copy still reads, without waiting for the same copy again
        assert monotonic() - begin < 0.5
        cache.manager.check_integrity()
    cache.manager.drain()
    assert cache.manager.stats().host.num_owned == 0
    assert cache.manager.match(PROMPT).num_tokens == 0
    cache.check_table(other, [7] * 40)
    cache.check_cached()
    cache.manager.check_integrity()


def test_a_late_load_keeps_its_blocks_after_its_request_is_gone() -> None:
    cache = Cache(num_blocks=4, num_host_blocks=4, transfer_timeout=0.05)
    table = cache.start(PROMPT)
    cache.manager.swap_out(table)
    cache.manager.reset()
    with cache.closed_gate():
        cache.manager.swap_in(table)
        with pytest.raises(TransferTimeout):
            cache.manager.wait_for_layer(0)
        cache.manager.close(table)
        assert cache.manager.num_available == 1
        cache.manager.check_integrity()
        with pytest.raises(OutOfBlocks):
            cache.manager.open([7] * 8)
        with pytest.raises(TransferTimeout):
            cache.manager.drain()
    cache.manager.drain()
    other = cache.start([7] * 16)
    cache.check_table(other, [7] * 16)
    cache.manager.check_integrity()
