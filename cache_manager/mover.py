"""Copies blocks through every tensor of every group, inside the device and between the tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from cache_manager.copier import BlockCopier, BlockIds, CopyEvent
from cache_manager.errors import NoHostTier, UnknownBlock
from cache_manager.group import CacheGroup
from cache_manager.host_cache import HostCache
from cache_manager.spec import MAIN_POOL
from cache_manager.transfer import CacheSwapMetadata, LayerDoneCounter, Transfer, TransferQueue

Direction = Literal["device_to_device", "device_to_host", "host_to_device"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Moves = Mapping[str, tuple[BlockIds, BlockIds]]
"""Source and destination blocks by pool; no pool without any."""


class BlockMover:
    """Moves blocks. A layer is there when every role of it is, and a block when every group's layers are.

    Attributes:
        host: The host tier; the owner of the mover sets it.
        transfers: Copies between the tiers.
        bytes_moved: By direction, since the start.
        latest_load: Of the latest load to the device.
    """

    def __init__(self, groups: Mapping[int, CacheGroup], copier: BlockCopier | None, timeout: float) -> None:
        """Start with nothing under way.

        Args:
            groups: Of the device; a live view.
            copier: None: whatever has tensors cannot be copied.
            timeout: Seconds that a wait takes at most.
        """
        self.host: HostCache | None = None
        self.transfers = TransferQueue()
        self.bytes_moved = dict.fromkeys(DIRECTIONS, 0)
        self.latest_load: LayerDoneCounter | None = None
        self._groups = groups
        self._copier = copier
        self._timeout = timeout

    @property
    def layer_ids(self) -> list[int]:
        """Of all groups, ascending."""
        return sorted({layer for group in self._groups.values() for _, layer in group.tensors})

    def copy_inside(self, metadata: CacheSwapMetadata) -> None:
        """As CacheController.copy_blocks."""
        moves = self.check("device_to_device", metadata)
        for sources, destinations in moves.values():
            if set(sources.tolist()) & set(destinations.tolist()):
                raise ValueError("dst_block_ids: expected none of src_block_ids")
        counter = LayerDoneCounter(self.layer_ids if moves else [], timeout=self._timeout)
        Transfer(counter, lambda layer: self._copy_layer("device_to_device", layer, moves)).run()
        counter.wait_all()

    def check(self, direction: Direction, metadata: CacheSwapMetadata) -> Moves:
        """Block ids as arrays, by pool; pools of which no block moves are left out.

        Raises:
            NoHostTier, UnknownBlock, ValueError: As CacheController.load_host_to_device.
        """
        if direction != "device_to_device" and self.host is None:
            raise NoHostTier("there is no host tier: initialize_host_cache makes it")
        moves: dict[str, tuple[BlockIds, BlockIds]] = {}
        main = (metadata.src_block_ids, metadata.dst_block_ids)
        for pool, (sources, destinations) in {MAIN_POOL: main, **metadata.windows}.items():
            self._check_pool(direction, pool, sources, destinations)
            if len(sources):
                moves[pool] = (np.array(sources, np.int64), np.array(destinations, np.int64))
        return moves

    def submit(
        self, direction: Direction, metadata: CacheSwapMetadata, after: LayerDoneCounter | None = None
    ) -> LayerDoneCounter:
        """Start a copy between the tiers. Raises: as check."""
        moves = self.check(direction, metadata)
        assert self._copier is not None, "the host tier needs a copier"  # noqa: S101 - initialize_host_cache checks
        layer_ids = self.layer_ids if moves else []
        counter = LayerDoneCounter(layer_ids, timeout=self._timeout, metadata=metadata)
        if direction == "device_to_host":
            self._copier.order_after_compute()
        else:
            self.latest_load = counter
        if layer_ids:
            self.transfers.submit(Transfer(counter, lambda layer: self._copy_layer(direction, layer, moves), after))
        return counter

    def num_device_blocks(self, pool: str) -> int:
        """Blocks of a pool that every group with that pool has; 0 without such a group."""
        counts = (group.num_blocks[pool] for group in self._groups.values() if pool in group.num_blocks)
        return min(counts, default=0)

    def _check_pool(
        self, direction: Direction, pool: str, src_block_ids: Sequence[int], dst_block_ids: Sequence[int]
    ) -> None:
        if len(src_block_ids) != len(dst_block_ids):
            raise ValueError(f"dst_block_ids: expected {len(src_block_ids)} blocks, got {len(dst_block_ids)}")
        if len(set(dst_block_ids)) != len(dst_block_ids):
            raise ValueError(f"dst_block_ids: expected distinct blocks, got {list(dst_block_ids)}")
        sizes = {
            "device": self.num_device_blocks(pool),
            "host": 0 if self.host is None else self.host.num_blocks.get(pool, 0),
        }
        src_tier, dst_tier = direction.split("_to_")
        for tier, block_ids in ((src_tier, src_block_ids), (dst_tier, dst_block_ids)):
            unknown = [block for block in block_ids if not 0 <= block < sizes[tier]]
            if unknown and self._groups:
                named = "" if pool == MAIN_POOL else f" of pool {pool}"
                raise UnknownBlock(f"blocks {unknown}{named} are not among the {sizes[tier]} of the {tier}")

    def _copy_layer(self, direction: Direction, layer: int, moves: Moves) -> list[CopyEvent]:
        """Copy every role of a layer: a layer is there when all of it is."""
        assert self._copier is not None, "there is nothing to copy with"  # noqa: S101 - checked by the callers
        events = []
        for group in self._groups.values():
            for spec in group.specs:
                if layer not in spec.layer_ids or spec.pool not in moves:
                    continue
                tensor = group.tensors[spec.role, layer]
                host = self.host.arrays[spec.role, layer] if self.host is not None else None
                sources, destinations = moves[spec.pool]
                event = self._copier.copy(
                    src=host if direction == "host_to_device" else tensor,
                    dst=host if direction == "device_to_host" else tensor,
                    src_block_ids=sources,
                    dst_block_ids=destinations,
                )
                self.bytes_moved[direction] += len(sources) * spec.bytes_per_block
                if event is not None:
                    events.append(event)
        return events
