"""The cache tensors of one model, and who declares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from cache_manager.config import CacheConfig
from cache_manager.spec import MAIN_POOL, CachePool, CacheTensorSpec, TensorKey, ordered_keys

Tensor = Any  # the framework's tensor: the cache manager moves references and never looks inside


class CacheOwner(Protocol):
    """What the controller asks of an attention backend.

    One whose specs name another pool than the main one has also `cache_pools() -> tuple[CachePool, ...]`, which
    declares them, and takes `window_blocks`, their blocks by name, in `create_kv_cache`.
    """

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """The cache tensors of these layers, in the order they have inside a layer."""

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> Mapping[TensorKey, Tensor]:
        """Zero-filled tensors for layers layer_offset .. layer_offset + num_layers - 1."""


@dataclass(frozen=True)
class CacheGroup:
    """The cache of one model: its tensors by (role, layer), in flat-list order.

    Attributes:
        specs: Of the tensors.
        pools: The pools that specs name besides the main one.
        num_blocks: Blocks by pool.
        tensors: By (role, layer).
    """

    specs: tuple[CacheTensorSpec, ...]
    pools: tuple[CachePool, ...]
    num_blocks: Mapping[str, int]
    tensors: Mapping[TensorKey, Tensor]

    @property
    def positions(self) -> dict[TensorKey, int]:
        """Place of every (role, layer) in the flat list that initialize_* returned."""
        return {key: place for place, key in enumerate(self.tensors)}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            spec.bytes_per_block_all_layers * self.num_blocks[spec.pool] for spec in self.specs if spec.layer_ids
        )


def create_group(owner: CacheOwner, config: CacheConfig, num_blocks: int, layer_ids: tuple[int, ...]) -> CacheGroup:
    """Let a backend allocate the tensors that it declares for consecutive layers.

    Args:
        owner: The backend.
        config: Blocks of the window pools, and what is handed to the backend.
        num_blocks: Of the main pool.
        layer_ids: Absolute ids, ascending.

    Raises:
        ValueError: A pool is not declared or has no blocks, or other tensors were created than declared.
    """
    dtype, quant_type = config.cache_dtype, config.kv_cache_quant_type
    specs = owner.cache_spec(layer_ids, cache_dtype=dtype, kv_cache_quant_type=quant_type)
    pools = _used_pools(owner, specs)
    missing = [pool.name for pool in pools if pool.name not in config.window_blocks]
    if missing:
        raise ValueError(f"window_blocks: expected blocks of pools {missing}, got {dict(config.window_blocks)}")
    counts = {pool.name: config.window_blocks[pool.name] for pool in pools}
    more: dict[str, Any] = {"window_blocks": counts} if counts else {}
    created = owner.create_kv_cache(
        num_layers=len(layer_ids),
        num_blocks=num_blocks,
        cache_dtype=dtype,
        kv_cache_quant_type=quant_type,
        layer_offset=layer_ids[0] if layer_ids else 0,
        **more,
    )
    keys = ordered_keys(specs)
    if set(created) != set(keys):
        different = sorted(set(created) ^ set(keys))
        raise ValueError(f"attn_backend: created and declared cache tensors differ in {different}")
    tensors = MappingProxyType({key: created[key] for key in keys})
    return CacheGroup(specs, pools, MappingProxyType({MAIN_POOL: num_blocks, **counts}), tensors)


def _used_pools(owner: CacheOwner, specs: tuple[CacheTensorSpec, ...]) -> tuple[CachePool, ...]:
    used = {spec.pool for spec in specs if spec.layer_ids} - {MAIN_POOL}
    if not used:
        return ()
    declare = getattr(owner, "cache_pools", tuple)
    declared: dict[str, CachePool] = {pool.name: pool for pool in declare()}
    if unknown := sorted(used - set(declared)):
        raise ValueError(f"attn_backend: specs name pools {unknown}, cache_pools declares {list(declared)}")
    return tuple(pool for pool in declared.values() if pool.name in used)
