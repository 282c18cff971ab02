"""Where requests can start: prefixes with the rows before their boundary, on the device and on the host."""

from __future__ import annotations

import numpy as np
import pytest

from cache_manager import OutOfBlocks, Tier, TransferFailed
from tests.cache_manager.kit import POOLS, Cache
from tests.cache_manager.window_kit import ROOMY, TOKENS, check, evict_prefix, large_manager, roomy_cache, starve


@pytest.fixture
def cache() -> Cache:
    return roomy_cache()


def test_a_hit_at_256_needs_its_main_block_and_its_rows_in_every_pool() -> None:
    manager, tokens = large_manager(), np.arange(300)
    table = manager.open(tokens)
    manager.extend(table, 300)
    manager.commit(table, tokens)
    node = table.path[0]
    snapshot = manager._tiers.windows.device.find(node)
    assert snapshot is not None
    # Rows 129 .. 255 and states 252 .. 255; windows of 128 begin anew at 256.
    assert {name: len(blocks) for name, blocks in snapshot.blocks.items()} == {"rows": 2, "states4": 1}
    manager.close(table)
    assert manager.match(tokens).num_tokens == 256
    again = manager.open(tokens)
    assert again.num_computed == 256
    assert {name: (window.begin, window.first, len(window.blocks)) for name, window in again.windows.items()} == {
        "rows": (129, 2, 2),
        "states4": (252, 63, 1),
        "states128": (256, 32, 0),
    }
    manager.close(again)
    manager.check_integrity()


@pytest.mark.parametrize("missing", ["rows", "states4", "main"])
def test_a_hit_at_256_becomes_0_if_anything_is_missing(missing: str) -> None:
    manager, tokens = large_manager(), np.arange(300)
    table = manager.open(tokens)
    manager.extend(table, 300)
    manager.commit(table, tokens)
    manager.close(table)
    if missing == "main":
        manager.close(manager.open(np.full(2048, 7)))
    else:
        device = manager._tiers.windows.device
        taken = device.take({missing: device.num_available(missing)})
        device.free(taken)
    match = manager.match(tokens)
    assert (match.num_tokens, match.num_unusable_tokens) == (0, 0 if missing == "main" else 256)
    manager.check_integrity()


def test_a_pool_that_begins_anew_at_boundaries_needs_no_rows_there() -> None:
    manager, tokens = large_manager(), np.arange(300)
    table = manager.open(tokens)
    manager.extend(table, 300)
    manager.commit(table, tokens)
    manager.close(table)
    device = manager._tiers.windows.device
    device.free(device.take({"states128": device.num_available("states128")}))
    assert manager.match(tokens).num_tokens == 256


def test_a_hit_is_shortened_to_the_last_boundary_that_has_its_rows(cache: Cache) -> None:
    manager = cache.manager
    table = cache.start(TOKENS[:17])
    nodes = list(table.path)
    manager.close(table)
    assert manager.match(TOKENS[:17]).num_tokens == 16
    windows = manager._tiers.windows.device
    for count in (4, 3, 2):
        windows.drop(nodes[count - 1])
        match = manager.match(TOKENS[:17])
        assert (match.num_tokens, match.num_unusable_tokens) == (4 * (count - 1), 4 * (5 - count))
    again = cache.start(TOKENS[:17])
    assert (again.num_device_hits, manager.stats().num_unusable_tokens) == (4, 12)
    cache.check_table(again, TOKENS)
    manager.close(again)
    assert manager.match(TOKENS[:17]).num_tokens == 16, "computing again brings the snapshots back"
    check(cache)


def test_a_prompt_that_is_cached_as_a_whole_starts_at_the_boundary_before(cache: Cache) -> None:
    cache.manager.close(cache.start(TOKENS[:12]))
    match = cache.manager.match(TOKENS[:12])
    assert (match.num_tokens, match.num_unusable_tokens, match.num_blocks_needed) == (8, 4, 3)
    table = cache.start(TOKENS[:12])
    assert (table.num_device_hits, cache.manager.stats().num_copied_blocks) == (8, 0)
    cache.check_table(table, TOKENS)


def test_rows_that_are_gone_before_their_block_is_cached_make_no_snapshot() -> None:
    cache = roomy_cache(num_lookahead_tokens=2)
    table = cache.manager.open(TOKENS[:9])
    for num_tokens in (9, 10):  # the second block is cached when the two tokens behind it are known
        cache.manager.extend(table, num_tokens)
        cache.manager.commit(table, TOKENS[:num_tokens])
    assert len(table.path) == 2
    assert table.windows["window"].first == 2  # the boundary at 8 needs position 3, in block 1
    assert cache.manager.stats().num_snapshots == 1
    cache.manager.check_integrity()


def test_snapshots_give_way_the_least_recently_used_first() -> None:
    cache = roomy_cache(window_blocks=ROOMY | {"state": 13})
    manager = cache.manager
    prompts = [[number] * 5 for number in (50, 51, 52)]
    for prompt in prompts:
        manager.close(cache.start(prompt))  # two states each
    manager.close(cache.start(prompts[0]))  # used again
    assert manager.stats().num_snapshots == 3
    hits = []
    for num_taken in (7, 8, 10, 12):
        taken = manager._tiers.windows.device.take({"state": num_taken})
        hits.append([manager.match(prompt).num_tokens for prompt in prompts])
        manager._tiers.windows.device.free(taken)
    assert hits == [[4, 4, 4], [4, 0, 4], [4, 0, 0], [0, 0, 0]]
    assert manager.stats().num_evicted_snapshots == 3
    check(cache)


def test_every_second_boundary_gets_a_snapshot_if_that_is_the_policy() -> None:
    cache = roomy_cache(snapshot_interval=2)
    table = cache.start(TOKENS[:18])
    assert (cache.manager.stats().num_snapshots, cache.manager.stats().snapshot_interval) == (2, 2)
    cache.manager.close(table)
    lengths = [cache.manager.match(TOKENS[:length]).num_tokens for length in range(1, 20)]
    assert lengths == [0] * 8 + [8] * 8 + [16] * 3


def test_reset_and_resize_forget_snapshots(cache: Cache) -> None:
    manager = cache.manager
    manager.close(cache.start(TOKENS[:17]))
    manager.resize(2)
    assert manager.stats().num_snapshots == 2
    check(cache)
    manager.reset()
    assert manager.stats().num_snapshots == 0
    check(cache)


# The host


def test_a_round_trip_brings_the_windows_back(cache: Cache) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:11])
    manager.extend(table, 15)  # drafts, which stay behind
    manager.swap_out(table)
    assert {name: len(window.blocks) for name, window in table.windows.items()} == dict.fromkeys(POOLS, 0)
    cache.check_table(table, TOKENS)
    for number in range(3):
        manager.close(cache.start([80 + number] * 11))
    manager.swap_in(table)
    manager.wait_for_loads()
    cache.check_table(table, TOKENS)
    cache.run(table, TOKENS[:20])
    cache.check_table(table, TOKENS)
    check(cache)


@pytest.mark.parametrize("name", POOLS)
def test_a_host_without_room_for_a_window_refuses_the_request(cache: Cache, name: str) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:11])
    taken = starve(cache, name, "host")
    ok, reason = manager.can_swap_out(table)
    assert not ok
    assert f"blocks of pool {name} asked for, 0 of" in reason
    with pytest.raises(OutOfBlocks, match=f"of pool {name}"):
        manager.swap_out(table)
    assert table.is_on_device
    cache.check_table(table, TOKENS)
    manager._tiers.windows.host.free({name: taken})
    manager.swap_out(table)
    check(cache)


@pytest.mark.parametrize("name", POOLS)
def test_a_device_without_room_for_a_window_leaves_the_request_on_the_host(cache: Cache, name: str) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:11])
    manager.swap_out(table)
    taken = starve(cache, name)
    with pytest.raises(OutOfBlocks, match=f"of pool {name}"):
        manager.swap_in(table)
    assert not table.is_on_device
    manager._tiers.windows.device.free({name: taken})
    manager.swap_in(table)
    manager.drain()
    cache.check_table(table, TOKENS)
    check(cache)


@pytest.mark.parametrize("policy", ["write_back", "write_through"])
def test_a_prefix_on_the_host_comes_back_with_its_snapshot(policy: str) -> None:
    cache = roomy_cache(num_blocks=6, write_policy=policy)
    cache.manager.close(cache.start(TOKENS[:17]))
    cache.manager.drain()
    evict_prefix(cache)
    stats = cache.manager.stats()
    assert stats.num_snapshots == 0
    assert stats.num_host_snapshots == 4
    match = cache.manager.match(TOKENS[:17])
    assert (match.num_tokens, match.num_host_tokens) == (16, 16)
    table = cache.start(TOKENS[:17])
    assert table.num_host_hits == 16
    cache.check_table(table, TOKENS)
    assert cache.manager._tiers.windows.device.find(table.path[3]) is not None, "loaded once, it serves the next one"
    check(cache)


def test_without_room_for_its_snapshot_a_prefix_on_the_host_is_no_hit() -> None:
    cache = roomy_cache(num_blocks=6)
    taken = starve(cache, "window", "host")
    cache.manager.close(cache.start(TOKENS[:17]))
    evict_prefix(cache)
    match = cache.manager.match(TOKENS[:17])
    assert (match.num_tokens, match.num_unusable_tokens) == (0, 16)
    cache.manager._tiers.windows.host.free({"window": taken})
    check(cache)


def test_a_snapshot_that_is_only_on_the_host_is_loaded_for_a_prefix_on_the_device(cache: Cache) -> None:
    manager = cache.manager
    table = cache.start(TOKENS[:9])
    node = table.path[1]
    manager.swap_out(table)  # the nodes are on both tiers now
    manager.close(table)
    manager._tiers.back_up([node])
    manager.drain()
    manager._tiers.windows.device.drop(node)
    again = manager.open(TOKENS[:9])
    assert (again.num_device_hits, again.num_host_hits, again.load is not None) == (8, 0, True)
    cache.run(again, TOKENS[:9])
    cache.check_table(again, TOKENS)
    check(cache)


def test_a_failed_load_falls_back_to_the_last_boundary_with_rows_on_the_device(cache: Cache) -> None:
    manager = cache.manager
    table = cache.start(TOKENS[:13])
    nodes = list(table.path)
    manager.swap_out(table)
    manager.close(table)
    manager._tiers.back_up(nodes)
    manager.drain()
    for node in nodes[1:]:
        manager._tiers.windows.device.drop(node)
    cache.copier.fails_in = 0
    again = manager.open(TOKENS[:13])
    assert again.num_computed == 12
    with pytest.raises(TransferFailed):
        manager.wait_for_loads()
    assert list(manager.take_failed()) == [again]
    assert again.num_computed == 4
    assert again.windows["window"].begin == 0
    cache.check_table(again, TOKENS)
    cache.run(again, TOKENS[:13])
    cache.check_table(again, TOKENS)
    check(cache)


def test_a_snapshot_that_gave_way_while_it_was_copied_never_reaches_the_host() -> None:
    cache = roomy_cache(write_policy="write_through")
    with cache.closed_gate():
        table = cache.start(TOKENS[:5])
        cache.manager._tiers.windows.device.drop(table.path[0])
        cache.run(table, TOKENS[:13])
    cache.manager.drain()
    assert cache.manager._tiers.windows.host.find(table.path[0]) is None
    assert table.path[0].blocks[Tier.HOST] is not None
    check(cache)
