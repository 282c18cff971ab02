"""Copies from the host to the device that a request builds on, and how a failed one is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from cache_manager.block_pool import BlockId
from cache_manager.block_table import BlockTable
from cache_manager.controller import CacheController
from cache_manager.errors import CacheError, TransferFailed
from cache_manager.prefix_tree import PrefixNode, Tier
from cache_manager.tiers import CacheTiers
from cache_manager.transfer import CacheSwapMetadata, LayerDoneCounter
from cache_manager.window_tier import WindowIds
from cache_manager.windows import pair_up


@dataclass
class Load:
    """A copy from the host. It owns its blocks on both tiers until it has ended, whatever becomes of the table.

    Attributes:
        table: Whose blocks it fills.
        counter: Its progress.
        places: Indices in the table of the blocks it fills, ascending; the lists below are parallel.
        nodes: What it copies; None for a block that is not cached.
        device_blocks: Where to.
        host_blocks: Where from.
        device_windows: Where to in the window pools.
        host_windows: Where from in the window pools.
        snapshot_node: The node whose snapshot that is; None for the rows of a request.
        is_swap_in: Whether it brings a request back, which is on the host again if the load fails.
    """

    table: BlockTable
    counter: LayerDoneCounter
    places: list[int]
    nodes: list[PrefixNode | None]
    device_blocks: list[BlockId]
    host_blocks: list[BlockId]
    device_windows: WindowIds
    host_windows: WindowIds
    snapshot_node: PrefixNode | None
    is_swap_in: bool

    @property
    def is_awaited(self) -> bool:
        """Whether the table is still open."""
        return self.table.load is self.counter


class LoadBook:
    """The loads under way."""

    def __init__(self, controller: CacheController, tiers: CacheTiers) -> None:
        """Start without loads."""
        self._controller = controller
        self._tiers = tiers
        self._loads: list[Load] = []
        self.num_failed = 0
        """Loads that failed since the start."""

    def start(
        self,
        table: BlockTable,
        places: Mapping[int, BlockId],
        *,
        host_windows: WindowIds,
        is_swap_in: bool,
    ) -> None:
        """Start to fill blocks of a table.

        Args:
            table: Owns the blocks, and nobody else does; has no load.
            places: Index in the table to the host block that belongs there, ascending.
            host_windows: Host blocks that belong into the table's blocks of each window pool.
            is_swap_in: See Load.
        """
        device_blocks, host_blocks = [table.blocks[place] for place in places], list(places.values())
        device_windows = {name: list(table.windows[name].blocks) for name in host_windows}
        windows = pair_up([host_windows], [device_windows])
        counter = self._controller.load_host_to_device(CacheSwapMetadata(host_blocks, device_blocks, windows=windows))
        load = Load(
            table,
            counter,
            places=list(places),
            nodes=[table.path[place] if place < len(table.path) else None for place in places],
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            device_windows=device_windows,
            host_windows={name: list(ids) for name, ids in host_windows.items()},
            snapshot_node=table.path[-1] if host_windows and not is_swap_in else None,
            is_swap_in=is_swap_in,
        )
        self._tiers.device.share(device_blocks)
        self._tiers.host.share(host_blocks)
        self._tiers.windows.device.share(load.device_windows)
        self._tiers.windows.host.share(load.host_windows)
        self._loads.append(load)
        table.load = counter

    def poll(self) -> None:
        """Take over the loads that have ended since the last call, successful or not."""
        ended = [load for load in self._loads if load.counter.is_settled]
        self._loads = [load for load in self._loads if not load.counter.is_settled]
        for load in ended:
            self._finish(load)

    def settle(self, table: BlockTable) -> None:
        """Wait for a table's load and take it over; if it failed, that is in the table.

        Raises:
            TransferTimeout: It goes on.
        """
        self._end(table.load)

    def is_loading(self, nodes: Iterable[PrefixNode]) -> bool:
        """Whether a load copies one of the nodes."""
        return bool(self._loads) and not set(nodes).isdisjoint(node for load in self._loads for node in load.nodes)

    def settle_nodes(self, nodes: Iterable[PrefixNode]) -> None:
        """Wait for the loads of nodes. Raises: as settle."""
        wanted = set(nodes)
        for load in list(self._loads):
            if wanted.intersection(load.nodes):
                self._end(load.counter)

    def wait_for_layer(self, layer_id: int | None) -> None:
        """Return when compute may read a layer (None: all) of every table. Raises: as LayerDoneCounter."""
        for load in self._loads:
            if load.is_awaited and layer_id is None:
                load.counter.wait_all()
            elif load.is_awaited and layer_id is not None:
                load.counter.wait_for_layer(layer_id)

    def filling(self, table: BlockTable) -> set[BlockId]:
        """Device blocks of a table that its load owns, too."""
        return {block for load in self._loads if load.table is table for block in load.device_blocks}

    def filling_windows(self, table: BlockTable) -> WindowIds:
        """The same in the window pools."""
        return next((load.device_windows for load in self._loads if load.table is table), {})

    def forget_nodes(self) -> None:
        """The cache was reset: what is loading will not be cached."""
        for load in self._loads:
            load.nodes = [None] * len(load.nodes)
            load.snapshot_node = None

    def owners(self, tier: Tier) -> list[BlockId]:
        """Blocks that loads own."""
        return [
            block for load in self._loads for block in (load.host_blocks if tier is Tier.HOST else load.device_blocks)
        ]

    def window_owners(self, tier: Tier) -> list[WindowIds]:
        """The same in the window pools."""
        return [load.host_windows if tier is Tier.HOST else load.device_windows for load in self._loads]

    def _end(self, counter: LayerDoneCounter | None) -> None:
        if counter is not None:
            with suppress(TransferFailed):  # poll undoes it and tells the table
                counter.synchronize()
            self.poll()

    def _finish(self, load: Load) -> None:
        failure: CacheError | None = None
        try:
            load.counter.synchronize()
        except TransferFailed as cause:
            failure = cause
            self.num_failed += 1
        if load.is_awaited:
            if failure is None:
                self._cache(load)
            load.table.load, load.table.failure = None, failure
            if failure is not None:
                self._undo(load)
            elif load.is_swap_in:
                self._tiers.host.free(load.table.host_blocks)
                load.table.host_blocks.clear()
                self._tiers.windows.leave_host(load.table)
        self._tiers.device.free(load.device_blocks)
        self._tiers.host.free(load.host_blocks)
        self._tiers.windows.device.free(load.device_windows)
        self._tiers.windows.host.free(load.host_windows)

    def _cache(self, load: Load) -> None:
        """The loaded blocks are cached on the device from now on, unless others have been faster.

        Only for an open table: it owns the blocks before, too, which therefore are not evicted before these.
        """
        windows, node = self._tiers.windows, load.snapshot_node
        for place, loaded, block in zip(load.places, load.nodes, load.device_blocks, strict=True):
            if loaded is not None and loaded.blocks[Tier.DEVICE] is None:
                self._tiers.attach(loaded, Tier.DEVICE, block)
            elif loaded is not None:
                del load.table.path[place:]  # commit finds the other block and takes it
                break
        if node is not None and node.blocks[Tier.DEVICE] is not None and windows.device.find(node) is None:
            windows.device.keep(node, load.device_windows)

    def _undo(self, load: Load) -> None:
        table, windows = load.table, self._tiers.windows
        if load.is_swap_in:
            self._tiers.device.free(table.blocks)
            table.blocks.clear()
            windows.leave_device(table)
            table.is_on_device = False
            return
        num_kept = load.places[0] if load.places else len(table.path)
        del table.path[num_kept:]
        if windows.pools:
            while table.path and windows.needs_load(table.path[-1]):
                table.path.pop()
            windows.start(table)
            num_kept = len(table.path)
        table.num_computed = min(table.num_computed, num_kept * self._tiers.block_size)
