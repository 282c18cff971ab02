"""The open block tables, and the laws that tie them to pools, tree and loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cache_manager.block_table import BlockTable
from cache_manager.controller import CacheController
from cache_manager.errors import CacheError, TransferFailed, TransferTimeout, UnknownTable, WrongState
from cache_manager.loads import LoadBook
from cache_manager.prefix_tree import PrefixNode, Tier
from cache_manager.tiers import CacheTiers


class OpenTables:
    """Every open table.

    Attributes:
        tiers: Their blocks.
        loads: Copies that fill them.
    """

    def __init__(self, controller: CacheController, tiers: CacheTiers) -> None:
        """Start without tables."""
        self.tiers = tiers
        self.loads = LoadBook(controller, tiers)
        self._tables: set[BlockTable] = set()

    def __len__(self) -> int:
        """Open tables."""
        return len(self._tables)

    def add(self, table: BlockTable) -> None:
        """Open a table, which owns its blocks."""
        self._tables.add(table)

    def remove(self, table: BlockTable) -> None:
        """Give an open table's blocks back."""
        self._tables.remove(table)
        self.tiers.device.free(table.blocks)
        if table.host_blocks:
            self.tiers.host.free(table.host_blocks)
        self.tiers.windows.close(table)
        table.load = None
        for sequence in (table.blocks, table.host_blocks, table.path):
            sequence.clear()

    def poll(self) -> None:
        """Take over every copy that has ended."""
        self.tiers.poll()
        self.loads.poll()

    def require_open(self, table: BlockTable) -> None:
        """Poll, and check that the table is one of these.

        Raises:
            UnknownTable: It is not.
        """
        self.poll()
        if table not in self._tables:
            raise UnknownTable("the block table is not one that this manager has opened and not closed")

    def require_on_device(self, table: BlockTable) -> None:
        """Poll, and check that the table may run.

        Raises:
            UnknownTable: It is not one of these.
            WrongState: It is on the host.
        """
        self.require_open(table)
        if not table.is_on_device:
            raise WrongState("the request is on the host: swap_in comes first")

    def settle(self, table: BlockTable) -> None:
        """Let the table's load end; then it is on the device with all its bytes.

        Raises:
            UnknownTable, WrongState: As require_on_device.
            TransferFailed: The load failed, and take_failed has not told of it yet.
            TransferTimeout: The load goes on.
        """
        self.require_on_device(table)
        self.loads.settle(table)
        if table.failure is not None:
            raise TransferFailed("the request's load failed: take_failed says what is left") from table.failure

    def settle_nodes(self, nodes: Iterable[PrefixNode]) -> bool:
        """Let the loads of nodes end, failed or not; one that takes too long is left alone.

        Returns:
            Whether there was one.
        """
        is_loading = self.loads.is_loading(nodes)
        if is_loading:
            try:
                self.loads.settle_nodes(nodes)
            except TransferTimeout:
                return True  # its nodes are on the host as before, and can be loaded once more
        return is_loading

    def take_failed(self) -> dict[BlockTable, CacheError]:
        """As CacheManager.take_failed."""
        self.poll()
        failed = {table: table.failure for table in self._tables if table.failure is not None}
        for table in failed:
            table.failure = None
        return failed

    def forget_cache(self) -> None:
        """The cache is reset: no table ends in it any more."""
        self.loads.forget_nodes()
        for table in self._tables:
            table.path.clear()
            table.is_closed_to_cache = True

    def check_integrity(self) -> None:
        """As CacheManager.check_integrity."""
        on_device = Counter(block for table in self._tables for block in table.blocks)
        on_device.update(self.loads.owners(Tier.DEVICE))
        on_host = Counter(block for table in self._tables for block in table.host_blocks)
        on_host.update(self.loads.owners(Tier.HOST))
        self.tiers.check_integrity(on_device, on_host)
        self.tiers.windows.check_integrity(
            self._tables,
            device_owners=self.loads.window_owners(Tier.DEVICE),
            host_owners=self.loads.window_owners(Tier.HOST) + self.tiers.host_window_owners(),
        )
        for table in self._tables:
            self._check_table(table)

    def _check_table(self, table: BlockTable) -> None:
        tier, blocks = (Tier.DEVICE, table.blocks) if table.is_on_device else (Tier.HOST, table.host_blocks)
        filling = self.loads.filling(table)
        laws = {
            "a token has no block": table.num_computed <= len(blocks) * self.tiers.block_size,
            "a table's path was removed": all(node in self.tiers.tree for node in table.path),
            "a table's path is longer than the table": len(table.path) <= len(blocks),
            "a table and the tree differ": all(
                node.blocks[tier] == block or block in filling for node, block in zip(table.path, blocks, strict=False)
            ),
            "a table on the host has device blocks": table.is_on_device or not table.blocks,
            "a table on the device has host blocks": not (table.is_on_device and table.host_blocks and not table.load),
        }
        for broken, holds in laws.items():
            if not holds:
                raise AssertionError(broken)
