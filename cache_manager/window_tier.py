"""Blocks of the window pools on one tier, and the snapshots of prefixes that are kept in them.

A block has as many references as it has owners: requests, copies under way, snapshots. Rows are never rewritten once
they are confirmed, so a snapshot is a set of references and no copy. Blocks that only snapshots own give way to
whoever needs room, least recently used snapshot first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from cache_manager.block_pool import BlockId, BlockPool
from cache_manager.errors import OutOfBlocks
from cache_manager.prefix_tree import PrefixNode

WindowIds = Mapping[str, list[BlockId]]
"""Blocks by pool."""


@dataclass(eq=False)
class Snapshot:
    """The rows before a boundary of main blocks.

    Attributes:
        blocks: In order of position, by pool.
        is_dropped: Whether its blocks may hold other rows by now.
    """

    blocks: WindowIds
    is_dropped: bool = False


class WindowTier:
    """The window pools of one tier.

    Attributes:
        pools: By name.
        num_evicted: Snapshots that gave way since the start.
    """

    def __init__(self, num_blocks: Mapping[str, int]) -> None:
        """Start with free blocks, so many in each pool."""
        self.pools = {name: BlockPool(count) for name, count in num_blocks.items()}
        self.num_evicted = 0
        self._snapshots: OrderedDict[PrefixNode, Snapshot] = OrderedDict()
        self._num_kept: dict[str, Counter[BlockId]] = {name: Counter() for name in num_blocks}

    @property
    def num_snapshots(self) -> int:
        """Snapshots now."""
        return len(self._snapshots)

    def num_kept(self, name: str, block: BlockId) -> int:
        """Snapshots that own a block of a pool."""
        return self._num_kept[name][block]

    def num_evictable(self, name: str) -> int:
        """Blocks of a pool that only snapshots own."""
        pool = self.pools[name]
        return sum(pool.num_owners(block) == count for block, count in self._num_kept[name].items())

    def num_available(self, name: str) -> int:
        """Blocks of a pool that take could hand out."""
        return self.pools[name].num_free + self.num_evictable(name)

    def missing_room(self, counts: Mapping[str, int]) -> str:
        """Why take would refuse; empty if it would not."""
        for name, count in counts.items():
            pool = self.pools[name]
            if count > pool.num_free and count > self.num_available(name):
                room = self.num_available(name)
                return f"{count} blocks of pool {name} asked for, {room} of {pool.num_blocks} are free or evictable"
        return ""

    def take(self, counts: Mapping[str, int]) -> dict[str, list[BlockId]]:
        """Allocate blocks; snapshots give way.

        Args:
            counts: Pool name to blocks, 0 or more.

        Raises:
            OutOfBlocks: A pool has too few that are free or evictable; nothing changed.
        """
        if reason := self.missing_room(counts):
            raise OutOfBlocks(reason)
        for name, count in counts.items():
            while self.pools[name].num_free < count:
                self.drop(next(iter(self._snapshots)))
                self.num_evicted += 1
        return {name: self.pools[name].allocate(count) for name, count in counts.items()}

    def share(self, blocks: WindowIds) -> None:
        """Give each block one more owner."""
        for name, ids in blocks.items():
            self.pools[name].share(ids)

    def free(self, blocks: WindowIds) -> None:
        """Take one owner away from each block."""
        for name, ids in blocks.items():
            self.pools[name].free(ids)

    def keep(self, node: PrefixNode, blocks: WindowIds) -> None:
        """Make a node's snapshot of blocks that somebody owns; it has none yet."""
        self.share(blocks)
        for name, ids in blocks.items():
            self._num_kept[name].update(ids)
        self._snapshots[node] = Snapshot({name: list(ids) for name, ids in blocks.items()})

    def find(self, node: PrefixNode) -> Snapshot | None:
        """A node's snapshot, if it has one."""
        return self._snapshots.get(node)

    def touch(self, node: PrefixNode) -> None:
        """A node's snapshot was used just now."""
        self._snapshots.move_to_end(node)

    def drop(self, node: PrefixNode) -> None:
        """Forget a node's snapshot, if it has one."""
        snapshot = self._snapshots.pop(node, None)
        if snapshot is None:
            return
        snapshot.is_dropped = True
        for name, ids in snapshot.blocks.items():
            kept = self._num_kept[name]
            kept.subtract(ids)
            for block in ids:
                if not kept[block]:
                    del kept[block]
        self.free(snapshot.blocks)

    def nodes(self) -> list[PrefixNode]:
        """Nodes with a snapshot, least recently used first."""
        return list(self._snapshots)

    def check_integrity(self, owners: Mapping[str, Counter[BlockId]]) -> None:
        """Check that every block is free or owned, with as many references as owners.

        Args:
            owners: Owners of each block besides snapshots, by pool.

        Raises:
            AssertionError: A law is broken.
        """
        for name, pool in self.pools.items():
            kept = Counter(block for one in self._snapshots.values() for block in one.blocks.get(name, ()))
            if kept != self._num_kept[name]:
                raise AssertionError(f"pool {name}: snapshots and their counts differ")
            if pool.num_evictable:
                raise AssertionError(f"pool {name}: a block is cached")
            pool.check_integrity(kept + owners.get(name, Counter()))
