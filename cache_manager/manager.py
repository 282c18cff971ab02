"""The blocks of requests: prefix hits, growth, copy-on-write, draft rollback, swapping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cache_manager.block_pool import BlockId
from cache_manager.block_table import BlockTable
from cache_manager.caching import cache_blocks
from cache_manager.controller import CacheController
from cache_manager.errors import CacheError, CacheInUse, OutOfBlocks
from cache_manager.extending import extend_all, extend_main, fill_from_path
from cache_manager.matching import PrefixMatch, find_match
from cache_manager.prefix_tree import PrefixNode, Tier
from cache_manager.spec import CachePool
from cache_manager.stats import CacheStats, collect_stats
from cache_manager.swapping import has_host_room, move_to_device, move_to_host
from cache_manager.tables import OpenTables
from cache_manager.tiers import CacheTiers

if TYPE_CHECKING:
    import numpy.typing as npt


class CacheManager:
    """Owns the block tables of a cache and everything that is cached for prefixes; one thread calls it.

    A call that raises has changed no table and no reference count. Cached blocks without an owner may have given way.

    The engine's cycle for a request, see docs/cache_manager.md:

        table = open(tokens)          hits are shared, hits on the host start to load, the rest gets fresh blocks
        extend(table, num_tokens)     before a step: blocks for its tokens, exclusive ones
        wait_for_layer(layer)         in the step, before the first access to each layer
        commit(table, tokens)         after the step: these tokens are computed and confirmed, full blocks are cached
        truncate(table, num_tokens)   gives back blocks of rejected drafts
        swap_out, swap_in             preemption that keeps the blocks
        close(table)                  the blocks stay cached until somebody needs the room
    """

    def __init__(
        self,
        controller: CacheController,
        *,
        num_blocks: int,
        block_size: int,
        is_prefix_cached: bool = True,
        num_lookahead_tokens: int = 0,
        snapshot_interval: int = 1,
    ) -> None:
        """Manage the blocks of a controller's caches, which are allocated already (or, in tests, do not exist).

        Args:
            controller: Copies blocks. Its host tier, if it has one, belongs to this manager.
            num_blocks: Main blocks on the device, at most as many as each of the controller's groups has.
            block_size: Tokens of a main block.
            is_prefix_cached: Whether blocks of one request serve others, and later ones.
            num_lookahead_tokens: Tokens behind a block that its bytes depend on: a hit must continue with them, too.
            snapshot_interval: Every so many blocks of a request there is a boundary at which others can start, if the
                cache has window pools: what they need of those is kept.

        Raises:
            ValueError: A number is out of range.
        """
        self._controller = controller
        self._require_num_blocks(num_blocks)
        self._tiers = CacheTiers(controller, num_blocks, block_size, num_lookahead_tokens, snapshot_interval)
        self._tables = OpenTables(controller, self._tiers)
        self._is_prefix_cached = is_prefix_cached
        self._counts: Counter[str] = Counter()

    @property
    def num_blocks(self) -> int:
        """Main blocks on the device."""
        return self._tiers.device.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a main block."""
        return self._tiers.block_size

    @property
    def pools(self) -> tuple[CachePool, ...]:
        """The window pools."""
        return self._controller.pools

    @property
    def num_window_blocks(self) -> dict[str, int]:
        """Device blocks of the window pools."""
        return self._controller.window_blocks

    @property
    def is_prefix_cached(self) -> bool:
        """Whether blocks of one request serve others, and later ones."""
        return self._is_prefix_cached

    @property
    def num_available(self) -> int:
        """Main blocks on the device that are free or would give way."""
        return self._tiers.num_available

    def match(self, tokens: npt.ArrayLike, *, num_tokens: int | None = None, salt: bytes = b"") -> PrefixMatch:
        """What `open` with the same arguments would find and take; nothing changes.

        Raises:
            ValueError: As open.
        """
        return find_match(self._tiers, tokens, num_tokens, salt, is_prefix_cached=self._is_prefix_cached)

    def open(self, tokens: npt.ArrayLike, *, num_tokens: int | None = None, salt: bytes = b"") -> BlockTable:
        """Give a new request its main blocks: cached ones as far as there are any, fresh ones for the rest.

        In window pools it gets what a cached prefix has there; each step's own blocks come with `extend`.

        Args:
            tokens: [n] integers, n >= 1; the request's known tokens. An int64 array is the fastest.
            num_tokens: Tokens to have room for; None: n.
            salt: Whatever else decides a block's bytes: an adapter, a tenant.

        Returns:
            The table. Compute from position table.num_computed on; if table.load is not None, see wait_for_layer.

        Raises:
            ValueError: There are no tokens, or num_tokens is below n.
            OutOfBlocks: Too few blocks are available.
            TransferFailed, TransferTimeout: A shared last block could not be copied.
        """
        self._tables.poll()
        match = self.match(tokens, num_tokens=num_tokens, salt=salt)
        if self._tables.settle_nodes(match.path):
            match = self.match(tokens, num_tokens=num_tokens, salt=salt)
        if not match.fits:
            raise OutOfBlocks(f"{match.num_blocks_needed} blocks needed, {self.num_available} are free or evictable")
        table = BlockTable(salt, path=list(match.path), num_computed=match.num_tokens)
        self._tables.add(table)
        fill_from_path(self._tables, table, match.num_blocks)
        try:
            extend_main(self._tables, self._controller, table, num_tokens or match.num_known)
        except CacheError:
            self.close(table)
            raise
        table.num_host_hits = match.num_host_tokens
        table.num_device_hits = match.num_tokens - match.num_host_tokens
        self._counts["queried"] += match.num_known
        self._counts["device_hits"] += table.num_device_hits
        self._counts["host_hits"] += table.num_host_hits
        self._counts["unusable"] += match.num_unusable_tokens
        if match.path:
            self._tiers.windows.touch(match.path[-1])
        for node in match.path:
            node.num_uses += 1
        self._back_up(match.path)
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> int:
        """Make positions table.num_computed .. num_tokens - 1 writable: fresh blocks behind, copies of shared blocks.

        In every pool, or in none. Before each step that writes to window pools, although there may be main blocks.

        Returns:
            Index of the first entry of table.blocks that changed; len(table.blocks) if none did.

        Raises:
            ValueError: num_tokens is below table.num_computed.
            OutOfBlocks: Too few blocks are available.
            WrongState: The request is on the host.
            UnknownTable: The table is not open.
            TransferFailed: A shared block could not be copied.
            TransferTimeout: A load that a shared block waits for takes too long.
        """
        self._tables.require_on_device(table)
        if num_tokens < table.num_computed:
            raise ValueError(f"num_tokens: expected {table.num_computed} or more, got {num_tokens}")
        return extend_all(self._tables, self._controller, table, num_tokens)

    def commit(
        self,
        table: BlockTable,
        tokens: npt.ArrayLike,
        *,
        num_computed: int | None = None,
        num_complete: int | None = None,
    ) -> int:
        """Entries of a request's tokens exist and are confirmed: full blocks enter the cache, window blocks go back.

        If the same tokens are cached in another block already, the table takes that one and gives its own back.

        Args:
            table: Of the request.
            tokens: The request's tokens, all of which are confirmed.
            num_computed: Leading ones whose entries exist; None: all.
            num_complete: Leading ones whose entries exist in every group; None: num_computed. Blocks beyond are not
                cached yet, and window blocks are kept as if only these were computed.

        Returns:
            As extend.

        Raises:
            ValueError: Fewer are computed than before, or more than there are tokens or places in the blocks.
            WrongState, UnknownTable: As extend.
            TransferFailed: A load that the tokens built on had failed: call take_failed first and compute again.
            TransferTimeout: A load goes on.
        """
        self._tables.settle(table)
        num_known, capacity = len(np.asarray(tokens)), len(table.blocks) * self.block_size
        if num_computed is None:
            num_computed = num_known
        if not table.num_computed <= num_computed <= min(num_known, capacity):
            raise ValueError(
                f"num_computed: expected {table.num_computed} .. {capacity} of {num_known} tokens, got {num_computed}"
            )
        table.num_computed = num_computed
        num_complete = num_computed if num_complete is None else min(num_complete, num_computed)
        num_cached, first_changed = len(table.path), len(table.blocks)
        if self._is_prefix_cached:
            first_changed = cache_blocks(self._tiers, table, tokens, num_complete // self.block_size)
            if self._tiers.windows.pools:
                for place in range(num_cached, len(table.path)):
                    self._tiers.windows.keep_snapshot(table, place)
        self._tiers.windows.release(table, num_complete)
        self._back_up(table.path[num_cached:])
        return first_changed

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Give back blocks beyond num_tokens (draft rollback); entries behind it count as not computed.

        Raises:
            ValueError: num_tokens is negative, cuts into cached blocks, is more than the blocks hold, or so little
                that rows which the next token needs are given back already.
            WrongState, UnknownTable: As extend.
        """
        self._tables.require_on_device(table)
        self._tables.loads.settle(table)
        low, high = len(table.path) * self.block_size, len(table.blocks) * self.block_size
        if not low <= num_tokens <= high:
            raise ValueError(f"num_tokens: expected {low} .. {high}, got {num_tokens}")
        self._tiers.windows.require_rows(table, num_tokens)
        kept = self._tiers.num_blocks_of(num_tokens)
        self._tiers.windows.truncate(table, num_tokens)
        self._tiers.device.free(table.blocks[kept:])
        del table.blocks[kept:]
        table.num_computed = min(table.num_computed, num_tokens)

    def fork(self, table: BlockTable) -> BlockTable:
        """A second request with the same tokens so far, on the same blocks; whoever extends first gets copies.

        Raises:
            WrongState, UnknownTable: As extend.
            TransferFailed, TransferTimeout: As commit.
        """
        self._tables.settle(table)
        self._tiers.device.share(table.blocks)
        child = BlockTable(table.salt, blocks=list(table.blocks), num_computed=table.num_computed)
        child.windows = self._tiers.windows.fork(table)
        child.path, child.is_closed_to_cache = list(table.path), table.is_closed_to_cache
        self._tables.add(child)
        return child

    def swap_out(self, table: BlockTable) -> None:
        """Move a request to the host, and wait for it; its cached blocks stay cached on the device as well.

        Raises:
            NoHostTier, OutOfBlocks: There is no room on the host.
            WrongState, UnknownTable: As extend.
            TransferFailed, TransferTimeout: It is still on the device.
        """
        self._counts["swapped_out"] += move_to_host(self._tables, table)

    def swap_in(self, table: BlockTable, *, num_tokens: int | None = None) -> None:
        """Start to bring a request back; it may run at once, see wait_for_layer.

        Args:
            num_tokens: Tokens to have room for; None: table.num_computed.

        Raises:
            ValueError: num_tokens is below table.num_computed.
            OutOfBlocks: Too few blocks are available; it is still on the host.
            WrongState: It is on the device.
            UnknownTable: The table is not open.
        """
        self._counts["swapped_in"] += move_to_device(self._tables, table, num_tokens)

    def close(self, table: BlockTable) -> None:
        """Give a request's blocks back, on both tiers, even while they are loading.

        Raises:
            UnknownTable: The table is not open.
        """
        self._tables.require_open(table)
        self._tables.remove(table)

    def wait_for_layer(self, layer_id: int) -> None:
        """Return when compute may access a layer of every open table; at once if nothing is loading.

        Raises:
            TransferFailed: A load failed: take_failed says whose.
            TransferTimeout: A load goes on.
        """
        self._tables.loads.wait_for_layer(layer_id)

    def wait_for_loads(self) -> None:
        """The same for all layers."""
        self._tables.loads.wait_for_layer(None)

    def take_failed(self) -> dict[BlockTable, CacheError]:
        """Tables whose load has failed since the last call, and why.

        The load is undone:

        * after open: on the device; compute from table.num_computed on, which is smaller now;
        * after swap_in: on the host again.
        """
        return self._tables.take_failed()

    def can_swap_out(self, table: BlockTable) -> tuple[bool, str]:
        """Whether the host tier has room for a request now, and why not."""
        return has_host_room(self._tables, table)

    def reset(self) -> None:
        """Forget everything cached, as after a change of weights; open tables keep their blocks but cache no more."""
        self._tables.poll()
        self._tables.forget_cache()
        self._tiers.clear()

    def resize(self, num_blocks: int) -> None:
        """Change the number of device blocks in use, within what the controller allocated.

        Raises:
            ValueError: num_blocks is below 1 or above the controller's.
            CacheInUse: A block beyond it is owned.
        """
        self._tables.poll()
        self._require_num_blocks(num_blocks)
        device = self._tiers.device
        owned = [block for block in range(num_blocks, device.num_blocks) if device.num_owners(BlockId(block))]
        if owned:
            raise CacheInUse(f"num_blocks: expected {owned[-1] + 1} or more while block {owned[-1]} is owned")
        self._tiers.evict_above(num_blocks)
        device.resize(num_blocks)

    def drain(self, timeout: float | None = None) -> None:
        """Let every copy end and take it over.

        Raises:
            TransferTimeout: One goes on.
        """
        self._controller.drain(timeout)
        self._tables.poll()

    def stats(self) -> CacheStats:
        """Counters since the start and blocks by state now."""
        return collect_stats(self._tables, self._counts, self._controller)

    def check_integrity(self) -> None:
        """Check that every block is free, evictable or owned, exactly once, with as many references as owners.

        Raises:
            AssertionError: The manager is broken; no caller can cause that.
        """
        self._tables.check_integrity()

    def _require_num_blocks(self, num_blocks: int) -> None:
        limit = self._controller.num_device_blocks
        if num_blocks < 1 or (limit is not None and num_blocks > limit):
            expected = "1 or more" if limit is None else f"1 .. {limit}"
            raise ValueError(f"num_blocks: expected {expected}, got {num_blocks}")

    def _back_up(self, nodes: Sequence[PrefixNode]) -> None:
        """Copy nodes to the host if the write policy wants that before they are evicted."""
        threshold = {"write_through": 1, "write_through_selective": 2}.get(self._controller.write_policy)
        if threshold is not None and self._tiers.has_host:
            wanted = [node for node in nodes if node.num_uses >= threshold and node.blocks[Tier.DEVICE] is not None]
            self._tiers.back_up(wanted)
