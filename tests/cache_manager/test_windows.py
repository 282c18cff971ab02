"""Window pools: what requests keep of their last tokens, on the device and on the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_manager import (
    BlockId,
    CacheConfig,
    CacheController,
    CacheManager,
    CachePool,
    OutOfBlocks,
    WindowBlocks,
    WindowRoom,
)
from tests.cache_manager.kit import POOLS, Cache
from tests.cache_manager.window_kit import LARGE, ROOMY, TOKENS, Owner, check, large_manager, roomy_cache, starve


@pytest.fixture
def cache() -> Cache:
    return roomy_cache()


def first_positions(windows: dict[str, WindowBlocks], pools: dict[str, CachePool]) -> dict[str, int]:
    return {name: window.first * pools[name].block_tokens for name, window in windows.items()}


def test_of_1000_confirmed_tokens_the_positions_from_873_and_993_on_are_kept() -> None:
    assert {name: pool.first_live(1000) for name, pool in LARGE.items()} == {
        "rows": 873,
        "states4": 993,
        "states128": 873,
    }
    manager = large_manager()
    table, tokens = manager.open(range(1000)), np.arange(1000)
    manager.extend(table, 1000)
    manager.commit(table, tokens)
    assert first_positions(table.windows, LARGE) == {"rows": 832, "states4": 992, "states128": 872}
    held = {name: len(window.blocks) for name, window in table.windows.items()}
    assert held == {"rows": 16 - 13, "states4": 250 - 248, "states128": 125 - 109}
    manager.check_integrity()


def test_drafts_and_tokens_that_one_group_has_not_seen_free_nothing() -> None:
    manager = large_manager()
    table, tokens = manager.open(range(640)), np.arange(640)
    manager.extend(table, 640)
    manager.commit(table, tokens, num_complete=300)
    assert first_positions(table.windows, LARGE) == {"rows": 128, "states4": 292, "states128": 168}
    manager.extend(table, 900)  # 260 drafts
    assert first_positions(table.windows, LARGE)["rows"] == 128
    manager.commit(table, tokens)
    assert first_positions(table.windows, LARGE) == {"rows": 512, "states4": 632, "states128": 512}
    manager.check_integrity()


def test_a_long_chunk_has_room_for_all_its_rows_at_once(cache: Cache) -> None:
    table = cache.manager.open(TOKENS[:20])
    assert all(not window.blocks for window in table.windows.values())
    cache.manager.extend(table, 20)
    counts = {name: len(window.blocks) for name, window in table.windows.items()}
    assert counts == {"window": 10, "state": 20, "closed": 5}


@pytest.mark.parametrize("name", POOLS)
def test_extend_takes_blocks_in_every_pool_or_in_none(cache: Cache, name: str) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:6])
    taken = starve(cache, name)
    before = [list(table.blocks), *(list(window.blocks) for window in table.windows.values())]
    with pytest.raises(OutOfBlocks, match=rf"blocks of pool {name} asked for, 0 of {ROOMY[name]} are free"):
        manager.extend(table, 12)
    assert [list(table.blocks), *(list(window.blocks) for window in table.windows.values())] == before
    manager._tiers.windows.device.free({name: taken})
    cache.run(table, TOKENS[:12])
    check(cache)
    cache.check_table(table, TOKENS)


@pytest.mark.parametrize("num_tokens", range(8, 17))
def test_rejected_drafts_go_and_the_rows_before_them_stay(cache: Cache, num_tokens: int) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:num_tokens])
    for _ in range(3):
        held = {name: list(window.blocks) for name, window in table.windows.items()}
        manager.extend(table, num_tokens + 4)
        cache.write(table, [*TOKENS[:num_tokens], 0, 0, 0, 0], num_tokens, num_tokens + 4)
        manager.truncate(table, num_tokens)
        assert {name: window.blocks for name, window in table.windows.items()} == held
        cache.check_table(table, TOKENS)
    cache.run(table, TOKENS)
    cache.check_table(table, TOKENS)
    check(cache)


def test_going_back_behind_what_is_kept_is_refused(cache: Cache) -> None:
    manager = cache.manager
    table = manager.open([7] * 3)
    cache.run(table, TOKENS[:11])
    manager._tiers.tree  # noqa: B018 - nothing is cached behind block 2
    state = [(window.first, list(window.blocks)) for window in table.windows.values()]
    # Positions from 6 on are kept in `window`, so 11 and 12 tokens can be gone on from; 10 would need position 5.
    with pytest.raises(ValueError, match="num_tokens: expected a number whose last 6 tokens are kept in pool window"):
        manager.truncate(table, 10)
    assert [(window.first, list(window.blocks)) for window in table.windows.values()] == state
    manager.truncate(table, 11)
    check(cache)


def test_forks_share_windows_and_write_to_their_own(cache: Cache) -> None:
    manager, table = cache.manager, cache.start(TOKENS[:11])
    child = manager.fork(table)
    assert {n: w.blocks for n, w in child.windows.items()} == {n: w.blocks for n, w in table.windows.items()}
    other = [*TOKENS[:11], 70, 71, 72]
    cache.run(child, other)
    cache.check_table(table, TOKENS)
    cache.run(table, TOKENS[:15])
    cache.check_table(child, other)
    cache.check_table(table, TOKENS)
    assert (
        manager.stats().num_copied_blocks == 1 + 1 + 1
    )  # the last block of main, window and closed has rows that stay
    manager.close(table)
    check(cache)
    cache.check_table(child, other)


def test_a_request_that_ends_gives_everything_back(cache: Cache) -> None:
    table = cache.start(TOKENS[:11])
    cache.manager.close(table)
    assert {name: blocks.num_owned for name, blocks in cache.manager.stats().windows.items()} == dict.fromkeys(
        POOLS, 0
    )
    cache.manager.reset()
    assert {name: blocks.num_free for name, blocks in cache.manager.stats().windows.items()} == ROOMY
    check(cache)


@given(
    pool=st.builds(CachePool, st.just("any"), st.integers(1, 9), st.integers(1, 20), st.just(0)),
    steps=st.lists(st.integers(1, 12), max_size=12),
)
def test_the_ring_finds_the_block_of_every_position_and_is_never_too_narrow(pool: CachePool, steps: list[int]) -> None:
    width = pool.ring_width(max(steps, default=1))
    window, confirmed, next_block = WindowBlocks(), 0, 0
    for num_step in steps:
        while window.first + len(window.blocks) < -(-(confirmed + num_step) // pool.block_tokens):
            window.blocks.append(BlockId(next_block))
            next_block += 1
        line = np.full(width, -7, np.int32)
        window.write_ring(line)
        for position in range(pool.first_live(confirmed), confirmed + num_step):
            place = position // pool.block_tokens
            assert line[place % width] == window.blocks[place - window.first]
        assert sorted(line[line >= 0].tolist()) == window.blocks
        assert set(line[line < 0].tolist()) <= {-1}
        confirmed += num_step
        while (window.first + 1) * pool.block_tokens <= pool.first_live(confirmed):
            window.first += 1
            if window.blocks:
                del window.blocks[0]


def test_a_line_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="line: expected 3 entries or more, got 2"):
        WindowBlocks(blocks=[BlockId(1), BlockId(2), BlockId(3)]).write_ring(np.zeros(2, np.int32))


@given(
    pool=st.builds(CachePool, st.just("any"), st.integers(1, 9), st.integers(1, 20), st.just(0)),
    requests=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=6),
)
def test_room_for_requests_is_enough_wherever_they_stand(pool: CachePool, requests: list[tuple[int, int]]) -> None:
    used = 0
    for confirmed, num_step in requests:
        used += len({place // pool.block_tokens for place in range(pool.first_live(confirmed), confirmed + num_step)})
    room = WindowRoom(len(requests), num_step_tokens=sum(num_step for _, num_step in requests))
    assert used <= room.needed(pool)


# What is refused


def test_main_blocks_end_where_window_blocks_do() -> None:
    controller = CacheController(CacheConfig(num_layers=1, window_blocks=dict.fromkeys(LARGE, 9)))
    controller.initialize_kv_cache(Owner(), 8)
    message = "block_size: expected a multiple of 64, the tokens of a block of pool rows, got 32"
    with pytest.raises(ValueError, match=message):
        CacheManager(controller, num_blocks=8, block_size=32)
    with pytest.raises(ValueError, match="snapshot_interval: expected 1 or more, got 0"):
        roomy_cache(snapshot_interval=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("main", 4, 8, 4), "name: expected another one than that of the pool of all tokens, got 'main'"),
        (("x", 0, 8, 4), "pool x: expected block_tokens and live_tokens of 1 or more, got 0 and 8"),
        (("x", 4, 8, 8), "pool x: expected boundary_tokens from 0 to 7, got 8"),
    ],
)
def test_an_impossible_pool_is_refused(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachePool(*arguments)
