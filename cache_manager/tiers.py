"""Cached blocks on two tiers: what is evicted, what is copied to the host first, and what a late copy may still do.

Why children are always evicted before their parents, although the queues only know the order of use: whoever owns a
block owns the blocks before it as well, and gives them back last block first. So a parent has at least as many owners
as its child and joins the queue after it. `CacheTiers.check_integrity` checks the consequence: a block cached on the
device has its parent there.

A copy to the host only reads the device, so it never keeps a device block from being reused: if the block goes before
the copy has ended, the copy's result is thrown away. The host block stays with the copy until that has really ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cache_manager.block_pool import BlockId, BlockPool
from cache_manager.controller import CacheController
from cache_manager.errors import NoHostTier, OutOfBlocks, TransferFailed, TransferTimeout
from cache_manager.prefix_tree import PrefixNode, PrefixTree, Tier
from cache_manager.transfer import CacheSwapMetadata, LayerDoneCounter
from cache_manager.window_tier import WindowIds
from cache_manager.windows import SnapshotCopy, Windows, pairs_of


@dataclass
class Backup:
    """A copy to the host that nobody waits for.

    Attributes:
        counter: Its progress.
        nodes: What it copies; None where the result is not wanted any more.
        host_blocks: Where to; owned by the copy.
        snapshots: What it copies in window pools.
        is_overdue: Whether somebody waited for it in vain.
    """

    counter: LayerDoneCounter
    nodes: list[PrefixNode | None]
    host_blocks: list[BlockId]
    snapshots: list[SnapshotCopy] = field(default_factory=list)
    is_overdue: bool = False

    def give_up(self) -> None:
        """Want no result any more."""
        self.nodes = [None] * len(self.nodes)
        for copy in self.snapshots:
            copy.node = None


@dataclass
class TierCounts:
    """Events since the start, in blocks.

    Attributes:
        num_copied: Copied because a shared block was to be extended.
        num_evicted: Left the device; their bytes may be on the host.
        num_lost: Left the last tier, so that they would have to be computed again.
        num_backed_up: Copied to the host for later.
        num_failed_backups: Should have been, but the copy failed or took too long.
    """

    num_copied: int = 0
    num_evicted: int = 0
    num_lost: int = 0
    num_backed_up: int = 0
    num_failed_backups: int = 0


class CacheTiers:
    """The prefix tree with the pools of both tiers. Owners of blocks are the manager's tables and the copies here.

    Attributes:
        device: Main blocks on the device.
        windows: Blocks of the window pools, on both tiers.
        tree: What is cached where.
        block_size: Tokens of a block.
        counts: See TierCounts.
        last_failure: Why the latest failed backup failed.
    """

    def __init__(
        self,
        controller: CacheController,
        num_blocks: int,
        block_size: int,
        num_lookahead_tokens: int = 0,
        snapshot_interval: int = 1,
    ) -> None:
        """Start with nothing cached.

        Args:
            controller: Copies; says whether there is a host tier, and the write policy.
            num_blocks: Of the device.
            block_size: Tokens of a block.
            num_lookahead_tokens: As PrefixTree.
            snapshot_interval: As Windows.
        """
        self.device = BlockPool(num_blocks)
        self.windows = Windows(controller, block_size, snapshot_interval)
        self.tree = PrefixTree(block_size, num_lookahead_tokens=num_lookahead_tokens)
        self.block_size = block_size
        self.counts = TierCounts()
        self.last_failure: Exception | None = None
        self._controller = controller
        self._host = BlockPool(controller.num_host_blocks) if controller.num_host_blocks else None
        self._backups: list[Backup] = []

    @property
    def has_host(self) -> bool:
        """Whether there is a host tier."""
        return self._host is not None

    @property
    def host(self) -> BlockPool:
        """Blocks of the host.

        Raises:
            NoHostTier: There is none.
        """
        if self._host is None:
            raise NoHostTier("there is no host tier")
        return self._host

    @property
    def num_available(self) -> int:
        """Device blocks that take_device could hand out."""
        return self.device.num_free + self.device.num_evictable

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def take_device(self, count: int) -> list[BlockId]:
        """Allocate device blocks; cached ones that nobody owns give way, children before parents.

        Raises:
            ValueError: count is negative.
            OutOfBlocks: Fewer are free or evictable; nothing was evicted.
        """
        if count > self.num_available:
            raise OutOfBlocks(
                f"{count} blocks asked for, {self.num_available} of {self.device.num_blocks} are free or evictable"
            )
        missing = count - self.device.num_free
        if missing > 0:
            self._evict([self._node(Tier.DEVICE, block) for block in self.device.least_recently_used(missing)])
        return self.device.allocate(count)

    def take_host(self, count: int) -> list[BlockId]:
        """Allocate host blocks; what is cached there and has no owner gives way.

        Raises:
            NoHostTier: There is none.
            OutOfBlocks: Fewer are free or evictable; nothing was evicted.
        """
        room = self.host.num_free + self.host.num_evictable
        if count > room:
            raise OutOfBlocks(f"{count} host blocks asked for, {room} of {self.host.num_blocks} are free or evictable")
        while self.host.num_free < count:
            self._forget(self._node(Tier.HOST, self.host.least_recently_used(1)[0]), Tier.HOST)
        return self.host.allocate(count)

    def attach(self, node: PrefixNode, tier: Tier, block: BlockId) -> None:
        """A block that somebody owns holds the node's bytes from now on."""
        self.tree.attach(node, tier, block)
        self._pool(tier).cache(block)

    def copy_out(
        self, device_blocks: Sequence[BlockId], host_blocks: Sequence[BlockId], snapshots: Sequence[SnapshotCopy] = ()
    ) -> None:
        """Copy to the host and wait.

        Args:
            device_blocks: Owned or cached.
            host_blocks: Owned; if this raises, they are given back, by the copy itself if it is late.
            snapshots: What to copy in window pools; its host blocks likewise.

        Raises:
            TransferFailed, TransferTimeout: See there.
        """
        counter = self._start_copy(device_blocks, host_blocks, snapshots)
        try:
            counter.synchronize()
        except TransferFailed:
            self.host.free(host_blocks)
            self.windows.abandon_copies(snapshots)
            raise
        except TransferTimeout:
            late = Backup(counter, [None] * len(host_blocks), list(host_blocks), list(snapshots), is_overdue=True)
            late.give_up()
            self._backups.append(late)
            raise

    def back_up(self, nodes: Iterable[PrefixNode]) -> None:
        """Start to copy nodes to the host that are not there; as many as there is room for, parents first.

        Their snapshots go with them, and so do those of nodes that are there already.
        """
        if not self.has_host or self._is_overdue():
            return
        under_way = {node for backup in self._backups for node in backup.nodes}
        idle = [node for node in nodes if node not in under_way]
        wanted = [node for node in idle if node.blocks[Tier.HOST] is None]
        wanted = wanted[: self.host.num_free + self.host.num_evictable]
        host_blocks = self.take_host(len(wanted))
        snapshots = self._snapshot_copies(idle, wanted)
        if wanted or snapshots:
            counter = self._start_copy(_device_blocks(wanted), host_blocks, snapshots)
            self._backups.append(Backup(counter, list(wanted), host_blocks, snapshots))

    def poll(self) -> None:
        """Take over what copies to the host have ended since the last call."""
        ended = [backup for backup in self._backups if backup.counter.is_settled]
        self._backups = [backup for backup in self._backups if not backup.counter.is_settled]
        for backup in ended:
            self._finish(backup)

    def evict_above(self, num_blocks: int) -> None:
        """Evict every cached block from num_blocks on, with the cached blocks after them; none may be owned."""
        above = [
            self._node(Tier.DEVICE, block)
            for block in self.device.least_recently_used(self.device.num_evictable)
            if block >= num_blocks
        ]
        doomed = {node for start in above for node in self.tree.subtree(start) if node.blocks[Tier.DEVICE] is not None}
        self._evict([node for node in reversed(self.tree.nodes()) if node in doomed])

    def clear(self) -> None:
        """Forget everything cached, on both tiers; owned blocks stay owned."""
        for backup in self._backups:
            backup.give_up()
        for node in reversed(self.tree.nodes()):
            self._remove(node)

    def host_owners(self) -> list[BlockId]:
        """Host blocks that copies under way own."""
        return [block for backup in self._backups for block in backup.host_blocks]

    def host_window_owners(self) -> list[WindowIds]:
        """Host blocks of window pools that copies under way own."""
        return [copy.host_blocks for backup in self._backups for copy in backup.snapshots]

    def check_integrity(self, device_owners: dict[BlockId, int], host_owners: dict[BlockId, int]) -> None:
        """Check main pools, tree, snapshots, and that they agree.

        Args:
            device_owners: Owners of each device block.
            host_owners: Of each host block, except those of host_owners().

        Raises:
            AssertionError: A law is broken.
        """
        self.device.check_integrity(device_owners)
        self.tree.check_integrity()
        if self.has_host:
            for copied in self.host_owners():
                host_owners[copied] = host_owners.get(copied, 0) + 1
            self.host.check_integrity(host_owners)
        nodes = self.tree.nodes()
        for tier in Tier if self.has_host else [Tier.DEVICE]:
            attached = {block for node in nodes if (block := node.blocks[tier]) is not None}
            pool = self._pool(tier)
            cached = {BlockId(block) for block in range(pool.num_blocks) if pool.is_cached(BlockId(block))}
            if attached != cached:
                raise AssertionError(f"{tier.name}: the tree has blocks {attached}, the pool has cached {cached}")
        if any(node.blocks[Tier.DEVICE] is not None and not self.is_on_device(node.parent) for node in nodes):
            raise AssertionError("a block is cached on the device, its parent is not")
        for tier in Tier:
            if any(node not in self.tree or node.blocks[tier] is None for node in self.windows.tier(tier).nodes()):
                raise AssertionError(f"{tier.name}: a snapshot's node has no block there")

    @staticmethod
    def is_on_device(node: PrefixNode | None) -> bool:
        """Whether a node is a root, or its bytes are on the device."""
        return node is None or node.parent is None or node.blocks[Tier.DEVICE] is not None

    def _evict(self, nodes: Sequence[PrefixNode]) -> None:
        """Take nodes from the device, children first; with write_back their bytes go to the host if they can."""
        if self.has_host:
            self._await_backups(nodes)
            for node in nodes:
                if (block := node.blocks[Tier.HOST]) is not None:
                    self.host.touch(block)
            if self._controller.write_policy == "write_back":
                self._write_back(nodes)
        for node in nodes:
            self._forget(node, Tier.DEVICE)
        self.counts.num_evicted += len(nodes)

    def _write_back(self, nodes: Sequence[PrefixNode]) -> None:
        """Copy nodes that leave the device and are not on the host, and snapshots of those that are there then."""
        missing = [node for node in nodes if node.blocks[Tier.HOST] is None]
        room = self.host.num_free + self.host.num_evictable
        kept = missing[max(0, len(missing) - room) :]
        self.counts.num_failed_backups += len(kept) if self._is_overdue() else 0
        if self._is_overdue():
            return
        host_blocks = self.take_host(len(kept))
        snapshots = self._snapshot_copies(nodes, kept)
        if not kept and not snapshots:
            return
        try:
            self.copy_out(_device_blocks(kept), host_blocks, snapshots)
        except (TransferFailed, TransferTimeout) as failure:
            self._count_failure(failure, len(kept))
            return
        for node, block in zip(kept, host_blocks, strict=True):
            self._keep_on_host(node, block)
        self.windows.finish_copies(snapshots, self.tree)

    def _await_backups(self, nodes: Iterable[PrefixNode]) -> None:
        wanted = set(nodes)
        for backup in self._backups:
            if wanted.intersection(backup.nodes) and not self._is_overdue():
                try:
                    backup.counter.synchronize()
                except TransferFailed:
                    continue  # poll counts it
                except TransferTimeout as failure:
                    self._count_failure(failure, len(backup.nodes))
                    backup.give_up()
                    backup.is_overdue = True
        self.poll()

    def _finish(self, backup: Backup) -> None:
        try:
            backup.counter.synchronize()
        except TransferFailed as failure:
            self._count_failure(failure, sum(node is not None for node in backup.nodes))
            self.host.free(backup.host_blocks)
            self.windows.abandon_copies(backup.snapshots)
            return
        for node, host_block in zip(backup.nodes, backup.host_blocks, strict=True):
            if node is not None and node.blocks[Tier.HOST] is None:
                self._keep_on_host(node, host_block)
            else:
                self.host.free([host_block])
        self.windows.finish_copies(backup.snapshots, self.tree)

    def _snapshot_copies(self, nodes: Iterable[PrefixNode], coming: Iterable[PrefixNode]) -> list[SnapshotCopy]:
        """For the nodes that are on the host, or come there with the copy that is prepared."""
        arriving = set(coming)
        return self.windows.prepare_copies(
            [node for node in nodes if node.blocks[Tier.HOST] is not None or node in arriving]
        )

    def _start_copy(
        self, device_blocks: Sequence[BlockId], host_blocks: Sequence[BlockId], snapshots: Sequence[SnapshotCopy]
    ) -> LayerDoneCounter:
        metadata = CacheSwapMetadata(device_blocks, host_blocks, windows=pairs_of(snapshots))
        return self._controller.evict_device_to_host(metadata)

    def _keep_on_host(self, node: PrefixNode, host_block: BlockId) -> None:
        self.attach(node, Tier.HOST, host_block)
        self.host.free([host_block])
        self.counts.num_backed_up += 1

    def _count_failure(self, failure: Exception, num_blocks: int) -> None:
        self.last_failure = failure
        self.counts.num_failed_backups += num_blocks

    def _is_overdue(self) -> bool:
        """Whether a copy that somebody gave up is still under way: waiting for another one behind it is no use."""
        return any(backup.is_overdue and not backup.counter.is_settled for backup in self._backups)

    def _forget(self, node: PrefixNode, tier: Tier) -> None:
        """Take a node's bytes from a tier; from the last one, the node and all after it go."""
        self._pool(tier).uncache(self.tree.detach(node, tier))
        self.windows.forget(node, tier)
        if tier is Tier.DEVICE:
            for backup in self._backups:
                backup.nodes = [None if copied is node else copied for copied in backup.nodes]
        if all(block is None for block in node.blocks):
            for lost in list(self.tree.subtree(node)):
                self._remove(lost)
                self.counts.num_lost += 1

    def _remove(self, node: PrefixNode) -> None:
        for tier in Tier:
            if node.blocks[tier] is not None:
                self._pool(tier).uncache(self.tree.detach(node, tier))
                self.windows.forget(node, tier)
        self.tree.remove(node)

    def _node(self, tier: Tier, block: BlockId) -> PrefixNode:
        node = self.tree.holder(tier, block)
        assert node is not None, "a cached block has no node"  # noqa: S101 - a bug of this file
        return node

    def _pool(self, tier: Tier) -> BlockPool:
        return self.device if tier is Tier.DEVICE else self.host


def _device_blocks(nodes: Iterable[PrefixNode]) -> list[BlockId]:
    return [block for node in nodes if (block := node.blocks[Tier.DEVICE]) is not None]
