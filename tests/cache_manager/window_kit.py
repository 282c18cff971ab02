"""What the tests of window pools and of snapshots share."""

from __future__ import annotations

import numpy as np

from cache_manager import (
    BlockId,
    CacheConfig,
    CacheController,
    CacheManager,
    CachePool,
    CacheTensorSpec,
)
from tests.cache_manager.kit import Cache

TOKENS = list(range(1, 40))
ROOMY = {"window": 40, "state": 60, "closed": 20}
ROOMS = {"window_blocks": ROOMY, "host_window_blocks": ROOMY}
# Window rows, states of overlapping windows of 4, states of windows of 128, as spec checks 13 and 15 have them.
LARGE = {
    pool.name: pool
    for pool in (CachePool("rows", 64, 128, 127), CachePool("states4", 4, 8, 4), CachePool("states128", 8, 128, 0))
}


class Owner:
    """A byte per token in a main pool of 256 tokens and in the LARGE ones."""

    def cache_pools(self) -> tuple[CachePool, ...]:
        return tuple(LARGE.values())

    def cache_spec(self, layer_ids: tuple[int, ...], **_: object) -> tuple[CacheTensorSpec, ...]:
        sizes = {"main": 256} | {name: pool.block_tokens for name, pool in LARGE.items()}
        return tuple(
            CacheTensorSpec(name, name, layer_ids, (size,), "uint8", 1, name, name) for name, size in sizes.items()
        )

    def create_kv_cache(
        self, num_layers: int, num_blocks: int, *, window_blocks: dict[str, int], **_: object
    ) -> dict[tuple[str, int], np.ndarray]:
        counts = {"main": num_blocks, **window_blocks}
        return {
            (spec.role, 0): np.zeros((counts[spec.role], *spec.block_shape), np.uint8)
            for spec in self.cache_spec((0,))
        }


def large_manager(**window_blocks: int) -> CacheManager:
    counts = dict.fromkeys(LARGE, 300) | window_blocks
    controller = CacheController(CacheConfig(num_layers=1, window_blocks=counts))
    controller.initialize_kv_cache(Owner(), 8)
    return CacheManager(controller, num_blocks=8, block_size=256)


def roomy_cache(**options: object) -> Cache:
    """A cache of the kit's three pools that never lacks a block by itself."""
    return Cache("windows", **({"num_blocks": 20, "num_host_blocks": 20} | ROOMS | options))  # type: ignore[arg-type]


def starve(cache: Cache, name: str, tier: str = "device") -> list[BlockId]:
    """Take whatever a pool has, snapshots included."""
    windows = getattr(cache.manager._tiers.windows, tier)
    return list(windows.take({name: windows.num_available(name)})[name])


def evict_prefix(cache: Cache) -> None:
    """Fill the device with a request that needs all main blocks, and end it."""
    table = cache.manager.open([99] * 4 * cache.manager.num_available)
    cache.manager.close(table)
    cache.manager.drain()


def check(cache: Cache) -> None:
    cache.manager.check_integrity()
    cache.check_cached()
    cache.check_snapshots()
