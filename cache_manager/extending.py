"""How a request gets its blocks: those of a cached prefix, and those that a step writes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cache_manager.block_pool import BlockId
from cache_manager.block_table import BlockTable
from cache_manager.controller import CacheController
from cache_manager.errors import CacheError
from cache_manager.growth import BlockSpan, Growth
from cache_manager.prefix_tree import Tier
from cache_manager.tables import OpenTables


def fill_from_path(tables: OpenTables, table: BlockTable, num_blocks: int) -> None:
    """Give a fresh table the blocks of its path: shared ones, then ones that start to load.

    Args:
        tables: The open tables.
        table: One of them, without blocks.
        num_blocks: Main blocks that the table is going to have.
    """
    tiers, windows = tables.tiers, tables.tiers.windows
    on_device = [block for node in table.path if (block := node.blocks[Tier.DEVICE]) is not None]
    tiers.device.share(on_device)
    table.blocks += on_device
    windows.start(table)
    host_windows = windows.take_to_load(table)
    behind = table.path[len(on_device) :]
    on_host = [block for node in behind if (block := node.blocks[Tier.HOST]) is not None]
    if on_host or host_windows:
        tiers.host.share(on_host)  # while room is made on the device they cannot be evicted
        # All blocks at once: making room later would wait for the load, whose turn is earlier.
        table.blocks += tiers.take_device(num_blocks - len(on_device))
        places = dict(enumerate(on_host, len(on_device)))
        tables.loads.start(table, places, host_windows=host_windows, is_swap_in=False)
        tiers.host.free(on_host)
        windows.host.free(host_windows)


def extend_all(tables: OpenTables, controller: CacheController, table: BlockTable, num_tokens: int) -> int:
    """As CacheManager.extend, of a table on the device and at least table.num_computed tokens."""
    _settle_shared(tables, table, num_tokens)
    windows: Mapping[str, Growth] = {}
    if table.windows:
        filling = tables.loads.filling_windows(table)
        windows = tables.tiers.windows.growths(table, num_tokens, filling)
    return _extend(tables, controller, table, num_tokens, windows)


def extend_main(tables: OpenTables, controller: CacheController, table: BlockTable, num_tokens: int) -> int:
    """The same in the main pool alone."""
    _settle_shared(tables, table, num_tokens)
    return _extend(tables, controller, table, num_tokens, {})


def _settle_shared(tables: OpenTables, table: BlockTable, num_tokens: int) -> None:
    """Let the table's load end if a block of its path is to be copied."""
    tiers = tables.tiers
    if table.num_computed // tiers.block_size < min(len(table.path), tiers.num_blocks_of(num_tokens)):
        tables.loads.settle(table)


def _extend(
    tables: OpenTables,
    controller: CacheController,
    table: BlockTable,
    num_tokens: int,
    windows: Mapping[str, Growth],
) -> int:
    tiers, num_held = tables.tiers, len(table.blocks)
    main = _main_growth(tables, table, num_tokens)
    taken = tiers.take_device(main.num_taken)
    if windows or main.is_copied:
        taken_windows: dict[str, list[BlockId]] = {}
        try:
            taken_windows = tiers.windows.device.take({name: growth.num_taken for name, growth in windows.items()})
            tiers.counts.num_copied += _copy_shared(controller, main, taken, windows, taken_windows)
        except CacheError:
            tiers.device.free(taken)
            tiers.windows.device.free(taken_windows)
            raise
        for name, growth in windows.items():
            growth.apply(taken_windows[name], tiers.windows.device.pools[name])
    main.apply(taken, tiers.device)
    if main.replaced:
        del table.path[main.replaced[0] :]
        return main.replaced[0]
    return num_held


def _main_growth(tables: OpenTables, table: BlockTable, num_tokens: int) -> Growth:
    device, loading = tables.tiers.device, tables.loads.filling(table)
    return Growth.of(
        table.blocks,
        span=BlockSpan(0, tables.tiers.block_size),
        num_computed=table.num_computed,
        num_tokens=num_tokens,
        is_shared=lambda block: device.is_cached(block) or device.num_owners(block) - (block in loading) > 1,
    )


def _copy_shared(
    controller: CacheController,
    main: Growth,
    taken: Sequence[BlockId],
    windows: Mapping[str, Growth],
    taken_windows: Mapping[str, Sequence[BlockId]],
) -> int:
    """Copy the rows that stay of blocks that are replaced, and say how many blocks that were."""
    sources, destinations = main.copy_pairs(taken)
    pairs = {name: growth.copy_pairs(taken_windows[name]) for name, growth in windows.items() if growth.is_copied}
    if sources or pairs:
        controller.copy_blocks(sources, destinations, pairs)
    return len(sources) + len(pairs)
