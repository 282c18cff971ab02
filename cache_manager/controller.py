"""Allocates the cache tensors that an attention backend declares, names them and owns them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cache_manager.config import CacheConfig, WritePolicy
from cache_manager.copier import BlockCopier
from cache_manager.errors import CacheError, CacheInUse, CacheMoved
from cache_manager.group import CacheGroup, CacheOwner, Tensor, create_group
from cache_manager.host_cache import HostAllocator, HostCache, PlainAllocator
from cache_manager.mover import BlockMover
from cache_manager.spec import MAIN_POOL, CachePool, TensorKey
from cache_manager.transfer import BlockPairs, CacheSwapMetadata, LayerDoneCounter


class CacheController:
    """Owns every cache tensor of a worker, on the device and on the host, and copies blocks between them.

    The model's cache and the draft model's are two groups of one kind. A block id means the same tokens in every
    tensor of every group, so every copy goes through all of them.
    """

    def __init__(
        self,
        config: CacheConfig,
        local_rank: int = 0,
        device_id: int = 0,
        *,
        copier: BlockCopier | None = None,
        host_allocator: HostAllocator | None = None,
    ) -> None:
        """Make a controller without caches.

        Args:
            config: See CacheConfig.
            local_rank: Rank of this process on its host.
            device_id: Physical device id, part of the storage names.
            copier: Copies blocks of the framework's tensors; None: nothing can be copied and no address is known.
            host_allocator: Page-locked memory if the device has it; None: plain memory.
        """
        self._config = config
        self._local_rank = local_rank
        self._device_id = device_id
        self._copier = copier
        self._allocator = host_allocator or PlainAllocator()
        self._groups: dict[int, CacheGroup] = {}
        self._addresses: dict[TensorKey, int] = {}
        self._mover = BlockMover(self._groups, copier, config.transfer_timeout)
        self._generation = 0
        self.last_error: Exception | None = None
        """Why reset_cache or free_cache returned False the last time."""

    @property
    def caches(self) -> Mapping[TensorKey, Tensor]:
        """(role, absolute layer id) to tensor, over all groups; a copy, for a step and not to be kept."""
        merged: dict[TensorKey, Tensor] = {}
        for group in self._groups.values():
            merged.update(group.tensors)
        return MappingProxyType(merged)

    @property
    def groups(self) -> Mapping[int, CacheGroup]:
        """First layer id of a group to the group."""
        return MappingProxyType(self._groups)

    @property
    def num_bytes(self) -> int:
        """Bytes of all cache tensors on the device."""
        return sum(group.num_bytes for group in self._groups.values())

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block of the main pool takes over all tensors of all groups."""
        return self.pool_bytes_per_block(MAIN_POOL)

    @property
    def pools(self) -> tuple[CachePool, ...]:
        """The pools of all groups besides the main one."""
        return tuple({pool.name: pool for group in self._groups.values() for pool in group.pools}.values())

    @property
    def num_device_blocks(self) -> int | None:
        """Main blocks that every group has; None without groups."""
        return self._mover.num_device_blocks(MAIN_POOL) if self._groups else None

    @property
    def num_host_blocks(self) -> int:
        """Main blocks of the host tier; 0 if it does not exist (yet)."""
        return 0 if self._mover.host is None else self._mover.host.num_blocks[MAIN_POOL]

    @property
    def window_blocks(self) -> dict[str, int]:
        """Device blocks of the other pools."""
        return {pool.name: self._mover.num_device_blocks(pool.name) for pool in self.pools}

    @property
    def host_window_blocks(self) -> dict[str, int]:
        """Host blocks of the other pools; empty if there is no host tier (yet)."""
        host = self._mover.host
        return {} if host is None else {pool.name: host.num_blocks[pool.name] for pool in self.pools}

    @property
    def generation(self) -> int:
        """Changes with every allocation and every release: a graph captured under another number is void."""
        return self._generation

    @property
    def write_policy(self) -> WritePolicy:
        """When cached blocks are copied to the host; see CacheConfig."""
        return self._config.write_policy

    @property
    def transfer_timeout(self) -> float:
        """Seconds after which waiting for a copy is an error."""
        return self._config.transfer_timeout

    @property
    def swap_layer_done_counter(self) -> LayerDoneCounter | None:
        """Of the latest load to the device."""
        return self._mover.latest_load

    def pool_bytes_per_block(self, pool: str) -> int:
        """Bytes that one block of a pool takes over all tensors of all groups."""
        specs = (spec for group in self._groups.values() for spec in group.specs)
        return sum(spec.bytes_per_block_all_layers for spec in specs if spec.pool == pool)

    def initialize_kv_cache(self, attn_backend: CacheOwner, num_gpu_blocks: int) -> list[Tensor]:
        """Allocate the main model's cache.

        Returns:
            The tensors by (layer, role order of the backend's spec).

        Raises:
            CacheInUse: It exists already, or the host tier does.
            ValueError: num_gpu_blocks is below 1, a pool of the backend has no blocks, or the backend created other
                tensors than it declared.
        """
        return self._add_group(attn_backend, num_gpu_blocks, self._config.num_layers, 0)

    def initialize_mtp_kv_cache(
        self, attn_backend: CacheOwner, num_gpu_blocks: int, num_mtp_layers: int, layer_offset: int
    ) -> list[Tensor]:
        """Allocate the draft model's cache: the same path with absolute layer ids from layer_offset on.

        Returns, Raises: as initialize_kv_cache; ValueError also when the layer ids overlap another group's.
        """
        return self._add_group(attn_backend, num_gpu_blocks, num_mtp_layers, layer_offset)

    def initialize_host_cache(self, attn_backend: CacheOwner | None = None) -> dict[str, int]:
        """Allocate the host tier for every group there is, after the device's block counts are final.

        Args:
            attn_backend: FastDeploy passes it; what to allocate follows from the groups.

        Returns:
            As get_host_cache_kvs_map; empty, and nothing happens, if config.num_host_blocks is 0.

        Raises:
            CacheInUse: It exists already.
            HostAllocationFailed: There is no memory; everything is as before.
            ValueError: There are no groups, no copier, or no host blocks for one of the pools.
        """
        if self._mover.host is not None:
            raise CacheInUse("the host tier exists already: free it first")
        if self._config.num_host_blocks == 0:
            return {}
        if not self._groups or self._copier is None:
            raise ValueError(f"copier, groups: expected both, got {self._copier} and {len(self._groups)} groups")
        specs = [spec for group in self._groups.values() for spec in group.specs]
        counts = {pool.name: self._config.host_window_blocks.get(pool.name, 0) for pool in self.pools}
        counts[MAIN_POOL] = self._config.num_host_blocks
        self._mover.host = HostCache(specs, counts, self._allocator)
        return self.get_host_cache_kvs_map()

    def get_kv_caches(self) -> dict[str, Tensor]:
        """Storage name to tensor, over all groups; a new dict with every call."""
        return {
            self._format_cache_name(self._storage_name(group, role), layer): tensor
            for group in self._groups.values()
            for (role, layer), tensor in group.tensors.items()
        }

    def get_host_cache_kvs_map(self) -> dict[str, int]:
        """Storage name to the address of the layer's host blocks; empty without a host tier."""
        if self._mover.host is None:
            return {}
        arrays = self._mover.host.arrays
        return {
            self._format_cache_name(self._storage_name(group, role), layer): arrays[role, layer].ctypes.data
            for group in self._groups.values()
            for role, layer in group.tensors
        }

    def check_pinned_addresses(self, generation: int | None = None) -> None:
        """Check that every cache tensor is where it was when it was allocated: call it before a graph replay.

        Args:
            generation: Of the capture; None: only addresses are compared.

        Raises:
            CacheMoved: A tensor moved, or tensors were allocated or freed since the capture.
            ValueError: The controller has no copier, so it knows no addresses.
        """
        if self._copier is None:
            raise ValueError("copier: expected one, got None; without it no address is known")
        if generation is not None and generation != self._generation:
            raise CacheMoved(f"captured under generation {generation} of the cache, now it is {self._generation}")
        for group in self._groups.values():
            for key, tensor in group.tensors.items():
                now = self._copier.address(tensor)
                if now != self._addresses[key]:
                    raise CacheMoved(f"cache tensor {key} was at {self._addresses[key]:#x} and is at {now:#x}")

    def copy_blocks(
        self,
        src_block_ids: Sequence[int],
        dst_block_ids: Sequence[int],
        windows: Mapping[str, BlockPairs] = MappingProxyType({}),
    ) -> None:
        """Copy blocks inside the device, through every tensor of every group; done for whatever compute comes next.

        Args:
            src_block_ids: Sources in the main pool.
            dst_block_ids: Destinations there.
            windows: Sources and destinations in the other pools.

        Raises:
            UnknownBlock: An id is not on the device; nothing is copied.
            ValueError: The lists differ in length, a destination is named twice or a source too; nothing is copied.
            TransferFailed: A copy failed; the destinations hold anything.
        """
        self._mover.copy_inside(CacheSwapMetadata(src_block_ids, dst_block_ids, windows=windows))

    def load_host_to_device(self, swap_metadata: CacheSwapMetadata) -> LayerDoneCounter:
        """Start to copy host blocks to device blocks; a reader waits for its layer on the counter.

        Raises:
            NoHostTier: There is none.
            UnknownBlock, ValueError: As copy_blocks.
        """
        return self._mover.submit("host_to_device", swap_metadata)

    def evict_device_to_host(self, swap_metadata: CacheSwapMetadata) -> LayerDoneCounter:
        """Start to copy device blocks to host blocks, after all compute so far. Raises: as load_host_to_device."""
        return self._mover.submit("device_to_host", swap_metadata)

    def submit_swap_tasks(
        self, evict_metadata: CacheSwapMetadata | None, swap_in_metadata: CacheSwapMetadata | None
    ) -> LayerDoneCounter | None:
        """Start an eviction and then a load. The load fails if the eviction does: it may overwrite its sources.

        Returns:
            The load's counter; None without a load.

        Raises:
            As load_host_to_device; neither is started.
        """
        if evict_metadata is not None and swap_in_metadata is not None:
            self._mover.check("host_to_device", swap_in_metadata)
        evicted = None if evict_metadata is None else self._mover.submit("device_to_host", evict_metadata)
        if swap_in_metadata is None:
            return None
        return self._mover.submit("host_to_device", swap_in_metadata, after=evicted)

    def drain(self, timeout: float | None = None) -> None:
        """Return when no copy touches a block any more.

        Raises:
            TransferTimeout: One does after timeout seconds (None: the configured ones).
        """
        self._mover.transfers.drain(self.transfer_timeout if timeout is None else timeout)

    def reset_cache(self) -> bool:
        """Let every copy end and forget the latest load; tensors and their bytes stay.

        Returns:
            False if that failed: the cause is in last_error and in the log, and everything is as before.
        """
        return self._succeeds("reset_cache", self._reset)

    def free_cache(self, clear_storage: bool = False) -> bool:
        """Let every copy end, then release the host tier and every group.

        Args:
            clear_storage: FastDeploy passes it; there is no storage tier.

        Returns:
            As reset_cache. After a failed drain nothing is released.
        """
        return self._succeeds("free_cache", self.free_gpu_cache)

    def free_gpu_cache(self) -> None:
        """Let every copy end, then drop every group and the host tier; tensors die with the last reference outside.

        Raises:
            TransferTimeout: A copy goes on; nothing is released.
            HostAllocationFailed: Host memory could not be released; everything else is.
        """
        self._reset()
        self._groups.clear()
        self._addresses.clear()
        self._generation += 1
        host, self._mover.host = self._mover.host, None
        if host is not None:
            host.free()

    def free_group(self, first_layer_id: int) -> None:
        """Let every copy end, then drop one group.

        Raises:
            ValueError: There is no such group.
            CacheInUse: The host tier holds its blocks, too.
            TransferTimeout: A copy goes on; nothing is released.
        """
        if first_layer_id not in self._groups:
            raise ValueError(f"first_layer_id: expected one of {list(self._groups)}, got {first_layer_id}")
        if self._mover.host is not None:
            raise CacheInUse("the host tier covers all groups: free them together")
        self._reset()
        for key in self._groups.pop(first_layer_id).tensors:
            self._addresses.pop(key, None)
        self._generation += 1

    def get_stats(self) -> dict[str, Any]:
        """Counters for people; bytes_moved is since the start, by direction."""
        return {
            "initialized": bool(self._groups),
            "num_layers": len(self._mover.layer_ids),
            "pending_transfers": self._mover.transfers.num_pending,
            "generation": self._generation,
            "num_device_blocks": self.num_device_blocks or 0,
            "num_host_blocks": self.num_host_blocks,
            "device_bytes": self.num_bytes,
            "host_bytes": 0 if self._mover.host is None else self._mover.host.num_bytes,
            "bytes_moved": dict(self._mover.bytes_moved),
        }

    def start(self) -> None:
        """Start the transfer thread, which otherwise starts with the first transfer; may be called again."""
        self._mover.transfers.start()

    def stop(self) -> None:
        """Let every copy end and end the transfer thread; may be called again.

        Raises:
            TransferTimeout: A copy goes on, and so does the thread.
        """
        self._mover.transfers.stop(self.transfer_timeout)

    def _reset(self) -> None:
        self.drain()
        self._mover.latest_load = None

    def _succeeds(self, name: str, action: Callable[[], None]) -> bool:
        self.last_error = None
        try:
            action()
        except CacheError as error:
            self.last_error = error
            logging.getLogger(__name__).exception("%s failed", name)
        return self.last_error is None

    def _add_group(self, attn_backend: CacheOwner, num_blocks: int, num_layers: int, offset: int) -> list[Tensor]:
        if num_blocks < 1:
            raise ValueError(f"num_gpu_blocks: expected 1 or more, got {num_blocks}")
        if offset in self._groups:
            raise CacheInUse(f"the cache of layers {offset} and up exists already: free it first")
        if self._mover.host is not None:
            raise CacheInUse("the host tier exists already, without these layers: free it first")
        layer_ids = tuple(range(offset, offset + num_layers))
        taken = {layer for group in self._groups.values() for spec in group.specs for layer in spec.layer_ids}
        if taken & set(layer_ids):
            raise ValueError(f"layer_offset: layers {sorted(taken & set(layer_ids))} belong to another group")
        group = create_group(attn_backend, self._config, num_blocks, layer_ids)
        different = [
            pool.name for pool in group.pools for other in self.pools if pool.name == other.name and pool != other
        ]
        if different:
            raise ValueError(f"attn_backend: pools {different} are declared otherwise than by another group")
        addresses = {} if self._copier is None else {key: self._copier.address(x) for key, x in group.tensors.items()}
        self._groups[offset] = group
        self._addresses |= addresses
        self._generation += 1
        return list(self._groups[offset].tensors.values())

    def _storage_name(self, group: CacheGroup, role: str) -> str:
        return next(spec.storage_name for spec in group.specs if spec.role == role)

    def _format_cache_name(self, storage_name: str, layer: int) -> str:
        rank = self._local_rank % self._config.tensor_parallel_size
        return f"{storage_name}_{layer}_rank{rank}.device{self._device_id}"
