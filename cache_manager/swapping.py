"""Preemption that keeps the blocks: a request's blocks move to the host and back."""

from __future__ import annotations

from cache_manager.block_pool import BlockId
from cache_manager.block_table import BlockTable
from cache_manager.errors import CacheError, OutOfBlocks, WrongState
from cache_manager.matching import num_blocks_needed
from cache_manager.prefix_tree import Tier
from cache_manager.tables import OpenTables
from cache_manager.tiers import CacheTiers
from cache_manager.windows import SnapshotCopy


def has_host_room(tables: OpenTables, table: BlockTable) -> tuple[bool, str]:
    """As CacheManager.can_swap_out."""
    tables.require_open(table)
    tiers = tables.tiers
    if not tiers.has_host:
        return False, "there is no host tier"
    room = tiers.host.num_free + tiers.host.num_evictable
    on_host = [block for node in table.path if (block := node.blocks[Tier.HOST]) is not None]
    num_owned = sum(tiers.host.num_owners(block) > 0 for block in on_host)
    needed = tiers.num_blocks_of(table.num_computed) - num_owned
    if needed > room:
        return False, f"{needed} host blocks needed, {room} are free or evictable"
    reason = tiers.windows.missing_host_room(table) if table.is_on_device else ""
    return not reason, reason


def move_to_host(tables: OpenTables, table: BlockTable) -> int:
    """As CacheManager.swap_out; blocks that are cached on the host already are shared instead of copied.

    Returns:
        Blocks of the table on the host.
    """
    tables.settle(table)
    tiers, pool = tables.tiers, tables.tiers.host
    num_kept = tiers.num_blocks_of(table.num_computed)
    blocks = [node.blocks[Tier.HOST] for node in table.path[:num_kept]]
    blocks += [None] * (num_kept - len(blocks))
    missing = [place for place, block in enumerate(blocks) if block is None]
    shared = [block for block in blocks if block is not None]
    pool.share(shared)  # before room is made for the others
    try:
        taken, move = _take_host(tiers, table, len(missing))
        tiers.copy_out([table.blocks[place] for place in missing], taken, [move])
    except CacheError:
        pool.free(shared)
        raise
    for place, block in zip(missing, taken, strict=True):
        blocks[place] = block
        if place < len(table.path):
            tiers.attach(table.path[place], Tier.HOST, block)
    table.host_blocks = [block for block in blocks if block is not None]
    table.is_on_device = False
    del table.path[num_kept:]
    tiers.device.free(table.blocks)
    table.blocks.clear()
    tiers.windows.finish_move(table, move)
    return num_kept


def _take_host(tiers: CacheTiers, table: BlockTable, num_blocks: int) -> tuple[list[BlockId], SnapshotCopy]:
    taken = tiers.take_host(num_blocks)
    try:
        return taken, tiers.windows.prepare_move(table)
    except CacheError:
        tiers.host.free(taken)
        raise


def move_to_device(tables: OpenTables, table: BlockTable, num_tokens: int | None) -> int:
    """As CacheManager.swap_in; blocks that are cached on the device still are shared instead of copied.

    Returns:
        Blocks that are being loaded.
    """
    tables.require_open(table)
    if table.is_on_device:
        raise WrongState("the request is on the device already")
    if num_tokens is None:
        num_tokens = table.num_computed
    if num_tokens < table.num_computed:
        raise ValueError(f"num_tokens: expected {table.num_computed} or more, got {num_tokens}")
    tables.settle_nodes(table.path)
    tiers = tables.tiers
    hits = [block for node in table.path if (block := node.blocks[Tier.DEVICE]) is not None]
    num_blocks = tiers.num_blocks_of(num_tokens)
    num_needed = num_blocks_needed(tiers, table.path, num_blocks)
    if num_needed > tiers.num_available:
        raise OutOfBlocks(f"{num_needed} blocks needed, {tiers.num_available} are free or evictable")
    host_windows = tiers.windows.return_to_device(table)
    tiers.device.share(hits)
    table.blocks += hits + tiers.take_device(num_blocks - len(hits))
    table.is_on_device, table.failure = True, None
    places = dict(enumerate(table.host_blocks[len(hits) :], start=len(hits)))
    if places or host_windows:
        tables.loads.start(table, places, host_windows=host_windows, is_swap_in=True)
    else:
        tiers.host.free(table.host_blocks)
        table.host_blocks.clear()
    return len(places)
