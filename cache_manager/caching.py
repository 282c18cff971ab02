"""How the computed blocks of a request enter the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache_manager.block_table import BlockTable
from cache_manager.prefix_tree import Tier
from cache_manager.tiers import CacheTiers

if TYPE_CHECKING:
    import numpy.typing as npt


def cache_blocks(tiers: CacheTiers, table: BlockTable, tokens: npt.ArrayLike, num_full: int) -> int:
    """Cache a table's leading num_full blocks, as far as the tokens behind them are known and nothing forbids it.

    Returns:
        Index of the first block that the table has exchanged for a cached one with the same bytes; len(table.blocks)
        if there is none.
    """
    first_changed, num_cached = len(table.blocks), len(table.path)
    if table.is_closed_to_cache:
        return first_changed
    for place, content in enumerate(tiers.tree.nodes_of(tokens, num_cached, num_full), num_cached):
        if not _cache_block(tiers, table, place, content):
            break
        if table.blocks[place] != table.path[place].blocks[Tier.DEVICE]:
            first_changed = min(first_changed, place)
            _take_cached(tiers, table, place)
    return first_changed


def _cache_block(tiers: CacheTiers, table: BlockTable, place: int, content: bytes) -> bool:
    """Append the node of a computed block to the path, with the table's block if it has none on the device."""
    tree = tiers.tree
    num_before = len(tree)
    node = tree.insert(table.path[-1] if table.path else None, content, table.salt)
    if node is None:
        table.is_closed_to_cache = True
        return False
    node.num_uses += len(tree) == num_before
    if node.blocks[Tier.DEVICE] is None:
        tiers.attach(node, Tier.DEVICE, table.blocks[place])
    table.path.append(node)
    return True


def _take_cached(tiers: CacheTiers, table: BlockTable, place: int) -> None:
    block = table.path[place].blocks[Tier.DEVICE]
    assert block is not None, "the path of a table on the device is there"  # noqa: S101 - a bug of this file
    tiers.device.share([block])
    tiers.device.free([table.blocks[place]])
    table.blocks[place] = block
