"""The window pools: what requests hold of their last tokens, and what prefixes need so that requests can start there.

A request keeps the positions from `CachePool.first_live` on of its confirmed tokens, and has room for those that a
step writes. A prefix that is cached in main blocks can be used only up to a boundary with a snapshot: references to
the blocks with the `boundary_tokens` rows before it, in every pool.

Without window pools every method here does nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cache_manager.block_pool import BlockId, BlockPool
from cache_manager.block_table import BlockTable, WindowBlocks
from cache_manager.controller import CacheController
from cache_manager.growth import BlockSpan, Growth
from cache_manager.prefix_tree import PrefixNode, PrefixTree, Tier
from cache_manager.transfer import BlockPairs
from cache_manager.window_tier import Snapshot, WindowIds, WindowTier


@dataclass
class SnapshotCopy:
    """A snapshot on its way to the host.

    Attributes:
        node: Whose; None for the blocks of a request, and where the result is not wanted any more.
        snapshot: The source. If it is dropped before the copy has ended, the copy's bytes mean nothing.
        host_blocks: Where to; owned by the copy.
    """

    node: PrefixNode | None
    snapshot: Snapshot
    host_blocks: WindowIds


class Windows:
    """Window blocks on both tiers.

    Attributes:
        pools: By name.
        device: Device blocks.
        host: Host blocks; without pools if there is no host tier.
        snapshot_interval: Every so many main blocks of a prefix there is a boundary that gets a snapshot.
    """

    def __init__(self, controller: CacheController, block_size: int, snapshot_interval: int = 1) -> None:
        """Start without requests and snapshots.

        Args:
            controller: Has the pools.
            block_size: Tokens of a main block.
            snapshot_interval: See above.

        Raises:
            ValueError: snapshot_interval is below 1, or main blocks do not end where a pool's blocks do.
        """
        if snapshot_interval < 1:
            raise ValueError(f"snapshot_interval: expected 1 or more, got {snapshot_interval}")
        for pool in controller.pools:
            pool.check_block_size(block_size)
        self.pools = {pool.name: pool for pool in controller.pools}
        self.device = WindowTier(controller.window_blocks)
        self.host = WindowTier(controller.host_window_blocks)
        self.snapshot_interval = snapshot_interval
        self._block_size = block_size
        self._has_boundaries = any(pool.boundary_tokens for pool in controller.pools)

    def tier(self, tier: Tier) -> WindowTier:
        """The blocks of a tier."""
        return self.device if tier is Tier.DEVICE else self.host

    # Requests

    def start(self, table: BlockTable) -> None:
        """Give a request that starts behind its path what the device has of the path's snapshot.

        Blocks that it had before are given back.
        """
        self.device.free(_blocks_of(table))
        boundary = len(table.path) * self._block_size
        snapshot = self.device.find(table.path[-1]) if table.path else None
        for name, pool in self.pools.items():
            begin = max(0, boundary - pool.boundary_tokens)
            table.windows[name] = WindowBlocks(begin, begin // pool.block_tokens)
            if snapshot is not None:
                table.windows[name].blocks += snapshot.blocks.get(name, ())
        self.device.share(_blocks_of(table))

    def growths(self, table: BlockTable, num_tokens: int, filling: WindowIds) -> dict[str, Growth]:
        """What a step needs that writes to positions up to num_tokens - 1.

        Args:
            table: On the device.
            num_tokens: table.num_computed or more.
            filling: Blocks of the table that its load owns, too.
        """
        grown = {}
        for name, window in table.windows.items():
            grown[name] = Growth.of(
                window.blocks,
                span=BlockSpan(window.first, self.pools[name].block_tokens),
                num_computed=table.num_computed,
                num_tokens=num_tokens,
                is_shared=partial(_is_shared, self.device.pools[name], filling.get(name, ())),
            )
        return grown

    def release(self, table: BlockTable, num_confirmed: int) -> None:
        """Give back blocks that so many confirmed tokens make superfluous."""
        for name, window in table.windows.items():
            pool = self.pools[name]
            count = pool.first_live(num_confirmed) // pool.block_tokens - window.first
            if count > 0:
                self.device.free({name: window.blocks[:count]})
                del window.blocks[:count]
                window.first += count

    def require_rows(self, table: BlockTable, num_tokens: int) -> None:
        """Check that a request can go on from num_tokens.

        Raises:
            ValueError: Rows that it would need are given back already.
        """
        for name, window in table.windows.items():
            pool = self.pools[name]
            if max(window.begin, pool.first_live(num_tokens)) < window.first * pool.block_tokens:
                raise ValueError(
                    f"num_tokens: expected a number whose last {pool.live_tokens} tokens are kept in pool {name}, "
                    f"got {num_tokens}"
                )

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Give back blocks beyond num_tokens."""
        for name, window in table.windows.items():
            kept = self.num_blocks(name, window, num_tokens)
            self.device.free({name: window.blocks[kept:]})
            del window.blocks[kept:]

    def num_blocks(self, name: str, window: WindowBlocks, num_tokens: int) -> int:
        """Blocks from the first on that hold positions below num_tokens."""
        return max(0, -(-num_tokens // self.pools[name].block_tokens) - window.first)

    def fork(self, table: BlockTable) -> dict[str, WindowBlocks]:
        """A second request's blocks: the same ones."""
        self.device.share(_blocks_of(table))
        return {
            name: WindowBlocks(window.begin, window.first, list(window.blocks))
            for name, window in table.windows.items()
        }

    def close(self, table: BlockTable) -> None:
        """Give a request's blocks back, on both tiers."""
        self.leave_device(table)
        self.leave_host(table)
        table.windows.clear()

    # Prefixes

    def keep_snapshot(self, table: BlockTable, place: int) -> None:
        """Keep the rows before the boundary behind block `place` of a request's path, if it has them still."""
        node, boundary = table.path[place], (place + 1) * self._block_size
        if not self._has_boundaries or (place + 1) % self.snapshot_interval:
            return
        if self.device.find(node) is not None:
            self.device.touch(node)
            return
        blocks: dict[str, list[BlockId]] = {}
        for name, pool in self.pools.items():
            if pool.boundary_tokens:
                window = table.windows[name]
                begin = max(0, boundary - pool.boundary_tokens)
                first, end = begin // pool.block_tokens - window.first, self.num_blocks(name, window, boundary)
                if begin < window.begin or first < 0 or end > len(window.blocks):
                    return
                blocks[name] = window.blocks[first:end]
        self.device.keep(node, blocks)

    def needs_load(self, node: PrefixNode) -> bool:
        """Whether the device lacks what a request needs that starts behind a node."""
        return self._has_boundaries and self.device.find(node) is None

    def can_start(self, node: PrefixNode) -> bool:
        """Whether a request could start behind a node: its snapshot is on the device, or there is room to load it."""
        if not self.needs_load(node):
            return True
        snapshot = self.host.find(node)
        return snapshot is not None and not self.device.missing_room(_counts(snapshot.blocks))

    def take_to_load(self, table: BlockTable) -> WindowIds:
        """Give a request that has just been started device blocks for its path's snapshot, if that is on the host.

        Returns:
            Host blocks to load; one reference is the caller's.
        """
        if not table.path or not self.needs_load(table.path[-1]):
            return {}
        snapshot = self.host.find(table.path[-1])
        assert snapshot is not None, "a hit ends where a request can start"  # noqa: S101 - a bug of matching.py
        self.host.share(snapshot.blocks)
        for name, taken in self.device.take(_counts(snapshot.blocks)).items():
            table.windows[name].blocks += taken
        return snapshot.blocks

    def touch(self, node: PrefixNode) -> None:
        """A request started behind a node."""
        for tier in (self.device, self.host):
            if tier.find(node) is not None:
                tier.touch(node)

    def forget(self, node: PrefixNode, tier: Tier) -> None:
        """The node's main block has left a tier."""
        self.tier(tier).drop(node)

    # The host

    def prepare_move(self, table: BlockTable) -> SnapshotCopy:
        """Host blocks for what a request has of its computed tokens.

        Raises:
            OutOfBlocks: There is no room.
        """
        blocks = {name: ids[:count] for name, (ids, count) in self._computed(table).items()}
        return SnapshotCopy(None, Snapshot(blocks), self.host.take(_counts(blocks)))

    def missing_host_room(self, table: BlockTable) -> str:
        """Why prepare_move would refuse; empty if it would not."""
        return self.host.missing_room({name: count for name, (_, count) in self._computed(table).items()})

    def finish_move(self, table: BlockTable, move: SnapshotCopy) -> None:
        """The request is on the host now."""
        for name, ids in move.host_blocks.items():
            table.windows[name].host_blocks = list(ids)
        self.leave_device(table)

    def counts_on_host(self, table: BlockTable) -> dict[str, int]:
        """Blocks of a request on the host."""
        return {name: len(window.host_blocks) for name, window in table.windows.items()}

    def return_to_device(self, table: BlockTable) -> WindowIds:
        """Give a request on the host device blocks.

        Returns:
            Host blocks to load.

        Raises:
            OutOfBlocks: There is no room.
        """
        for name, taken in self.device.take(self.counts_on_host(table)).items():
            table.windows[name].blocks += taken
        return {name: window.host_blocks for name, window in table.windows.items() if window.host_blocks}

    def leave_device(self, table: BlockTable) -> None:
        """Give a request's device blocks back."""
        for name, window in table.windows.items():
            self.device.free({name: window.blocks})
            window.blocks.clear()

    def leave_host(self, table: BlockTable) -> None:
        """Give a request's host blocks back."""
        for name, window in table.windows.items():
            self.host.free({name: window.host_blocks} if window.host_blocks else {})
            window.host_blocks.clear()

    def check_integrity(
        self, tables: Iterable[BlockTable], device_owners: Iterable[WindowIds], host_owners: Iterable[WindowIds]
    ) -> None:
        """Check the pools, and that every request has the rows that its next token needs.

        Args:
            tables: All open ones.
            device_owners: Blocks that loads own.
            host_owners: Blocks that copies in both directions own.

        Raises:
            AssertionError: A law is broken.
        """
        owners = {Tier.DEVICE: list(device_owners), Tier.HOST: list(host_owners)}
        for table in tables:
            if table.windows.keys() != self.pools.keys():
                raise AssertionError("a table lacks a window pool, or has another one")
            owners[Tier.DEVICE].append({name: window.blocks for name, window in table.windows.items()})
            owners[Tier.HOST].append({name: window.host_blocks for name, window in table.windows.items()})
            for name, window in table.windows.items():
                self._check_window(name, window, table)
        for tier, owned in owners.items():
            counts = {
                name: Counter(block for blocks in owned for block in blocks.get(name, ())) for name in self.pools
            }
            self.tier(tier).check_integrity(counts)

    def _check_window(self, name: str, window: WindowBlocks, table: BlockTable) -> None:
        pool, num_computed = self.pools[name], table.num_computed
        blocks = window.blocks if table.is_on_device else window.host_blocks
        begin, end = (place * pool.block_tokens for place in (window.first, window.first + len(blocks)))
        laws = {
            "rows that the next token needs are given back": begin <= max(window.begin, pool.first_live(num_computed)),
            "a computed token has no block": end >= num_computed or window.begin == num_computed,
            "a table on the host has device blocks": table.is_on_device or not window.blocks,
            "a table on the device has host blocks": not (
                table.is_on_device and window.host_blocks and not table.load
            ),
        }
        for broken, holds in laws.items():
            if not holds:
                raise AssertionError(f"pool {name}: {broken}")

    def _computed(self, table: BlockTable) -> dict[str, tuple[list[BlockId], int]]:
        """Device blocks by pool, and how many of them hold computed tokens."""
        return {
            name: (window.blocks, self.num_blocks(name, window, table.num_computed))
            for name, window in table.windows.items()
        }

    def prepare_copies(self, nodes: Iterable[PrefixNode]) -> list[SnapshotCopy]:
        """Host blocks for the snapshots of nodes that are on the device alone, as far as there is room."""
        copies = []
        for node in nodes:
            snapshot = self.device.find(node)
            if snapshot is None or self.host.find(node) is not None:
                continue
            counts = _counts(snapshot.blocks)
            if not self.host.pools or self.host.missing_room(counts):
                continue
            copies.append(SnapshotCopy(node, snapshot, self.host.take(counts)))
        return copies

    def finish_copies(self, copies: Iterable[SnapshotCopy], tree: PrefixTree) -> None:
        """The copies have ended: what still means something is a snapshot on the host."""
        for copy in copies:
            node = copy.node
            if node is None or copy.snapshot.is_dropped or node not in tree or node.blocks[Tier.HOST] is None:
                continue
            if self.host.find(node) is None:
                self.host.keep(node, copy.host_blocks)
        self.abandon_copies(copies)

    def abandon_copies(self, copies: Iterable[SnapshotCopy]) -> None:
        """Give the host blocks of copies back."""
        for copy in copies:
            self.host.free(copy.host_blocks)


def pairs_of(copies: Sequence[SnapshotCopy]) -> dict[str, BlockPairs]:
    """What is to be copied."""
    return pair_up(
        [copy.snapshot.blocks for copy in copies],
        [copy.host_blocks for copy in copies],
    )


def pair_up(sources: Sequence[WindowIds], destinations: Sequence[WindowIds]) -> dict[str, BlockPairs]:
    """Source and destination blocks by pool, of several lists in the same order."""
    names = {name for blocks in sources for name in blocks}
    return {
        name: (
            [block for blocks in sources for block in blocks.get(name, ())],
            [block for blocks in destinations for block in blocks.get(name, ())],
        )
        for name in sorted(names)
    }


def _is_shared(pool: BlockPool, loading: Sequence[BlockId], block: BlockId) -> bool:
    return pool.num_owners(block) - (block in loading) > 1


def _blocks_of(table: BlockTable) -> dict[str, list[BlockId]]:
    return {name: window.blocks for name, window in table.windows.items() if window.blocks}


def _counts(blocks: Mapping[str, Sequence[BlockId]]) -> dict[str, int]:
    return {name: len(ids) for name, ids in blocks.items()}
